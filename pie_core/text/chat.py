"""A conversation on its way into a context: turns and raw tokens in, the tokens still to be fed out.

A checkpoint's template renders whole conversations, and a context grows piece by piece. `Transcript` renders the
whole each time and appends what is new, so that everything fed, taken together, is the template's own rendering:

    fed so far      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   + Hello (by the model)
    the whole now   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user\\nBye…
    appended                                                                      <|im_end|>\\n<|im_start|>user\\nBye…

What has been fed stays fed. Where the template writes the past differently now (it strips the thinking of earlier
answers, trims them, moves the system's words), the text that it writes behind the last fed turn is appended. Where
it refuses the whole (two user turns in a row, say), the new turns are appended as they stand on their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

import msgspec

from pie_core.errors import InvalidRequest, LoadError, Unsupported
from pie_core.text.call_ids import answered_call, fresh_id
from pie_core.text.parts import ROLES, CallPart, Part, ResultPart, TextPart, Turn, read_tools
from pie_core.text.templates import ChatTemplate
from pie_core.text.tokenizer import Tokenizer
from pie_core.text.tool_calls import split_reply
from pie_core.text.tool_formats import ToolFormat
from pie_core.text.turns import SystemStyle, TemplateTurns

_CONTEXT_TOKENS = 64  # enough of the past to find the seam of what is appended


class ChatModel(Protocol):
    """What a transcript needs of a checkpoint; TextModel is one."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def template(self) -> ChatTemplate: ...
    @property
    def stop_tokens(self) -> tuple[int, ...]: ...
    @property
    def known_tool_format(self) -> ToolFormat | None: ...


@dataclass(frozen=True, slots=True)
class _State:
    """Where a conversation stands; "written" is what has become tokens, fed or waiting."""

    turns: tuple[Turn, ...] = ()
    open: bool = False  # the last turn takes more parts
    held: tuple[
        Part, ...
    ] = ()  # the system's words, waiting for a user turn that the template writes them into
    cued: bool = False  # the assistant's turn is open, for the model or for raw tokens
    reply_start: int | None = None  # the index of the reply's first token, once the cue is written
    written: str = ""  # the turns as the template wrote them, and the replies between; without raw tokens
    written_turns: int = 0
    closing: str | None = None  # behind a reply that ended: what of its end-of-turn the model wrote itself
    tail: str = ""  # between the last call of that reply and its end
    raw_last: bool = False  # raw tokens came after the last turn
    tools: str = ""  # JSON, as they were described


@dataclass(frozen=True, slots=True)
class _Mark:
    """How a conversation stood when `tokens` tokens were written; its turns and text are beginnings of today's."""

    tokens: int
    turns: int
    characters: int
    rest: _State

    @classmethod
    def of(cls, tokens: int, state: _State) -> _Mark:
        return cls(tokens, len(state.turns), len(state.written), replace(state, turns=(), written=""))

    def restored(self, today: _State) -> _State:
        return replace(self.rest, turns=today.turns[: self.turns], written=today.written[: self.characters])


@dataclass(frozen=True, slots=True)
class _Saved:
    """A transcript in a snapshot."""

    now: datetime
    tokens: list[int]
    fed: int
    state: _State
    marks: list[_Mark]


class Transcript:
    """Owns a context's turns, its buffer (tokens not fed yet) and the tokens fed."""

    def __init__(
        self, model: ChatModel, now: datetime | None = None, variables: dict[str, Any] | None = None
    ) -> None:
        self._model = model
        tool_format = model.known_tool_format
        call_ends = tool_format.call_ends if tool_format else ()
        self._turns = TemplateTurns(model.template, model.tokenizer.added_texts, now, variables, call_ends)
        self._state = _State()
        self._tokens: list[int] = []
        self._fed = 0
        self._marks: list[_Mark] = []

    # What a guest adds.

    def add_text(self, role: str, text: str) -> None:
        """Adds a part to the open turn of `role`, or closes the open turn and begins one."""
        self.add_part(role, TextPart(text))

    def add_part(self, role: str, part: TextPart) -> None:
        if role not in ROLES:
            raise InvalidRequest(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
        if role == "assistant" and self._state.cued:
            self._continue_reply(part.text)
        elif role == "system" and self._turns.system_style is not SystemStyle.OWN_TURN:
            closed = self._closed()
            self._state = replace(closed, held=(*closed.held, part))
        else:
            self._state = self._with_part(role, part)

    def equip(self, tools: str) -> None:
        """Describes tools to the model, where its template does that; `tools` is a JSON list of functions."""
        described = read_tools(tools)
        if self._tokens or self._state.written_turns:
            raise InvalidRequest(
                f"the conversation has begun ({len(self._tokens)} tokens), and its template describes tools at the "
                "beginning: equip a context before its first tokens, or truncate it to nothing"
            )
        if described and not self._turns.writes_tools:
            raise self._unsupported(
                f"describes no tools, and {len(described)} were given; say what there is in a system turn"
            )
        self._become(replace(self._state, tools=tools if described else ""))

    def _become(self, state: _State) -> None:
        if state.tools != self._state.tools:
            self._turns = self._turns.equipped(read_tools(state.tools) if state.tools else [])
        self._state = state

    def add_tool_call(self, name: str, arguments: str, call_id: str = "") -> None:
        """A part of the assistant's turn; `arguments` is a JSON object."""
        if not self._turns.writes_calls:
            raise self._unsupported(f"writes no tool calls; add the one of {name!r} as text")
        if self._state.cued and self._state.reply_start is not None:
            raise InvalidRequest(
                "the assistant's turn has been opened for the model, which writes its calls itself; "
                f"add the one of {name!r} in place of the cue, or as text"
            )
        state = replace(self._state, cued=False)
        chosen = call_id or fresh_id(state.turns, name, self._model.known_tool_format)
        part = CallPart.checked(name, arguments, chosen)
        self._state = state
        self._state = self._with_part("assistant", part)

    def add_tool_result(self, name: str, content: str, call_id: str = "") -> None:
        """A turn of its own: what a tool answered to the call of that id, else to the first open one of its name."""
        if not self._turns.writes_results:
            raise self._unsupported(f"writes no tool results; add the one of {name!r} as a user's turn")
        state = self._settled()
        call = answered_call(state.turns, name, call_id)
        if call is None:
            call_id = call_id or fresh_id(state.turns, name, self._model.known_tool_format)
        part = ResultPart(name or (call.name if call else ""), content, call.id if call else call_id)
        turns = (*state.turns, Turn("tool", (part,)))
        self._state = replace(state, turns=turns, open=False, raw_last=False)

    def _unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"the chat template of {self._model.template.source.origin} {what}")

    def cue(self) -> None:
        """Closes the open turn and opens the assistant's; changes nothing while that is open and unfinished."""
        if self._state.cued and not self._split_reply()[1]:
            return
        self._state = replace(self._settled(), cued=True, reply_start=None)

    def seal(self) -> None:
        """Ends the assistant's turn as the template ends it; ends it once however often it is called."""
        state = self._state
        if state.raw_last and not state.cued and not state.open:
            self.append(self._model.tokenizer.encode(self._turns.seal))
            self._state = replace(self._state, raw_last=False)
        else:
            self._state = self._settled()

    def append(self, tokens: Sequence[int]) -> None:
        """Adds tokens as they are: part of the assistant's turn after a cue, outside of any turn otherwise."""
        self._model.tokenizer.check_ids(tokens)
        self._write()
        self._tokens.extend(tokens)
        self._note_raw()

    # What the host feeds.

    def pending_tokens(self) -> list[int]:
        """The tokens that bring what has been fed up to date; changes nothing."""
        return self._tokens[self._fed :] + self._unwritten()[0]

    def drain(self) -> list[int]:
        """Closes the open turn and hands over the pending tokens, which count as fed from now on.

        A caller whose pass may be refused keeps a `fork()` from before and goes back to it.
        """
        self._write()
        pending = self._tokens[self._fed :]
        self._fed = len(self._tokens)
        return pending

    def note_generated(self, tokens: Sequence[int]) -> None:
        """Tells of tokens fed by other means than the buffer, in front of what still waits there."""
        if self._fed == len(self._tokens):
            self._tokens.extend(tokens)
        else:
            self._insert(tokens)
        self._fed += len(tokens)
        self._note_raw()

    def take_back(self) -> None:
        """The last fed token waits again, because its row was dropped; turns stay as they are."""
        self._fed -= 1

    def truncate(self, length: int) -> None:
        """Keeps the first `length` fed tokens; the buffer is dropped, and turns go back to how they stood then."""
        if not 0 <= length <= self._fed:
            raise InvalidRequest(f"cannot truncate to {length} tokens; {self._fed} have been fed")
        self._marks = [mark for mark in self._marks if mark.tokens <= length]
        self._become(self._marks[-1].restored(self._state) if self._marks else _State())
        del self._tokens[length:]
        self._fed = length

    def fork(self) -> Transcript:
        """An independent copy, buffer included."""
        twin = Transcript.__new__(Transcript)
        twin._model, twin._turns, twin._state, twin._fed = self._model, self._turns, self._state, self._fed
        twin._tokens, twin._marks = self._tokens.copy(), self._marks.copy()
        return twin

    def to_bytes(self) -> bytes:
        """All of it, for a snapshot."""
        return msgspec.msgpack.encode(
            _Saved(self._turns.now, self._tokens, self._fed, self._state, self._marks)
        )

    def restore(self, data: bytes) -> None:
        """Becomes the transcript that `to_bytes` wrote, the date that its template may show included."""
        try:
            saved = msgspec.msgpack.decode(data, type=_Saved)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise LoadError(f"the transcript of a snapshot cannot be read: {exc}; save it again") from exc
        self._turns = self._turns.at(saved.now)
        self._tokens, self._fed, self._marks = saved.tokens, saved.fed, saved.marks
        self._become(saved.state)

    @property
    def fed_tokens(self) -> list[int]:
        return self._tokens[: self._fed]

    @property
    def is_cued(self) -> bool:
        return self._state.cued

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """The turns so far, the assistant's unfinished one as far as it goes; without raw tokens."""
        return self._settled().turns

    # Turns.

    def _with_part(self, role: str, part: Part) -> _State:
        state = self._state
        if state.open and state.turns[-1].role == role:
            last = state.turns[-1]
            return replace(state, turns=(*state.turns[:-1], Turn(role, (*last.parts, part))))
        state = self._closed() if role == "user" else self._settled()
        if role == "user" and state.held:
            return self._with_held(state, (part,))
        return replace(state, turns=(*state.turns, Turn(role, (part,))), open=True, raw_last=False)

    def _with_held(self, state: _State, parts: tuple[Part, ...]) -> _State:
        """A user turn that takes the system's waiting words with it, the way this template wants them."""
        added: tuple[Turn, ...]
        if self._turns.system_style is SystemStyle.WITH_USER:
            added = (Turn("system", state.held), Turn("user", parts))
        else:
            between = (TextPart("\n\n"),) if parts else ()
            added = (Turn("user", (*state.held, *between, *parts)),)
        return replace(state, turns=(*state.turns, *added), held=(), open=bool(parts), raw_last=False)

    def _settled(self) -> _State:
        """Everything closed, and held words in a user turn of their own: no user's words will follow them."""
        state = self._closed()
        return self._with_held(state, ()) if state.held else state

    def _closed(self) -> _State:
        state = self._state
        if not state.cued:
            return replace(state, open=False)
        content, closing = self._split_reply()
        reply = self._reply_turn(content)
        turns = (*state.turns, reply)
        if state.reply_start is None:
            return replace(state, turns=turns, cued=False)
        behind = self._turns.behind_call(content, last=True) if reply.calls else None
        return replace(
            state,
            turns=turns,
            cued=False,
            reply_start=None,
            written=state.written + content + closing,
            written_turns=len(turns),
            closing=closing,
            tail=behind or "",
        )

    def _reply_turn(self, content: str) -> Turn:
        """The model's turn with its calls as parts, where the template could write them."""
        tool_format = self._model.known_tool_format
        if tool_format is None or not self._turns.writes_calls:
            return Turn.of("assistant", content)
        before, calls = split_reply(content, tool_format)
        turn = Turn.of("assistant", before)
        for call in calls:
            id_ = call.get("id") or fresh_id((*self._state.turns, turn), call["name"], tool_format)
            part = CallPart(call["name"], json.dumps(call["arguments"], ensure_ascii=False), id_)
            turn = Turn("assistant", (*turn.parts, part))
        return turn

    def _split_reply(self) -> tuple[str, str]:
        """The reply's text, and what of its end the model wrote itself (a stop token, and white space behind it)."""
        start = self._state.reply_start
        if start is None:
            return "", ""
        tokenizer, reply = self._model.tokenizer, self._tokens[start:]
        for place in range(len(reply) - 1, -1, -1):
            if reply[place] in self._model.stop_tokens:
                return tokenizer.decode_continuation(reply[:place]), tokenizer.decode_continuation(
                    reply[place:]
                )
            if tokenizer.token_bytes(reply[place]).strip():
                break
        return tokenizer.decode_continuation(reply), ""

    def _continue_reply(self, text: str) -> None:
        self._write()
        self._tokens.extend(self._encode_next(text))

    def _note_raw(self) -> None:
        if not self._state.cued:
            self._state = replace(self._state, open=False, raw_last=True)

    # From turns to tokens.

    def _write(self) -> None:
        """Turns everything into tokens; a template's refusal leaves all as it was."""
        tokens, state = self._unwritten()
        if state is not self._state:
            self._tokens.extend(tokens)
            self._state = state
            self._marks.append(_Mark.of(len(self._tokens), state))

    def _unwritten(self) -> tuple[list[int], _State]:
        state = replace(self._state, open=False) if self._state.open else self._state
        cue = state.cued and state.reply_start is None
        if state.written_turns == len(state.turns) and state.closing is None and not cue:
            return [], state
        text = self._new_text(state, cue)
        tokens = self._encode_next(text)
        return tokens, replace(
            state,
            written=state.written + text,
            written_turns=len(state.turns),
            closing=None,
            tail="",
            reply_start=len(self._tokens) + len(tokens) if cue else state.reply_start,
        )

    def _new_text(self, state: _State, cue: bool) -> str:
        """What follows `state.written`: exactly, if the template still writes that; else behind the last turn."""
        try:
            whole = self._turns.whole(state.turns, cue)
            if whole.startswith(state.written):
                return whole[len(state.written) :]
            last = state.written_turns - 1
            behind = self._turns.after(state.turns, last, cue) if last >= 0 else None
            if behind is not None:
                return self._beyond_reply(behind, state)
        except InvalidRequest as refusal:
            return self._turns_alone(state, cue, refusal)
        return self._turns_alone(state, cue, None)

    def _beyond_reply(self, text: str, state: _State) -> str:
        """`text`, behind the words of the last written turn, without what of it has been written."""
        if state.closing is None:
            known = self._turns.after(state.turns[: state.written_turns], state.written_turns - 1)
            return self._beyond_common(text, known or "")
        tail, closing = state.tail, state.closing
        if text.startswith(tail):
            text = text[len(tail) :]
        elif text.lstrip().startswith(tail.strip()):  # other white space, or none
            text = text.lstrip()[len(tail.strip()) :]
        if not self._turns.common(text, closing) and self._turns.common(text.lstrip(), closing.lstrip()):
            text, closing = text.lstrip(), closing.lstrip()
        return self._beyond_common(text, closing)

    def _beyond_common(self, text: str, known: str) -> str:
        return text[self._turns.common(text, known) :]

    def _turns_alone(self, state: _State, cue: bool, refusal: InvalidRequest | None) -> str:
        new = state.turns[state.written_turns :]
        if refusal is not None and new and not state.written:
            raise refusal  # a conversation that begins wrongly has no form to go on from
        try:
            end = "" if state.closing is None else self._beyond_common(self._turns.seal, state.closing)
            pieces = [self._turns.alone(turn) for turn in new]
            return end + "".join(pieces) + (self._turns.cue if cue else "")
        except (InvalidRequest, Unsupported):
            if refusal is None:
                raise
            raise refusal from None

    def _encode_next(self, text: str) -> list[int]:
        tokenizer = self._model.tokenizer
        before = tokenizer.decode_continuation(self._tokens[-_CONTEXT_TOKENS:])
        return tokenizer.encode_after(before, text)

    def _insert(self, tokens: Iterable[int]) -> None:
        added = list(tokens)
        self._tokens[self._fed : self._fed] = added
        start = self._state.reply_start
        if start is not None and start > self._fed:
            self._state = replace(self._state, reply_start=start + len(added))
        self._marks = [mark for mark in self._marks if mark.tokens <= self._fed]
