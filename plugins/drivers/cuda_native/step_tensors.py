"""One step on the device: every number the kernels read lies in one block of int32 words, sent by one copy.

A `BlockLayout` says where each part lies. Eager steps have a layout of their own size; a CUDA graph has one of its
bucket's size, and what the step does not fill is padded: with requests of a few rows that live on the scratch page, or,
where rows are counted for themselves, with one request that takes all rows left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import Int32, Int64
from pie_plugins.drivers.cuda_native.attention_work import UNUSED, WorkList, WorkRoom, plan_work
from pie_plugins.drivers.cuda_native.batch_tensors import GroupTable, HostStep, OneRowEach, one_row_each
from pie_plugins.drivers.cuda_native.outcomes import NOWHERE, Failure
from pie_plugins.drivers.cuda_native.timeline import Room

ROW_PARTS = ("token", "token_source", "token_dependency", "position", "row_request", "first_sampler")
REQUEST_PARTS = ("length", "length_source", "length_dependency", "fail", "drafts", "by_rows", "shared")
TILE_PARTS = ("tile_first", "tile_stop")
SAMPLER_PARTS = (
    "sampler_row",
    "sampler_request",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "stream_low",
    "stream_high",
    "index",
    "slot",
    "epoch",
)
ITEM_PARTS = {
    "item_request": "request",
    "item_row": "first_row",
    "item_part": "part",
    "item_parts": "parts",
    "item_slot": "slot",
}  # part of the block -> of the list
MERGED_PARTS = ("merged_row", "merged_slot", "merged_parts")
OTHER_DTYPES = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), np.float32),
    **dict.fromkeys(("stream_low", "stream_high", "index", "slot", "epoch"), np.uint32),
}  # of parts whose bits lie among the words

MOST_DECODED = 16  # rows of a request that verifies drafts, and still decodes
ALIGNED = 4  # every part starts on 16 bytes: kernels are compiled anew for pointers that do not


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything a block holds."""

    rows: int
    requests: int
    samplers: int
    pages: tuple[int, ...]  # of each cache group
    tiles: int = 0  # of requests that read a prefix together
    rows_each: int = 1  # of the requests that only fill a block; 0 = the first of them has all rows left over
    idle_pages: tuple[int, ...] = ()  # ... and their pages in each group
    asked: int = 0  # rows whose logits are wanted, where that is not every row
    work: WorkRoom | None = None  # where attention goes by a list


class BlockLayout:
    """Part -> (first word, words). The pages of the last group lie at the end, so that only those in use travel.

    `room`: the sizes by which the parts are laid out, where several layouts share one block."""

    def __init__(self, sizes: Sizes, room: Sizes | None = None) -> None:
        self.sizes = sizes
        self.parts: dict[str, tuple[int, int]] = {}
        self.words = 0
        for (name, count), (_, most) in zip(_counts(sizes), _counts(room or sizes), strict=True):
            self.parts[name] = self.words, count
            self.words += _aligned(most)


def _counts(sizes: Sizes) -> Iterator[tuple[str, int]]:
    """Every part and its words."""
    yield "base", 1
    for names, count in (
        (ROW_PARTS, sizes.rows),
        (REQUEST_PARTS, sizes.requests),
        (SAMPLER_PARTS, sizes.samplers),
        (TILE_PARTS, sizes.tiles),
        (("asked",), sizes.asked),
        (tuple(ITEM_PARTS), sizes.work.items if sizes.work else 0),
        (MERGED_PARTS, sizes.work.merged if sizes.work else 0),
        (("row_indptr",), sizes.requests + 1),
    ):
        yield from ((name, count) for name in names)
    for group, pages in enumerate(sizes.pages):
        yield f"holes{group}", sizes.requests
        yield f"page_indptr{group}", sizes.requests + 1
        yield f"pages{group}", pages


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


@dataclass(slots=True)
class GroupTensors:
    """One cache group of a step."""

    page_size: int
    page_indptr: Tensor  # [R + 1]
    pages: Tensor
    holes: Tensor  # [R]
    slots: Tensor  # [T] out: page * page_size + place of each new row
    columns: Tensor  # [R] out: columns of each request behind this step
    masks: MaskTensors | None = None
    work: Tensor | None = None  # the tiles that decode attention goes through, where it is used


@dataclass(frozen=True, slots=True)
class MaskTensors:
    index: Tensor  # [T]; -1 = causal
    causal: Tensor  # [M]
    words: Tensor  # [M, W]


@dataclass(slots=True)
class StepTensors:
    """Views of one block, and what the kernels make of it. All int32 but where said."""

    sizes: Sizes
    parts: dict[str, Tensor]
    groups: tuple[GroupTensors, ...]
    tokens: Tensor  # [T] out: resolved
    positions: Tensor  # [T] out: resolved
    shift: Tensor  # [R] out: how far the length lies below its bound
    rows_descending: Int64  # [R] on the host: token rows of the requests that the part "by_rows" lists
    max_drafts: int
    tiles: int = 0  # that read prefixes together; 0 = every request reads all of its columns by itself

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.parts[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def max_rows(self) -> int:
        """Of one request."""
        return int(self.rows_descending[0]) if len(self.rows_descending) else 0

    @property
    def rows_decoded(self) -> int:
        """Rows of every request that decodes: where all have equally few, so many; else one. 0 = none decodes."""
        rows = self.rows_descending
        if len(rows) and rows[0] == rows[-1] <= MOST_DECODED:
            return int(rows[0])
        return int((rows == 1).any())

    def wide_requests(self, narrow_rows: int) -> Tensor:
        """Those of more rows than that; they come first in "by_rows"."""
        return self.parts["by_rows"][: int((self.rows_descending > narrow_rows).sum())]

    def floats(self, name: str) -> Tensor:
        """A part that holds float32."""
        return self.parts[name].view(torch.float32)


def sizes_of(step: HostStep) -> Sizes:
    batch = step.batch
    pages = tuple(len(group.pages) for group in step.groups)
    return Sizes(batch.num_tokens, batch.num_requests, len(batch.samplers.rows), pages, step.tiles.count)


def view_block(
    block: Tensor,
    layout: BlockLayout,
    page_sizes: Sequence[int],
    rows_descending: Int64,
    max_drafts: int,
    made: Sequence[Tensor] | None = None,
) -> StepTensors:
    """The parts of a block on the device, with room for what the kernels make of them: its own, or `made`."""
    sizes = layout.sizes
    parts = {name: block[first : first + count] for name, (first, count) in layout.parts.items()}
    counts = [sizes.rows] * (2 + len(page_sizes)) + [sizes.requests] * (1 + len(page_sizes))
    room = made or room_to_make(block, sizes, len(page_sizes))
    tokens, positions, *rest = (part[:count] for part, count in zip(room, counts, strict=True))
    slots, (shift, *columns) = rest[: len(page_sizes)], rest[len(page_sizes) :]
    groups = tuple(
        GroupTensors(
            size, parts[f"page_indptr{g}"], parts[f"pages{g}"], parts[f"holes{g}"], slots[g], columns[g]
        )
        for g, size in enumerate(page_sizes)
    )
    return StepTensors(
        sizes, parts, groups, tokens, positions, shift, rows_descending, max_drafts, sizes.tiles
    )


def room_to_make(block: Tensor, sizes: Sizes, groups: int) -> tuple[Tensor, ...]:
    """Tokens, positions, the slots of each group, the shift, the columns of each group."""
    wide = [_aligned(sizes.rows)] * (2 + groups) + [_aligned(sizes.requests)] * (1 + groups)
    room: tuple[Tensor, ...] = block.new_empty(sum(wide)).split(wide)
    return room


def pack(step: HostStep, layout: BlockLayout, base: int, scratch_pages: Sequence[int]) -> Int32:
    """The words of a block, up to the last one in use."""
    words = np.zeros(layout.words, np.int32)
    return words[: _BlockWords(layout, words).fill(step, base, scratch_pages)]


class BlockPacker:
    """Puts the blocks of one layout together, each in the room it is given."""

    def __init__(self, layout: BlockLayout, scratch_pages: Sequence[int]) -> None:
        self._layout, self._scratch_pages = layout, scratch_pages
        self._known: dict[Room, _BlockWords] = {}

    def pack(self, step: HostStep, base: int, room: Room) -> int:
        """How many words are in use. Of what this layout left in the room, only what is new is written."""
        words = self._known.get(room)
        if words is None:
            words = self._known[room] = _BlockWords(self._layout, room.words)
        if room.written is not words:
            words.clear()
            room.written = words
        return words.fill(step, base, self._scratch_pages)


class _Part:
    """A part of a block, and what was put there last: a step that brings the same need not write it again."""

    __slots__ = ("_array", "_padding", "_used", "words")

    def __init__(self, words: NDArray[Any]) -> None:
        self.words = words
        self.forget()

    def forget(self) -> None:
        """Somebody else has written there."""
        self._array: object = None  # nobody writes to it
        self._used, self._padding = -1, 0.0

    def put(self, values: NDArray[np.generic], padding: float) -> None:
        if values is self._array and padding == self._padding:
            return
        used = len(values)
        self.words[:used] = values
        if used != self._used or padding != self._padding:
            self.words[used:] = padding
        self._held(values, used, padding)

    def count_up(self, values: NDArray[np.generic], repeated: int = 1, by: int = 1) -> None:
        """Values that go on counting where they are padded, each so often."""
        if values is self._array:
            return
        used = len(values)
        self.words[:used] = values
        if used < len(self.words):
            last = int(values[-1]) if used else -by
            np.add(_steps(len(self.words) - used, repeated, by), np.int32(last), out=self.words[used:])
        self._held(values, -1, by)

    def put_pages(self, pages: Int32, scratch: int, idle: int) -> int:
        """Pages, and behind them so often the scratch page; how many words that makes."""
        used = len(pages) + idle
        if pages is not self._array or used != self._used:
            self.words[: len(pages)] = pages
            self.words[len(pages) : used] = scratch
            self._held(pages, used, scratch)
        return used

    def _held(self, values: NDArray[np.generic], used: int, padding: float) -> None:
        self._array = None if values.flags.writeable else values
        self._used, self._padding = used, padding


class _BlockWords:
    """The words of one block."""

    def __init__(self, layout: BlockLayout, words: Int32) -> None:
        self.sizes = layout.sizes
        self._head = words[: layout.parts["pages0"][0]]
        self.parts = {
            name: _Part(words[first : first + count].view(OTHER_DTYPES.get(name, np.int32)))
            for name, (first, count) in layout.parts.items()
        }
        self._ends = {name: first for name, (first, _) in layout.parts.items()}
        self._shape: OneRowEach | None = None  # of the step that was put in last, if it was a plain one

    def clear(self) -> None:
        """Somebody else has written into the words."""
        self._head[:] = 0  # parts may be shorter than their room
        self._shape = None
        for part in self.parts.values():
            part.forget()

    def fill(self, step: HostStep, base: int, scratch_pages: Sequence[int]) -> int:
        """The first word behind what is in use."""
        self.parts["base"].words[0] = base
        shape = one_row_each(len(step.counts)) if step.is_plain else None
        if shape is None or shape is not self._shape:
            _pack_shape(self, step)
            self._shape = shape
        _pack_rows(self, step)
        _pack_requests(self, step)
        _pack_samplers(self, step)
        if self.sizes.work is not None:
            self.put("asked", asked_rows(step), 0)
            _pack_work(self, plan_step(step, self.sizes.work))
        used = 0
        for group, (table, scratch) in enumerate(zip(step.groups, scratch_pages, strict=True)):
            name = f"pages{group}"
            used = self._ends[name] + _pack_group(self, group, table, scratch, len(step.row_request))
        return used

    def put(self, name: str, values: NDArray[np.generic], padding: float) -> None:
        self.parts[name].put(values, padding)

    def put_owners(self, name: str, requests: Int64, real: int) -> None:
        """Requests of rows or samplers; those left over belong to requests behind the real ones."""
        if self.sizes.rows_each:
            self.parts[name].count_up(requests, repeated=self.sizes.rows_each)
        else:
            self.parts[name].put(requests, real)


@lru_cache(maxsize=1024)
def _steps(count: int, repeated: int, by: int) -> Int32:
    """1, 2, 3 … times `by`, each so often."""
    steps: Int32 = (by * (1 + np.arange(count, dtype=np.int32) // repeated)).astype(np.int32)
    return steps


def _pack_shape(words: _BlockWords, step: HostStep) -> None:
    """What all plain steps of so many requests have in common."""
    requests = len(step.counts)
    words.put_owners("row_request", step.row_request, requests)
    words.put("drafts", step.batch.num_drafts, 0)
    if words.sizes.rows_each:
        words.parts["row_indptr"].count_up(step.batch.indptr, by=words.sizes.rows_each)
    else:
        words.put("row_indptr", step.batch.indptr, words.sizes.rows)
    words.put("by_rows", np.argsort(-step.counts, kind="stable"), 0)
    words.parts["sampler_row"].count_up(step.batch.samplers.rows)
    words.put_owners("sampler_request", step.sampler_requests, requests)


def _pack_rows(words: _BlockWords, step: HostStep) -> None:
    parts = words.parts
    parts["token"].put(step.tokens.literal, 0)
    parts["token_source"].put(step.tokens.source, NOWHERE)
    parts["token_dependency"].put(step.tokens.dependency, NOWHERE)
    parts["position"].put(step.positions, 0)
    parts["first_sampler"].put(_first_samplers(step), NOWHERE)


def _first_samplers(step: HostStep) -> Int32:
    """[T] of each row, NOWHERE where it has none."""
    samplers = step.batch.samplers
    if step.is_plain and not np.count_nonzero(samplers.slot):
        return one_row_each(len(step.counts)).rows
    first = np.full(len(step.row_request), NOWHERE, np.int32)
    leading = np.flatnonzero(samplers.slot == 0)
    first[samplers.rows[leading]] = leading
    return first


def _pack_requests(words: _BlockWords, step: HostStep) -> None:
    parts = words.parts
    parts["length"].put(step.lengths, 0)
    parts["length_source"].put(step.length_source, NOWHERE)
    parts["length_dependency"].put(step.length_dependency, NOWHERE)
    parts["fail"].put(step.fail, int(Failure.REFUSED))
    parts["shared"].put(step.tiles.columns, 0)
    parts["tile_first"].put(step.tiles.first, 0)
    parts["tile_stop"].put(step.tiles.stop, 0)


def _pack_samplers(words: _BlockWords, step: HostStep) -> None:
    parts = words.parts
    samplers = step.batch.samplers
    parts["temperature"].put(samplers.temperature, 0)
    parts["top_k"].put(samplers.top_k, 0)
    parts["top_p"].put(samplers.top_p, 1)
    parts["min_p"].put(samplers.min_p, 0)
    stream = samplers.stream.astype("<u8", copy=False).view(np.uint32)
    parts["stream_low"].put(stream[::2], 0)
    parts["stream_high"].put(stream[1::2], 0)
    parts["index"].put(samplers.index, 0)
    parts["slot"].put(samplers.slot, 0)
    parts["epoch"].put(samplers.epoch, 0)


def asked_rows(step: HostStep) -> Int64:
    """The row of every sampler, then those that only probes look at."""
    sampled, probed = step.batch.samplers.rows, step.batch.probes.rows
    if not len(probed):
        return sampled.astype(np.int64)
    return np.concatenate([sampled, np.setdiff1d(probed, sampled)]).astype(np.int64)


def plan_step(step: HostStep, room: WorkRoom) -> WorkList:
    """One list for all groups: those with holes have fewer columns than it is cut for."""
    return plan_work(step.counts, step.lengths + step.counts, step.batch.indptr, room)


def _pack_work(words: _BlockWords, work: WorkList) -> None:
    for name, attribute in ITEM_PARTS.items():
        words.put(name, getattr(work, attribute), UNUSED)
    for name in MERGED_PARTS:
        words.put(name, getattr(work, name), UNUSED)


def _pack_group(words: _BlockWords, group: int, table: GroupTable, scratch: int, rows: int) -> int:
    """How many of its pages are in use."""
    sizes, requests = words.sizes, len(table.holes)
    if not sizes.rows_each and requests < sizes.requests:  # its rows have no columns: all go to one slot
        words.put(f"holes{group}", np.append(table.holes, sizes.rows - rows), 0)
    else:
        words.put(f"holes{group}", table.holes, 0)
    idle_pages = sizes.idle_pages[group] if sizes.idle_pages else 1
    words.parts[f"page_indptr{group}"].count_up(table.indptr, by=idle_pages)
    idle = idle_pages * (sizes.requests - requests)
    return words.parts[f"pages{group}"].put_pages(table.pages, scratch, idle)
