"""Which tool result belongs to which call of a conversation, and ids for calls that have none."""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.text.parts import CallPart, Turn
from pie_core.text.tool_formats import ToolFormat


def fresh_id(turns: Sequence[Turn], name: str, tool_format: ToolFormat | None) -> str:
    """For the next call. Nine letters and digits suit every family but those that number their calls by name."""
    number = sum(len(turn.calls) for turn in turns)
    if tool_format is not None and tool_format.has_numbered_ids:
        return f"functions.{name}:{number}"
    return f"call{number:05}"


def answered_call(turns: Sequence[Turn], name: str, call_id: str) -> CallPart | None:
    """The call of that id; without one, the first of that name, or of any name, that no result answers yet."""
    answered = {result.id for turn in turns for result in turn.results}
    calls = [call for turn in turns for call in turn.calls]
    if call_id:
        return next((call for call in calls if call.id == call_id), None)
    return next((call for call in calls if call.id not in answered and name in ("", call.name)), None)
