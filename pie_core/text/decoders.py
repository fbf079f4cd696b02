"""What a model writes, as events while it comes: the chat text with its end, and the reasoning inside it.

Both decoders take tokens in steps of any size and give the same text for every way of cutting them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from pie_core.text.tokenizer import Tokenizer

EventKind = Literal["delta", "done", "interrupt", "start", "complete", "call", "invalid"]


@dataclass(frozen=True, slots=True)
class Event:
    """Of a ChatDecoder: "delta", "done" (the whole text), "interrupt" (its token); of a ReasoningDecoder: "start",
    "delta", "complete" (the whole thought); of a ToolDecoder: "start", "call" (JSON), "invalid" (text that is none)."""

    kind: EventKind
    text: str = ""
    token: int = 0


def cut(
    tokenizer: Tokenizer, tokens: Iterable[int], is_end: Callable[[int], bool]
) -> list[tuple[list[int], int | None]]:
    """The tokens up to each that ends something, and that one; then the rest, and None. Raises InvalidRequest."""
    tokens = list(tokens)
    tokenizer.check_ids(tokens)
    pieces: list[tuple[list[int], int | None]] = []
    begin = 0
    for place, token in enumerate(tokens):
        if is_end(token):
            pieces.append((tokens[begin:place], token))
            begin = place + 1
    return [*pieces, (tokens[begin:], None)]


class ChatDecoder:
    """Text until a stop token; a control token that is no stop token interrupts (a tool call begins, say)."""

    def __init__(self, tokenizer: Tokenizer, stop_tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_tokens = frozenset(stop_tokens)
        self._text = tokenizer.incremental_decoder()
        self._said: list[str] = []

    def feed(self, tokens: Iterable[int]) -> list[Event]:
        """A turn that is done starts afresh: tokens behind its end belong to the next one."""
        events: list[Event] = []
        for plain, end in cut(self._tokenizer, tokens, self._is_end):
            text = self._text.feed(plain)
            if end is None:
                events += self._deltas(text)
            else:
                events += [*self._deltas(text + self._text.flush()), self._control(end)]
        return events

    def finish(self) -> list[Event]:
        """Ends a turn that was cut off: an unfinished character becomes U+FFFD, then "done"."""
        events = self._deltas(self._text.flush())
        return [*events, self._done()]

    def reset(self) -> None:
        self._text.reset()
        self._said.clear()

    def _is_end(self, token: int) -> bool:
        return token in self._stop_tokens or self._tokenizer.is_control(token)

    def _deltas(self, text: str) -> list[Event]:
        if not text:
            return []
        self._said.append(text)
        return [Event("delta", text)]

    def _control(self, token: int) -> Event:
        return self._done() if token in self._stop_tokens else Event("interrupt", token=token)

    def _done(self) -> Event:
        text = "".join(self._said)
        self.reset()
        return Event("done", text)


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """What a model writes around its reasoning; `begun` where the template's cue has opened it already."""

    opening: str
    closing: str
    begun: bool = False


_KNOWN_MARKERS = (
    ReasoningMarkers("<think>", "</think>"),
    ReasoningMarkers("<thinking>", "</thinking>"),
    ReasoningMarkers("<seed:think>", "</seed:think>"),
    ReasoningMarkers("[THINK]", "[/THINK]"),
    ReasoningMarkers("◁think▷", "◁/think▷"),
    ReasoningMarkers("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningMarkers("<|channel>thought\n", "<channel|>"),
    ReasoningMarkers("<|channel|>analysis<|message|>", "<|end|>"),
    ReasoningMarkers("<reasoning>", "</reasoning>"),
)


def find_reasoning_markers(tokenizer: Tokenizer, template: str, cue: str) -> ReasoningMarkers:
    """The pair whose closing marker is a token of the vocabulary or stands in the template; else <think>."""
    by_template = [known for known in _KNOWN_MARKERS if known.closing in template]
    by_vocabulary = [known for known in _KNOWN_MARKERS if tokenizer.token_id(known.closing) is not None]
    found = next(iter([*by_template, *by_vocabulary]), _KNOWN_MARKERS[0])
    begun = cue.rfind(found.opening.rstrip()) > cue.rfind(found.closing)
    return ReasoningMarkers(found.opening, found.closing, begun)


class ReasoningDecoder:
    """The text between the markers, wherever they come in the model's text; anything outside gives no events."""

    def __init__(
        self, tokenizer: Tokenizer, markers: ReasoningMarkers, stop_tokens: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._markers = markers
        self._stop_tokens = frozenset(stop_tokens)
        self._text = tokenizer.incremental_decoder()
        self._begin()

    def feed(self, tokens: Iterable[int]) -> list[Event]:
        """A stop token completes reasoning that is still open, and the next turn begins."""
        events: list[Event] = []
        for plain, end in cut(self._tokenizer, tokens, self._is_end):
            events += self._read(self._text.feed(plain))
            if end is not None:
                events += self.finish()
        return events

    def _is_end(self, token: int) -> bool:
        """A marker may itself be a stop token of the checkpoint (<|end|>): then it closes as a marker."""
        return token in self._stop_tokens and self._tokenizer.token_text(token) != self._markers.closing

    def finish(self) -> list[Event]:
        """Ends a turn, also one that was cut off: reasoning that is still open is completed as it is."""
        events = self._read(self._text.flush())
        if self._inside:
            events += self._say(self._waiting)
            events.append(Event("complete", "".join(self._thought)))
        self._begin()
        return events

    def reset(self) -> None:
        self._text.reset()
        self._begin()

    def _begin(self) -> None:
        self._inside = False
        self._announced = not self._markers.begun
        self._waiting = ""  # may turn out to be the beginning of a marker
        self._thought: list[str] = []

    def _read(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._announced and text:
            self._announced = self._inside = True
            events.append(Event("start"))
        text, self._waiting = self._waiting + text, ""
        while text:
            marker = self._markers.closing if self._inside else self._markers.opening
            before, found, text = text.partition(marker)
            if not found:
                keep = overlap(before, marker)
                before, self._waiting = before[: len(before) - keep], before[len(before) - keep :]
            events += self._say(before) if self._inside else []
            events += [self._toggle()] if found else []
        return events

    def _toggle(self) -> Event:
        self._inside = not self._inside
        if self._inside:
            return Event("start")
        thought = "".join(self._thought)
        self._thought = []
        return Event("complete", thought)

    def _say(self, text: str) -> list[Event]:
        if not text:
            return []
        self._thought.append(text)
        return [Event("delta", text)]


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of `text` could be the beginning of `marker`."""
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)
