"""One step on the device: every number the kernels read lies in one block of int32 words, sent by one copy.

A `BlockLayout` says where each part lies. Eager steps have a layout of their own size; a CUDA graph has one of its
bucket's size, and what the step does not fill is padded: with requests of a few rows that live on the scratch page, or,
where rows are counted for themselves, with one request that takes all rows left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import Int32, Int64
from pie_plugins.drivers.cuda_native.attention_work import UNUSED, WorkList, WorkRoom, plan_work
from pie_plugins.drivers.cuda_native.batch_tensors import GroupTable, HostStep
from pie_plugins.drivers.cuda_native.outcomes import NOWHERE, Failure

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


def pack(
    step: HostStep, layout: BlockLayout, base: int, scratch_pages: Sequence[int], words: Int32 | None = None
) -> Int32:
    """The words of a block, up to the last one in use; in new memory, or in `words`, whatever stood there."""
    words = np.zeros(layout.words, np.int32) if words is None else words
    words[: layout.parts["pages0"][0]] = 0  # parts may be shorter than their room
    packer = _Packer(words, layout)
    packer.put("base", np.array([base]), 0)
    _pack_rows(packer, step)
    _pack_requests(packer, step)
    _pack_samplers(packer, step)
    if layout.sizes.work is not None:
        packer.put("asked", asked_rows(step), 0)
        _pack_work(packer, plan_step(step, layout.sizes.work))
    used = layout.words
    for group, (table, scratch) in enumerate(zip(step.groups, scratch_pages, strict=True)):
        used = _pack_group(packer, group, table, scratch, len(step.row_request))
    return words[:used]


class _Packer:
    def __init__(self, words: Int32, layout: BlockLayout) -> None:
        self.words, self.layout = words, layout

    def put(self, name: str, values: NDArray[np.generic], padding: int) -> None:
        first, count = self.layout.parts[name]
        used = len(values)
        part = self.words[first : first + count]
        part[:used] = values if values.dtype.kind == "i" else values.view(np.int32)
        part[used:] = padding

    def count_up(self, name: str, values: NDArray[np.generic], repeated: int = 1, by: int = 1) -> None:
        """Values that go on counting where they are padded, each so often."""
        first, count = self.layout.parts[name]
        part = self.words[first : first + count]
        part[: len(values)] = values
        last = int(values[-1]) if len(values) else -by
        part[len(values) :] = last + by * (1 + np.arange(count - len(values)) // repeated)

    def put_owners(self, name: str, requests: Int64, real: int) -> None:
        """Requests of rows or samplers; those left over belong to requests behind the real ones."""
        if self.layout.sizes.rows_each:
            self.count_up(name, requests, repeated=self.layout.sizes.rows_each)
        else:
            self.put(name, requests, real)


def _pack_rows(packer: _Packer, step: HostStep) -> None:
    packer.put("token", step.tokens.literal, 0)
    packer.put("token_source", step.tokens.source, NOWHERE)
    packer.put("token_dependency", step.tokens.dependency, NOWHERE)
    packer.put("position", step.positions, 0)
    packer.put_owners("row_request", step.row_request, len(step.counts))
    first = np.full(len(step.row_request), NOWHERE, np.int32)
    samplers = step.batch.samplers
    leading = np.flatnonzero(samplers.slot == 0)
    first[samplers.rows[leading]] = leading
    packer.put("first_sampler", first, NOWHERE)


def _pack_requests(packer: _Packer, step: HostStep) -> None:
    packer.put("length", step.lengths, 0)
    packer.put("length_source", step.length_source, NOWHERE)
    packer.put("length_dependency", step.length_dependency, NOWHERE)
    packer.put("fail", step.fail, int(Failure.REFUSED))
    packer.put("drafts", step.batch.num_drafts, 0)
    sizes = packer.layout.sizes
    if sizes.rows_each:
        packer.count_up("row_indptr", step.batch.indptr, by=sizes.rows_each)
    else:
        packer.put("row_indptr", step.batch.indptr, sizes.rows)
    packer.put("by_rows", np.argsort(-step.counts, kind="stable"), 0)
    packer.put("shared", step.tiles.columns, 0)
    packer.put("tile_first", step.tiles.first, 0)
    packer.put("tile_stop", step.tiles.stop, 0)


def _pack_samplers(packer: _Packer, step: HostStep) -> None:
    samplers = step.batch.samplers
    packer.count_up("sampler_row", samplers.rows)
    packer.put_owners("sampler_request", step.sampler_requests, len(step.counts))
    packer.put("temperature", samplers.temperature, 0)
    packer.put("top_k", samplers.top_k, 0)
    packer.put("top_p", samplers.top_p, _ONE)
    packer.put("min_p", samplers.min_p, 0)
    stream = samplers.stream.astype("<u8").view(np.uint32).reshape(-1, 2)
    packer.put("stream_low", np.ascontiguousarray(stream[:, 0]), 0)
    packer.put("stream_high", np.ascontiguousarray(stream[:, 1]), 0)
    packer.put("index", samplers.index, 0)
    packer.put("slot", samplers.slot, 0)
    packer.put("epoch", samplers.epoch, 0)


def asked_rows(step: HostStep) -> Int64:
    """The row of every sampler, then those that only probes look at."""
    sampled, probed = step.batch.samplers.rows, step.batch.probes.rows
    if not len(probed):
        return sampled.astype(np.int64)
    return np.concatenate([sampled, np.setdiff1d(probed, sampled)]).astype(np.int64)


def plan_step(step: HostStep, room: WorkRoom) -> WorkList:
    """One list for all groups: those with holes have fewer columns than it is cut for."""
    return plan_work(step.counts, step.lengths + step.counts, step.batch.indptr, room)


def _pack_work(packer: _Packer, work: WorkList) -> None:
    for name, attribute in ITEM_PARTS.items():
        packer.put(name, getattr(work, attribute), UNUSED)
    for name in MERGED_PARTS:
        packer.put(name, getattr(work, name), UNUSED)


_ONE = int(np.float32(1.0).view(np.int32))


def _pack_group(packer: _Packer, group: int, table: GroupTable, scratch: int, rows: int) -> int:
    """The first word behind what is in use."""
    packer.put(f"holes{group}", table.holes, 0)
    sizes, requests = packer.layout.sizes, len(table.holes)
    if not sizes.rows_each and requests < sizes.requests:  # its rows have no columns: all go to one slot
        first, _ = packer.layout.parts[f"holes{group}"]
        packer.words[first + requests] = sizes.rows - rows
    idle_pages = sizes.idle_pages[group] if sizes.idle_pages else 1
    packer.count_up(f"page_indptr{group}", table.indptr, by=idle_pages)
    first, _ = packer.layout.parts[f"pages{group}"]
    padded = idle_pages * (sizes.requests - len(table.holes))
    end = first + len(table.pages)
    packer.words[first:end] = table.pages
    packer.words[end : end + padded] = scratch
    return end + padded
