"""A token list of several columns read through the driver alone: the logits of every column and the greedy frames.

The engine's contexts keep tokens of one column, so these rows go to the driver as the steps of one generation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pie_core.contracts.driver import Driver, DriverCapabilities, Feature, GenerationRequest
from pie_core.contracts.forward import Float32, Int32, Int64, ProbeKind, Probes
from pie_core.contracts.generation_step import NO_PROBES, generation_step, longest_generation
from pie_core.engine.one_context import LONGEST_PASS, OPTIONS, Reading
from pie_core.errors import ForwardError, InvalidRequest, LimitExceeded, Unsupported

Row = int | Sequence[int]  # a token of text, or the columns of a frame
_INT32_MAX = np.iinfo(np.int32).max


def read_frames(driver: Driver, rows: Sequence[Row], num_greedy: int = 0) -> Reading:
    """At a row that a frame follows, each column's logits are given that frame's columns before it.

    That is how such models are trained. At the other rows they are given the most probable columns, as in generation.
    """
    can = driver.capabilities
    if not can.has(Feature.PROBE_COLUMNS):
        raise Unsupported(
            f"driver {can.driver!r} does not declare {Feature.PROBE_COLUMNS}: it shows the first column"
        )
    frames = _frames(rows, can)
    total, longest = len(frames) + max(num_greedy - 1, 0), longest_generation(can)
    if total > longest:
        raise LimitExceeded(
            f"{total} tokens to read and to go on with; model and cache have room for {longest}"
        )
    reader = _FrameReader(driver, frames, num_greedy)
    size = min(LONGEST_PASS, can.max_batch_tokens, OPTIONS.max_pass_values // (can.streams * can.vocab_size))
    starts = range(0, len(frames), max(size, 1))
    logits = [reader.read(start, min(start + starts.step, len(frames))) for start in starts]
    return Reading(np.concatenate(logits), reader.continuation(num_greedy))


def _frames(rows: Sequence[Row], can: DriverCapabilities) -> Int32:
    """[rows, streams]. Text stands in the first column, behind the codes."""
    if not rows:
        raise InvalidRequest("no tokens to read: expected at least one")
    return np.array([_columns(place, row, can) for place, row in enumerate(rows)], np.int32)


def _columns(place: int, row: Row, can: DriverCapabilities) -> tuple[int, ...]:
    if isinstance(row, int):
        columns: tuple[int, ...] = (can.vocab_size + row, *[0] * (can.streams - 1))
        is_known = can.vocab_size <= columns[0] <= _INT32_MAX
    else:
        columns = tuple(row)
        is_known = len(columns) == can.streams and all(0 <= each < can.vocab_size for each in columns)
    if not is_known:
        raise InvalidRequest(
            f"token {place} is {row}: expected an id of text, or a frame of {can.streams} ids from 0 to"
            f" {can.vocab_size - 1}"
        )
    return columns


class _FrameReader:
    """One context on a driver that has nothing else to do."""

    def __init__(self, driver: Driver, frames: Int32, num_greedy: int) -> None:
        self._driver, self._frames = driver, frames
        self._request = GenerationRequest(
            prompt=frames,
            max_tokens=num_greedy,
            stop_tokens=(),
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=0,
        )
        self._length = self._turn = 0
        self._next = frames[:0]  # [1, streams] once something was read

    def read(self, start: int, stop: int) -> Float32:
        """[rows, streams, vocab]"""
        can = self._driver.capabilities
        values = self._run(self._frames[start:stop], _probes(self._frames, start, stop, can.vocab_size))
        return values.reshape(stop - start, can.streams, can.vocab_size)

    def continuation(self, count: int) -> Int32:
        """[count, streams]"""
        found = [self._next] if count else []
        while len(found) < count:
            self._run(self._next, NO_PROBES)
            found.append(self._next)
        return np.concatenate([self._frames[:0], *found])

    def _run(self, chunk: Int32, probes: Probes) -> Float32:
        can = self._driver.capabilities
        batch = generation_step(self._request, can, chunk, self._length, self._turn, probes)
        result = self._driver.collect(self._driver.submit(batch))
        if result.failed:
            raise ForwardError(f"tokens from {self._length} on: {result.failed[0]}")
        self._length, self._turn, self._next = self._length + len(chunk), self._turn + 1, result.tokens
        return result.probe_values


def _probes(frames: Int32, start: int, stop: int, vocab_size: int) -> Probes:
    """Of every column at rows from start to stop, each naming the frame that follows it, if one does."""
    count = stop - start
    following = frames[start + 1 : stop + 1]
    is_frame = (following < vocab_size).all(axis=1)
    named: Int64 = np.zeros(count, np.int64)
    named[: len(following)] = is_frame * frames.shape[1]
    return Probes(
        rows=np.arange(count, dtype=np.int32),
        kinds=np.full(count, ProbeKind.COLUMNS, np.uint8),
        temperature=np.ones(count, np.float32),
        k=np.zeros(count, np.int32),
        token_indptr=np.concatenate([[0], np.cumsum(named)]).astype(np.int32),
        tokens=following[is_frame].reshape(-1),
    )
