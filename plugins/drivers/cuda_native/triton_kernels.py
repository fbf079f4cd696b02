"""The operations of a step in Triton: what `torch_kernels` says, in few launches and without a look at the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from pie_plugins.drivers.cuda_native.decode_attention import DecodeAttention
from pie_plugins.drivers.cuda_native.fused_sampling import FusedSampler
from pie_plugins.drivers.cuda_native.kernels import Angles, written_heads
from pie_plugins.drivers.cuda_native.listed_attention import attend_listed
from pie_plugins.drivers.cuda_native.outcomes import Failure, RingLayout
from pie_plugins.drivers.cuda_native.shared_prefixes import REQUESTS_EACH
from pie_plugins.drivers.cuda_native.step_tensors import GroupTensors, MaskTensors, StepTensors
from pie_plugins.drivers.cuda_native.torch_kernels import TorchKernels
from pie_plugins.drivers.cuda_native.triton_attention import attend_kernel, merge_kernel
from pie_plugins.drivers.cuda_native.triton_groups import grouped_kernel
from pie_plugins.drivers.cuda_native.triton_launches import gpu_of, launch, overlapping
from pie_plugins.drivers.cuda_native.triton_layers import (
    add_rms_norm_kernel,
    place_heads_kernel,
    rms_norm_kernel,
    silu_mul_kernel,
)
from pie_plugins.drivers.cuda_native.triton_steps import prepare_kernel, settle_kernel
from pie_plugins.models.layers.step import AttentionHeads

LOG2_E = 1.4426950408889634
LANES = 256  # rows or requests of one program around the layers
HEADS = 8  # of one program that places heads
ACTIVATION_BLOCK = 1024
GROUP_ROWS, GROUP_OUTPUTS, GROUP_INPUTS = 32, 64, 64  # of one program of grouped products
LIBRARY_GROUPS_ON = (9, 10)  # major compute capabilities
SHORTEST_SPAN = 256  # columns below which splitting costs more than it gains
INVARIANT_SPLITS = 16
INVARIANT_SPAN = 512  # longer: a merge costs a full batch more than it gains one request
MOST_SPLITS = 64
PROGRAMS_WANTED = 528  # four for each multiprocessor of an H100 or H200


@dataclass(frozen=True, slots=True)
class Tiling:
    """How attention is cut into programs."""

    rows: int
    columns: int
    splits: int  # parts of a request's columns, at most
    warps: int
    stages: int
    shortest: int = SHORTEST_SPAN  # columns of a part, at least
    programs: int | None = None  # that take the parts in turn; None: one for each


class TritonKernels:
    """See `kernels.Kernels`. Batch-invariant: how a request is cut depends on nothing but itself."""

    name = "triton"
    waits = False

    def __init__(self, layout: RingLayout, batch_invariant: bool = False) -> None:
        self._layout = layout
        self._batch_invariant = batch_invariant
        self.decode = None if batch_invariant else DecodeAttention()
        self._plain = TorchKernels(layout)  # for heads that turn in part or not at all
        self._sampler = FusedSampler(layout)

    def prepare(self, step: StepTensors, ring: Tensor, vocab_size: int) -> None:
        sizes = step.sizes
        programs = triton.cdiv(max(sizes.rows, sizes.requests), LANES)
        for place, group in enumerate(step.groups):
            launch(
                prepare_kernel,
                (programs,),
                ring,
                step.token,
                step.token_source,
                step.token_dependency,
                step.position,
                step.row_request,
                step.length,
                step.length_source,
                step.length_dependency,
                step.row_indptr,
                step.fail,
                group.holes,
                group.page_indptr,
                group.pages,
                step.tokens,
                step.positions,
                step.shift,
                group.columns,
                group.slots,
                sizes.rows,
                sizes.requests,
                len(group.pages),
                vocab_size,
                PAGE=group.page_size,
                DEPENDENCY=int(Failure.DEPENDENCY),
                FIRST=place == 0,
                BLOCK=LANES,
            )
        if self.decode is not None:
            self.decode.list_tiles(step)

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return table.index_select(0, tokens)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if weight.dim() != 1 or not x.is_contiguous():
            return self._plain.rms_norm(x, weight, eps)
        out = x.new_empty(x.shape)
        columns = x.shape[-1]
        if len(x):
            launch(
                rms_norm_kernel,
                (x.numel() // columns,),
                x,
                weight,
                out,
                columns,
                eps,
                BLOCK=triton.next_power_of_2(columns),
                num_warps=_warps(columns),
                **overlapping(x.device),
            )
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = x.new_empty(x.shape)
        columns = x.shape[-1]
        launch(
            add_rms_norm_kernel,
            (len(x),),
            x,
            delta,
            weight,
            out,
            columns,
            eps,
            BLOCK=triton.next_power_of_2(columns),
            num_warps=_warps(columns),
            **overlapping(x.device),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        columns = gate_up.shape[1] // 2
        out = gate_up.new_empty((len(gate_up), columns))
        grid = (len(gate_up), triton.cdiv(columns, ACTIVATION_BLOCK))
        launch(
            silu_mul_kernel, grid, gate_up, out, columns, BLOCK=ACTIVATION_BLOCK, **overlapping(out.device)
        )
        return out

    def grouped(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        count, outputs, inputs = matrices.shape
        if not self._batch_invariant and _library_groups(x, outputs):
            return self._plain.grouped(x, matrices, ends)
        out = x.new_empty((len(x), outputs))
        tiles = min(len(x), triton.cdiv(len(x), GROUP_ROWS) + count)
        if tiles:
            launch(
                grouped_kernel,
                (triton.cdiv(outputs, GROUP_OUTPUTS), tiles),
                x.contiguous(),
                matrices,
                ends,
                out,
                count,
                outputs,
                inputs,
                MATRICES=triton.next_power_of_2(count),
                ROWS=GROUP_ROWS,
                OUTPUTS=GROUP_OUTPUTS,
                INPUTS=GROUP_INPUTS,
                PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
                **overlapping(x.device),
            )
        return out

    def place_heads(
        self,
        qkv: Tensor,
        heads: AttentionHeads,
        angles: Angles | None,
        positions: Tensor,
        slots: Tensor,
        pages: Tensor,
    ) -> Tensor:
        if angles is None or 2 * angles.cos.shape[1] != heads.head_dim:
            return self._plain.place_heads(qkv, heads, angles, positions, slots, pages)
        kv_heads = written_heads(heads)
        total = heads.num_heads + 2 * kv_heads
        launch(
            place_heads_kernel,
            (len(qkv), triton.cdiv(total, HEADS)),
            qkv,
            qkv if heads.norm is None else heads.norm,
            angles.cos,
            angles.sin,
            positions,
            slots,
            pages,
            heads.norm_eps,
            heads.num_heads,
            kv_heads,
            PAGE=pages.shape[3],
            DIM=heads.head_dim,
            HALF=triton.next_power_of_2(heads.head_dim // 2),
            HEADS=HEADS,
            NORMED=heads.norm is not None,
            **overlapping(qkv.device),
        )
        return qkv.view(len(qkv), total, heads.head_dim)[:, : heads.num_heads]

    def attend(
        self, q: Tensor, pages: Tensor, group: GroupTensors, step: StepTensors, scale: float
    ) -> Tensor:
        if step.sizes.work is not None:
            return attend_listed(q, pages, group, step, scale)
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        call = _Attending(q, pages, group, step, scale, out)
        decode = self.decode if self.decode is not None and self.decode.takes(q, pages, group, step) else None
        narrow_rows = self._narrow_rows(call) if decode is None else step.rows_decoded
        wide = step.wide_requests(narrow_rows)
        if len(wide):
            call.run_wide(self._wide_tiling(call), wide, narrow_rows)
        if len(wide) < step.sizes.requests:
            if decode is not None:
                decode.attend(q, pages, group, step, scale * LOG2_E, out)
            else:
                tiling = self._narrow_tiling(call, step)
                tiles = self._tile_tiling(call, tiling) if step.tiles else None
                call.run_narrow(tiling, tiles, narrow_rows)
        return out

    def _narrow_rows(self, call: _Attending) -> int:
        return 1 if self._batch_invariant else max(1, 16 // call.group_size)

    def _narrow_tiling(self, call: _Attending, step: StepTensors) -> Tiling:
        rows = max(16, triton.next_power_of_2(call.group_size))
        wanted = triton.cdiv(PROGRAMS_WANTED, step.sizes.requests * call.kv_heads)
        if self._batch_invariant:
            programs = min(INVARIANT_SPLITS, wanted)
            return Tiling(rows, 64, INVARIANT_SPLITS, 4, 3, INVARIANT_SPAN, programs)
        splits = min(MOST_SPLITS, max(4, triton.next_power_of_2(wanted)))
        return Tiling(rows, 64, splits, warps=4, stages=3)

    def _tile_tiling(self, call: _Attending, narrow: Tiling) -> Tiling:
        """Shared columns are cut into as many parts as the others: the merge takes them side by side."""
        rows = max(16, triton.next_power_of_2(REQUESTS_EACH * call.group_size))
        return Tiling(rows, 64, narrow.splits, warps=8 if rows > 64 else 4, stages=2)

    def _wide_tiling(self, call: _Attending) -> Tiling:
        wide_rows = call.dim <= 128
        return Tiling(128 if wide_rows else 64, 64, 1, warps=8 if wide_rows else 4, stages=2)

    def sample(self, logits: Tensor, step: StepTensors) -> Tensor:
        return self._sampler.draw(logits, step)

    def settle(self, step: StepTensors, sampled: Tensor, ring: Tensor) -> None:
        sizes, layout = step.sizes, self._layout
        launch(
            settle_kernel,
            (triton.cdiv(max(sizes.requests, len(sampled)), LANES),),
            ring,
            step.base,
            step.fail,
            step.length,
            step.shift,
            step.drafts,
            step.row_indptr,
            step.first_sampler,
            step.tokens,
            sampled,
            step.sampler_row,
            step.sampler_request,
            sizes.requests,
            len(sampled),
            step.max_drafts,
            layout.accepted,
            layout.last,
            layout.length,
            layout.tokens,
            layout.live,
            BLOCK=LANES,
        )


@dataclass(frozen=True, slots=True)
class _Launch:
    """Which requests a launch of the attention kernel is for, or which tiles of them."""

    requests: int
    tiles: int  # of rows, for each request
    listed: Tensor
    narrow: bool
    cascades: bool = False  # from behind the shared columns on
    is_prefix: bool = False  # only the shared columns


class _Attending:
    """One layer's attention: what its launches have in common."""

    def __init__(
        self, q: Tensor, pages: Tensor, group: GroupTensors, step: StepTensors, scale: float, out: Tensor
    ) -> None:
        self.kv_heads, self.page_size, self.dim = pages.shape[2], pages.shape[3], q.shape[2]
        self.group_size = q.shape[1] // self.kv_heads
        self._q, self._pages, self._group, self._step = q, pages, group, step
        self._scale, self._out = scale * LOG2_E, out

    def run_narrow(self, tiling: Tiling, shared: Tiling | None, narrow_rows: int) -> None:
        """Requests of few rows; their columns are split. `shared`: what tiles of them read together comes first."""
        rows, heads = self._q.shape[:2]
        num_parts = tiling.splits if shared is None else 2 * tiling.splits
        partial = self._q.new_empty(rows * heads * num_parts * (self.dim + 2), dtype=torch.float32)
        parts = partial.split([rows * heads * num_parts * size for size in (self.dim, 1, 1)])
        everybody = _Launch(self._step.sizes.requests, 1, self._step.row_indptr, narrow=True)
        if shared is not None:
            tiles = _Launch(self._step.tiles, 1, self._step.tile_first, narrow=False, is_prefix=True)
            self._launch(shared, tiles, parts, narrow_rows)
            everybody = replace(everybody, cascades=True)
        self._launch(tiling, everybody, parts, narrow_rows)
        wide = len(self._step.wide_requests(narrow_rows))
        rows_each = int(self._step.rows_descending[wide])
        launch(
            merge_kernel,
            ((self._step.sizes.requests - wide) * rows_each, heads),
            *parts,
            self._group.columns,
            self._step.shared,
            self._step.row_indptr,
            self._step.by_rows,
            self._out,
            heads,
            wide,
            rows_each,
            GROUP=self.group_size,
            DIM=self.dim,
            DIMS=triton.next_power_of_2(self.dim),
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            SPLITS=tiling.splits,
            PARTS=num_parts,
            SHORTEST=tiling.shortest,
            MASKED=self._group.masks is not None,
            **overlapping(self._q.device),
        )

    def run_wide(self, tiling: Tiling, requests: Tensor, narrow_rows: int) -> None:
        """The listed requests, in tiles of rows."""
        tiles = triton.cdiv(self._step.max_rows * self.group_size, tiling.rows)
        unused = (self._out, self._out, self._out)
        self._launch(tiling, _Launch(len(requests), tiles, requests, narrow=False), unused, narrow_rows)

    def _launch(self, tiling: Tiling, part: _Launch, parts: tuple[Tensor, ...], narrow_rows: int) -> None:
        group, step, listed = self._group, self._step, part.listed
        masks = group.masks or MaskTensors(listed, listed, listed[None])
        launch(
            attend_kernel,
            (part.requests * part.tiles, self.kv_heads, tiling.programs or tiling.splits),
            self._q,
            self._q.stride(0),
            self._pages,
            group.page_indptr,
            group.pages,
            group.columns,
            step.row_indptr,
            listed,
            step.tile_stop,
            step.shared,
            self._out,
            *parts,
            masks.index,
            masks.causal,
            masks.words,
            masks.words.shape[1],
            self._scale,
            self.kv_heads,
            part.tiles,
            narrow_rows,
            tiling.splits,
            GROUP=self.group_size,
            DIM=self.dim,
            DIMS=triton.next_power_of_2(self.dim),
            PAGE=self.page_size,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            SHORTEST=tiling.shortest,
            NARROW=part.narrow,
            MASKED=group.masks is not None,
            CASCADE=part.cascades,
            PREFIX=part.is_prefix,
            TURNS=tiling.programs is not None,
            PRECISION="ieee" if self._q.dtype == torch.float32 else "tf32",
            **overlapping(self._q.device),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )


def _warps(columns: int) -> int:
    return min(16, max(4, int(triton.next_power_of_2(columns)) // 512))


def _library_groups(x: Tensor, outputs: int) -> bool:
    """Whether torch has a grouped product for it that reads where groups end on the device; elsewhere it fetches that
    to the host, which waits and cannot be recorded."""
    device = gpu_of(x.device)
    if device.type != "cuda" or x.dtype != torch.bfloat16 or x.shape[1] % 8 or outputs % 8:
        return False
    return torch.cuda.get_device_capability(device)[0] in LIBRARY_GROUPS_ON
