"""A chat template taken apart into turns, by rendering small conversations and looking around a marker.

No template says where its turns begin and end. But a conversation rendered with a marker in place of one turn's text
shows what follows that turn, and two renderings that differ in one turn show what the turn is on its own.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from pie_core.errors import InvalidRequest, Unsupported
from pie_core.text.parts import CallPart, Turn
from pie_core.text.templates import ChatTemplate, Message
from pie_core.text.tool_messages import (
    PROBE_CALL,
    PROBE_TOOL,
    ToolMessages,
    find_tool_messages,
    with_text,
    writes_results,
)


class SystemStyle(enum.Enum):
    """What a template does with the system's words."""

    OWN_TURN = "own turn"  # written at once, whatever follows
    WITH_USER = "with user"  # written by the template only where a user turn follows: they wait for it
    REFUSED = "refused"  # the template refuses or drops them: they become the beginning of the user's turn


class TemplateTurns:
    """Renders turns with one template; the clock is held, so that a date in the template does not change midway."""

    def __init__(
        self,
        template: ChatTemplate,
        whole_texts: Sequence[str] = (),  # special tokens, which no cut may go through
        now: datetime | None = None,
        variables: dict[str, Any] | None = None,
        call_ends: Sequence[
            str
        ] = (),  # what ends a tool call in this checkpoint's format, the outermost first
    ) -> None:
        self._template = template
        self._whole_texts = whole_texts
        self.now = now or datetime.now()
        self._variables = variables or {}
        self._call_ends = call_ends

    def at(self, now: datetime) -> TemplateTurns:
        return TemplateTurns(self._template, self._whole_texts, now, self._variables, self._call_ends)

    def equipped(self, tools: list[dict[str, Any]]) -> TemplateTurns:
        """The same with these tools described to the model; an empty list takes them away."""
        variables = {name: value for name, value in self._variables.items() if name != "tools"}
        variables |= {"tools": tools} if tools else {}
        return TemplateTurns(self._template, self._whole_texts, self.now, variables, self._call_ends)

    def whole(self, turns: Sequence[Turn], cue: bool = False) -> str:
        """The conversation so far, without the final end that some templates write when nobody is cued."""
        text = self._render(turns, cue)
        if cue or not turns or turns[-1].role == "assistant":
            return text
        try:
            continued = self._render(turns, cue=True)
        except InvalidRequest:
            return text
        return text[: self.common(text, continued)]

    def _render(self, turns: Sequence[Turn], cue: bool) -> str:
        way = self._tool_messages if any(turn.calls or turn.results for turn in turns) else None
        messages = [(way or ToolMessages()).message(turn) for turn in turns]
        return self._template.render(messages, cue, self.now, self._variables)

    # Tools.

    @cached_property
    def _tool_messages(self) -> ToolMessages | None:
        return find_tool_messages(self._with_tool)

    @cached_property
    def writes_calls(self) -> bool:
        return self._tool_messages is not None

    @cached_property
    def writes_results(self) -> bool:
        return writes_results(self._with_tool, self._tool_messages or ToolMessages())

    @cached_property
    def writes_tools(self) -> bool:
        question = ToolMessages().message(_QUESTION)
        return PROBE_CALL.name in (self._with_tool([question]) or "")

    def _with_tool(self, messages: list[Message]) -> str | None:
        variables = self._variables | {"tools": [PROBE_TOOL]}
        try:
            return self._template.render(messages, False, self.now, variables)
        except InvalidRequest:
            return None

    def tools_alone(self, tools: list[dict[str, Any]]) -> str:
        """What describes tools to the model where nothing else has been said, with whatever begins a conversation."""
        text = self.equipped(tools).whole([_QUESTION])
        own = self.alone(_QUESTION)
        if self.writes_tools and text.endswith(own):
            return text[: len(text) - len(own)]
        raise Unsupported(
            f"the chat template of {self._template.source.origin} writes no description of tools on its own, "
            "in front of the user's turn; equip a context instead"
        )

    # Pieces of conversations.

    def common(self, one: str, other: str) -> int:
        """How many characters two texts share at their beginning, without the front half of a special token."""
        shared = _shared(one, other)
        inside = [
            start
            for special in self._whole_texts
            for start in range(max(0, shared - len(special) + 1), shared)
            if one.startswith(special, start) or other.startswith(special, start)
        ]
        return min(inside, default=shared)

    def after(self, turns: Sequence[Turn], index: int, cue: bool = False) -> str | None:
        """What the template writes behind the text of turn `index`; None where it does not write that text."""
        marker = _marker(turns)
        marked = [with_text(turn, marker) if place == index else turn for place, turn in enumerate(turns)]
        _, found, rest = self.whole(marked, cue).rpartition(marker)
        if not found or not turns[index].calls:
            return rest if found else None
        return self.behind_call(rest)

    def behind_call(self, text: str, last: bool = False) -> str | None:
        """What follows the first end of a call in `text`, or the last one; None where there is none."""
        end = next((end for end in self._call_ends if end in text), None)
        if end is None:
            return None
        return text.rpartition(end)[2] if last else text.partition(end)[2]

    def alone(self, turn: Turn) -> str:
        """One whole turn as it stands in the middle of a conversation; the system's as it stands at its beginning."""
        if turn.role == "system":
            return self._system_alone(turn)
        if turn.role == "user":
            return self._added([_QUESTION, _ANSWER], [turn])
        calls = tuple(CallPart(result.name, "{}", result.id) for result in turn.results)
        return self._added([_QUESTION, Turn("assistant", calls)] if calls else [_QUESTION], [turn])

    @cached_property
    def cue(self) -> str:
        """What opens the assistant's turn for the model; empty where the template writes nothing there."""
        return self._added([_QUESTION], [], cue=True)

    @cached_property
    def seal(self) -> str:
        """What ends the assistant's turn."""
        return self.after([_QUESTION, _ANSWER], 1) or ""

    @cached_property
    def system_style(self) -> SystemStyle:
        system = Turn.of("system", _PROBE)
        try:
            both = self.whole([system, _QUESTION])
        except InvalidRequest:
            return SystemStyle.REFUSED
        if _PROBE not in both:
            return SystemStyle.REFUSED
        try:
            single = self.whole([system])
        except InvalidRequest:
            return SystemStyle.WITH_USER
        return SystemStyle.OWN_TURN if _PROBE in single and both.startswith(single) else SystemStyle.WITH_USER

    def _added(self, before: list[Turn], turns: list[Turn], cue: bool = False) -> str:
        last = len(before) - 1
        old, new = self.after(before, last), self.after([*before, *turns], last, cue)
        if (
            old is None and before[last].calls
        ):  # a format without an end: the calls are plain, and written as they are
            old, new = self.whole(before), self.whole([*before, *turns], cue)
        if old is None or new is None:
            raise Unsupported(
                f"the chat template of {self._template.source.origin} writes no turn that stands on its own; "
                "add turns to a context instead"
            )
        return new[self.common(old, new) :]

    def _system_alone(self, turn: Turn) -> str:
        if self.system_style is SystemStyle.OWN_TURN:
            return self.whole([turn])
        raise Unsupported(
            f"the chat template of {self._template.source.origin} writes the system's words inside the user's "
            "turn, never on their own; add them to a context instead"
        )


_QUESTION = Turn.of("user", "Question")
_ANSWER = Turn.of("assistant", "Answer")
_PROBE = "\ue0f1Probe\ue0f2"  # private-use characters, so that no template looks for them or trims them


def _marker(turns: Sequence[Turn]) -> str:
    number = 0
    while any(f"\ue0f1{number}\ue0f2" in text for turn in turns for text in turn.texts):
        number += 1
    return f"\ue0f1{number}\ue0f2"


def _shared(one: str, other: str) -> int:
    if other.startswith(one) or one.startswith(other):
        return min(len(one), len(other))
    return next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
