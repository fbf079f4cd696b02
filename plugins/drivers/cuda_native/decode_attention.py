"""Decode attention by `triton_decode`: lists the tiles of a step, and cuts them over as many programs as the GPU holds.

Requests of one row each, or of equally few (drafts to verify), take this way. Masks, shared prefixes and the
batch-invariant mode, where a request must be cut the same way whatever runs beside it, take the general kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from pie_plugins.drivers.cuda_native.step_tensors import GroupTensors, StepTensors
from pie_plugins.drivers.cuda_native.triton_decode import decode_kernel, list_tiles_kernel
from pie_plugins.drivers.cuda_native.triton_launches import gpu_of, launch, overlapping

ROWS = 16  # of a tile, the least that a matrix instruction takes: rows of a request times heads of a group
ENTRY = 8  # words of an entry before its pages
HEADER = 16
MOST_ROW_BYTES = 512  # of one head: of more, the tiles under way do not fit a multiprocessor's memory
COUNTERS = 4096  # two for every program
LISTED_AT_ONCE = 16  # tiles
SHARES = 64  # programs that list tiles, where requests are few
PROCESSORS_OF_TESTS = 3  # few, so that requests are split everywhere


@dataclass(frozen=True, slots=True)
class DecodeTiling:
    columns: int
    warps: int
    stages: int
    programs: int  # on each multiprocessor


ALONE = DecodeTiling(64, warps=4, stages=2, programs=3)
FEW = DecodeTiling(64, warps=4, stages=3, programs=2)
MANY = DecodeTiling(32, warps=2, stages=3, programs=4)
MOST_FEW = 32  # requests


class DecodeAttention:
    """Owns the lists, one for each cache group. Steps run one after the other, so they share the memory."""

    def __init__(self) -> None:
        self._lists: dict[int, Tensor] = {}
        self._outgrown: list[Tensor] = []  # recorded graphs still write there
        self.tiling: DecodeTiling | None = None  # in place of what suits the number of requests, from now on

    def list_tiles(self, step: StepTensors) -> None:
        """Queued once a step, before the layers. Groups that are masked or that this way does not suit get no list."""
        for place, group in enumerate(step.groups):
            group.work = None
            if step.rows_decoded and not step.tiles and _fits(group.page_size, self._tiling(step).columns):
                group.work = self._listed(place, group, step)

    def takes(self, q: Tensor, pages: Tensor, group: GroupTensors, step: StepTensors) -> bool:
        row_bytes = triton.next_power_of_2(q.shape[2]) * q.itemsize
        if group.work is None or group.masks is not None or row_bytes > MOST_ROW_BYTES:
            return False
        group_size = q.shape[1] // pages.shape[2]
        return step.rows_decoded == 1 or step.rows_decoded * group_size <= ROWS

    def attend(
        self, q: Tensor, pages: Tensor, group: GroupTensors, step: StepTensors, scale: float, out: Tensor
    ) -> None:
        """`scale` is of powers of two."""
        assert group.work is not None
        tiling = self._tiling(step)
        kv_heads, dim = pages.shape[2], q.shape[2]
        group_size, dims = q.shape[1] // kv_heads, triton.next_power_of_2(dim)
        members = triton.next_power_of_2(group_size)
        rows, num_pages = max(ROWS, members), _pages(group.page_size, tiling.columns)
        programs = max(kv_heads, min(processors(q.device) * tiling.programs, COUNTERS // 2))
        partial = q.new_empty(2 * programs * rows * (dims + 2), dtype=torch.float32)
        launch(
            decode_kernel,
            (programs,),
            q,
            q.stride(0),
            pages,
            group.work,
            out,
            *partial.split([2 * programs * rows * size for size in (dims, 1, 1)]),
            scale,
            kv_heads,
            GROUP=group_size,
            DIM=dim,
            DIMS=dims,
            PAGE=group.page_size,
            PAGES=num_pages,
            ROWS=rows,
            COLUMNS=tiling.columns,
            WORDS=triton.next_power_of_2(ENTRY + num_pages),
            HEADER=HEADER,
            COUNTERS=COUNTERS,
            MEMBERS=members,
            PARTS=max(1, 16 * tiling.warps // members),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **overlapping(q.device),
        )

    def _tiling(self, step: StepTensors) -> DecodeTiling:
        """By whole steps, not by attention alone: a request by itself leaves room for the weights of the product behind
        it; up to 32 have each a program of its own for every key head; of more, small tiles cut more evenly."""
        requests = step.sizes.requests
        return self.tiling or (ALONE if requests == 1 else FEW if requests <= MOST_FEW else MANY)

    def _listed(self, place: int, group: GroupTensors, step: StepTensors) -> Tensor:
        columns = self._tiling(step).columns
        num_pages, requests = _pages(group.page_size, columns), step.sizes.requests
        words = triton.next_power_of_2(ENTRY + num_pages)
        tiles = len(group.pages) * group.page_size // columns + requests
        work = self._room(place, HEADER + COUNTERS + tiles * words, group.pages.device)
        launch(
            list_tiles_kernel,
            (requests, max(1, SHARES // requests)),
            group.columns,
            step.row_indptr,
            group.page_indptr,
            group.pages,
            work,
            requests,
            step.rows_decoded,
            COUNTERS=COUNTERS,
            PAGE=group.page_size,
            PAGES=num_pages,
            COLUMNS=columns,
            WORDS=words,
            HEADER=HEADER,
            TILES=LISTED_AT_ONCE,
            REQUESTS=256,
        )
        return work

    def _room(self, place: int, words: int, device: torch.device) -> Tensor:
        known = self._lists.get(place)
        if known is not None and len(known) >= words:
            return known
        if known is not None:
            self._outgrown.append(known)
        self._lists[place] = torch.empty(words, dtype=torch.int32, device=device)
        return self._lists[place]


def _pages(page_size: int, columns: int) -> int:
    """Of one tile."""
    return max(1, columns // page_size)


def _fits(page_size: int, columns: int) -> bool:
    """Whether tiles begin and end where pages do, or pages where tiles do."""
    return columns % page_size == 0 or page_size % columns == 0


def processors(device: torch.device) -> int:
    """Multiprocessors."""
    return _processors(gpu_of(device))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_OF_TESTS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
