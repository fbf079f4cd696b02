"""Tool calls in what a model writes, as events while it comes: "start", then "call" or "invalid".

The text is read once, as it comes, and the events are the same for every way of cutting it into steps. Calls count
wherever they stand in the text.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from pie_core.errors import Unsupported
from pie_core.text.decoders import Event, cut, overlap
from pie_core.text.tokenizer import Tokenizer
from pie_core.text.tool_formats import TOOL_FORMATS, ToolCall, ToolFormat, ToolMarkers

LOG = logging.getLogger(__name__)


def find_tool_format(tokenizer: Tokenizer, template: str, origin: str) -> ToolFormat:
    """The format whose sign stands in the template, else the one whose sign is a token."""
    by_template = [known for known in TOOL_FORMATS if any(sign in template for sign in known.signs)]
    by_token = [
        known for known in TOOL_FORMATS if any(tokenizer.token_id(sign) is not None for sign in known.signs)
    ]
    found = next(iter([*by_template, *by_token]), None)
    if found is None:
        signs = ", ".join(sign for known in TOOL_FORMATS for sign in known.signs)
        raise Unsupported(
            f"the chat template of {origin} and the vocabulary show no known way of writing tool calls; "
            f"looked for {signs}; use the chat decoder and read calls from the text"
        )
    return found


class ToolDecoder:
    """Finds the calls of one format in tokens; text outside of calls gives no events."""

    def __init__(
        self, tokenizer: Tokenizer, tool_format: ToolFormat, stop_tokens: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        closing = set(tool_format.call_ends)
        self._stop_tokens = {token for token in stop_tokens if tokenizer.token_text(token) not in closing}
        self._text = tokenizer.incremental_decoder()
        self._reader = ToolReader(tool_format)

    def feed(self, tokens: Iterable[int]) -> list[Event]:
        """A stop token ends a call that is still open, and the next turn begins."""
        events: list[Event] = []
        for plain, end in cut(self._tokenizer, tokens, self._stop_tokens.__contains__):
            events += self._reader.read(self._text.feed(plain))
            if end is not None:
                events += self.finish()
        return events

    def finish(self) -> list[Event]:
        """Ends a turn, also one that was cut off: what is open is a call if it is complete, else invalid."""
        return self._reader.read(self._text.flush()) + self._reader.finish()

    def reset(self) -> None:
        self._text.reset()
        self._reader.reset()


class ToolReader:
    """Finds the calls of one format in text."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self._markers = tool_format.markers
        self.reset()

    def finish(self) -> list[Event]:
        """Ends a turn."""
        events: list[Event] = []
        if self._quoted:  # a quote without its partner hid what stood behind it: read that plainly
            self._heed_quotes = False
            self._restart_body()
            events += self.read("")
        if self._open is not None:
            events += _end(self._open, self._waiting, closed=False)
        self.reset()
        return events

    def reset(self) -> None:
        self._open: ToolMarkers | None = None
        self._waiting = ""  # outside: perhaps the beginning of a marker; inside: all of the call so far
        self._at_start = True
        self._heed_quotes = True
        self._restart_body()

    def _restart_body(self) -> None:
        self._scanned = 0
        self._quoted = False

    def read(self, text: str) -> list[Event]:
        self._waiting += text
        events: list[Event] = []
        while step := self._find_opening() if self._open is None else self._find_end(self._open):
            events += step
        return events

    # Outside of a call.

    def _find_opening(self) -> list[Event]:
        if self._at_start:
            stripped = self._waiting.lstrip()
            first = [markers for markers in self._markers if markers.only_first]
            for markers in first:
                if stripped.startswith(markers.opening):
                    return self._start(markers, stripped[len(markers.opening) :])
            if any(markers.opening.startswith(stripped) for markers in first):
                return []
            self._at_start = False
        anywhere = [markers for markers in self._markers if not markers.only_first]
        found = [(self._waiting.find(markers.opening), markers) for markers in anywhere]
        place, markers = min(
            ((place, markers) for place, markers in found if place >= 0),
            key=lambda pair: pair[0],
            default=(-1, anywhere[0]),
        )
        if place >= 0:
            return self._start(markers, self._waiting[place + len(markers.opening) :])
        keep = max(overlap(self._waiting, markers.opening) for markers in anywhere)
        self._waiting = self._waiting[len(self._waiting) - keep :]
        return []

    def _start(self, markers: ToolMarkers, rest: str) -> list[Event]:
        self._open, self._waiting, self._at_start = markers, rest, False
        self._restart_body()
        return [Event("start")]

    # Inside a call.

    def _find_end(self, markers: ToolMarkers) -> list[Event]:
        """Up to the closing marker, or to another opening one: then the closing one was forgotten."""
        pattern, longest = _landmarks(markers)
        for match in pattern.finditer(self._waiting, self._scanned):
            self._scanned = match.end()
            if match["mark"] is None:
                self._pass_quote(markers, match)
            elif not self._quoted:
                body, rest = self._waiting[: match.start()], self._waiting[match.end() :]
                closed = match["mark"] == markers.closing
                events = _end(markers, body, closed)
                self._open, self._waiting = None, rest
                return events if closed else events + self._start(markers, rest)
        self._scanned = max(self._scanned, len(self._waiting) - longest + 1)
        return []

    def _pass_quote(self, markers: ToolMarkers, match: re.Match[str]) -> None:
        escaped = match[0].startswith("\\")
        if self._heed_quotes and not escaped and (not markers.quotes_in_json_only or _is_json(self._waiting)):
            self._quoted = not self._quoted


def split_reply(text: str, tool_format: ToolFormat) -> tuple[str, list[dict[str, Any]]]:
    """What a model wrote in front of its calls, and these; all of it and none where anything is not well-formed."""
    reader = ToolReader(tool_format)
    events = [event for event in reader.read(text) + reader.finish() if event.kind != "start"]
    if not events or any(event.kind == "invalid" for event in events):
        return text, []
    starts = (text.find(sign) for sign in _openings(tool_format))
    before = text[: min(start for start in starts if start >= 0)]
    return before.rstrip().removesuffix(tool_format.section).rstrip(), [
        json.loads(event.text) for event in events
    ]


def _openings(tool_format: ToolFormat) -> list[str]:
    return [markers.opening for markers in tool_format.markers]


def _end(markers: ToolMarkers, body: str, closed: bool) -> list[Event]:
    try:
        return [Event("call", call.to_json()) for call in _calls(markers, body, closed)]
    except (ValueError, RecursionError) as error:
        LOG.debug("a model wrote a tool call that is none: %s", error)
        closing = markers.closing if closed else ""
        return [Event("invalid", f"{markers.opening}{body}{closing}")]


def _calls(markers: ToolMarkers, body: str, closed: bool) -> list[ToolCall]:
    calls = markers.read(body, closed)
    if not calls:
        raise ValueError(f"no call behind {markers.opening}: {body!r}")
    return calls


def _is_json(text: str) -> bool:
    return re.match(r"\s*[\[{]", text) is not None


@cache
def _landmarks(markers: ToolMarkers) -> tuple[re.Pattern[str], int]:
    """What matters inside a call, and how long the longest of it is."""
    marks = [mark for mark in (markers.closing, None if markers.only_first else markers.opening) if mark]
    listed = "|".join(re.escape(mark) for mark in marks) or r"(?!)"
    pattern = re.compile(f"(?P<mark>{listed})|{markers.quotes}", re.DOTALL)
    return pattern, max([len(mark) for mark in marks] + [len(markers.quotes)])
