"""Launches attention by a list of work: every row of a mixed step, whatever is in it, in two launches of fixed size."""

from __future__ import annotations

import triton
from torch import Tensor, float32

from pie_plugins.drivers.cuda_native.step_tensors import GroupTensors, StepTensors
from pie_plugins.drivers.cuda_native.triton_launches import launch, overlapping
from pie_plugins.drivers.cuda_native.triton_work import attend_items_kernel, merge_items_kernel

LOG2_E = 1.4426950408889634
MERGED_HEADS = 16
COLUMNS, STAGES = 64, 2
EXACT_COLUMNS = 16  # in float32, which no tensor core multiplies: more do not fit into the registers


def attend_listed(q: Tensor, pages: Tensor, group: GroupTensors, step: StepTensors, scale: float) -> Tensor:
    """[T, H * D]. Rows of no item stay as they are found."""
    (tokens, heads, dim), kv_heads = q.shape, pages.shape[2]
    room = step.sizes.work
    assert room is not None
    group_size, dims = heads // kv_heads, triton.next_power_of_2(dim)
    out = q.new_empty((tokens, heads * dim))
    sizes = [room.slots * heads * size for size in (dim, 1, 1)]
    parts = q.new_empty(sum(sizes), dtype=float32).split(sizes)
    is_exact = q.dtype == float32
    rows = max(16, triton.next_power_of_2(room.tile_rows * group_size))
    launch(
        attend_items_kernel,
        (kv_heads, room.items),
        q,
        q.stride(0),
        pages,
        group.page_indptr,
        group.pages,
        group.columns,
        step.row_indptr,
        step.item_request,
        step.item_row,
        step.item_part,
        step.item_parts,
        step.item_slot,
        out,
        *parts,
        scale * LOG2_E,
        kv_heads,
        room.tile_rows,
        GROUP=group_size,
        DIM=dim,
        DIMS=dims,
        PAGE=pages.shape[3],
        ROWS=rows,
        COLUMNS=EXACT_COLUMNS if is_exact else COLUMNS,
        PRECISION="ieee" if is_exact else "tf32",
        **overlapping(q.device),
        num_warps=8 if rows > 64 else 4,
        num_stages=STAGES,
    )
    launch(
        merge_items_kernel,
        (room.merged, triton.cdiv(heads, MERGED_HEADS)),
        *parts,
        step.merged_row,
        step.merged_slot,
        step.merged_parts,
        out,
        heads,
        DIM=dim,
        DIMS=dims,
        HEADS=MERGED_HEADS,
        **overlapping(q.device),
    )
    return out
