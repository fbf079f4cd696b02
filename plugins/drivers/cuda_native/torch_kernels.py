"""The operations of a step in plain torch: the meaning of the fused kernels, and what runs where there is no Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.drivers.cuda_native.kernels import Angles, written_heads
from pie_plugins.drivers.cuda_native.outcomes import Failure, RingLayout
from pie_plugins.drivers.cuda_native.step_tensors import GroupTensors, MaskTensors, StepTensors
from pie_plugins.models.layers.norm import rms_norm
from pie_plugins.models.layers.step import AttentionHeads

HIDDEN = float("-inf")
_WORD = 0xFFFFFFFF


class TorchKernels:
    """See `kernels.Kernels`. `attend` and `grouped` look at lengths on the host: on a GPU they wait."""

    name = "torch"
    waits = True

    def __init__(self, layout: RingLayout) -> None:
        self._layout = layout

    def prepare(self, step: StepTensors, ring: Tensor, vocab_size: int) -> None:
        row_request = step.row_request.to(torch.int64)
        length = _looked_up(ring, step.length_source, step.length)
        step.shift.copy_(step.length - length)
        broken = _is_broken(ring, step.length_dependency)
        step.fail.copy_(torch.maximum(step.fail, broken * int(Failure.DEPENDENCY)))
        tokens = _looked_up(ring, step.token_source, step.token)
        wrong = _is_broken(ring, step.token_dependency) | (tokens < 0) | (tokens >= vocab_size)
        step.fail.scatter_reduce_(0, row_request, wrong.to(torch.int32) * int(Failure.DEPENDENCY), "amax")
        step.tokens.copy_(torch.where(wrong, 0, tokens))
        step.positions.copy_((step.position - step.shift[row_request]).clamp(min=0))
        for group in step.groups:
            _find_slots(step, group, length, row_request)

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        return table.index_select(0, tokens)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(x.add_(delta), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def grouped(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        return functional.grouped_mm(x, matrices.transpose(1, 2), offs=ends)

    def place_heads(
        self,
        qkv: Tensor,
        heads: AttentionHeads,
        angles: Angles | None,
        positions: Tensor,
        slots: Tensor,
        pages: Tensor,
    ) -> Tensor:
        split = qkv.view(qkv.shape[0], -1, heads.head_dim)
        rotated = heads.num_heads + written_heads(heads)
        qk, v = split[:, :rotated].to(torch.float32), split[:, rotated:]
        if heads.norm is not None:
            qk = functional.rms_norm(qk, qk.shape[-1:], None, heads.norm_eps) * heads.norm
        if angles is not None:
            qk = _rotated(qk, angles, positions)
        qk = qk.to(qkv.dtype)
        if not heads.reads_only:
            size = pages.shape[3]
            page, place = slots.to(torch.int64) // size, slots.to(torch.int64) % size
            pages[page, 0, :, place] = qk[:, heads.num_heads :]
            pages[page, 1, :, place] = v
        return qk[:, : heads.num_heads]

    def attend(
        self, q: Tensor, pages: Tensor, group: GroupTensors, step: StepTensors, scale: float
    ) -> Tensor:
        out = q.new_zeros(q.shape)
        starts, columns = step.row_indptr.tolist(), group.columns.tolist()
        for request, (first, total) in enumerate(zip(group.page_indptr.tolist(), columns, strict=False)):
            rows = slice(starts[request], starts[request + 1])
            if not total:  # padding
                continue
            listed = group.pages[first : first - (-total // group.page_size)].to(torch.int64)
            k, v = pages[listed].transpose(0, 1).transpose(1, 2).flatten(2, 3)[:, :, :total]
            visible = _visible(group.masks, rows, total, q.device)
            out[rows] = _attended(q[rows], k, v, visible, scale)
        return out.flatten(1)

    def sample(self, logits: Tensor, step: StepTensors) -> Tensor:
        best, greedy = logits.max(dim=-1)
        code = torch.where(best == HIDDEN, int(Failure.NOTHING_ALLOWED), 0)
        code = torch.where(best.isnan(), int(Failure.NOT_A_NUMBER), code).to(torch.int32)
        step.fail.scatter_reduce_(0, step.sampler_request.to(torch.int64), code, "amax")
        temperature = step.floats("temperature")
        is_warm = temperature > 0
        scaled = logits / torch.where(is_warm, temperature, 1.0)[:, None]
        kept = _filtered(scaled, step)
        drawn = (kept + gumbel_noise(step, logits.shape[1])).argmax(dim=-1)
        return torch.where(is_warm, drawn, greedy).to(torch.int32)

    def settle(self, step: StepTensors, sampled: Tensor, ring: Tensor) -> None:
        layout, base = self._layout, step.base.to(torch.int64)
        indptr, drafts = step.row_indptr.to(torch.int64), step.drafts.to(torch.int64)
        first = step.first_sampler.to(torch.int64)
        padded = torch.cat(
            (sampled, sampled.new_full((1,), -1))
        )  # [S + 1]: the last for rows without a sampler
        at_rows = padded[torch.where(first < 0, len(sampled), first)]
        first_draft = indptr[1:] - drafts
        accepted = _accepted(at_rows, step.tokens, first_draft, drafts, step.max_drafts)
        last_row = first_draft - 1 + accepted
        counts = indptr[1:] - indptr[:-1]
        length = step.length - step.shift + counts - drafts + accepted
        live = step.sampler_row <= last_row[step.sampler_request.to(torch.int64)]
        for offset, values in (
            (0, step.fail),
            (layout.accepted, accepted),
            (layout.last, at_rows[last_row.clamp(min=0)]),
            (layout.length, length),
            (layout.tokens, sampled),
            (layout.live, live),
        ):
            places = base + offset + torch.arange(len(values), device=ring.device)
            ring.index_copy_(0, places, values.to(torch.int32))


def _looked_up(ring: Tensor, source: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(source >= 0, ring[source.clamp(min=0).to(torch.int64)], otherwise)


def _is_broken(ring: Tensor, dependency: Tensor) -> Tensor:
    return (dependency >= 0) & (ring[dependency.clamp(min=0).to(torch.int64)] != 0)


def _find_slots(step: StepTensors, group: GroupTensors, length: Tensor, row_request: Tensor) -> None:
    before, size = length - group.holes, group.page_size
    counts = step.row_indptr[1:] - step.row_indptr[:-1]
    group.columns.copy_(before + counts)
    place = torch.arange(len(row_request), device=before.device) - step.row_indptr[row_request]
    column = (before[row_request] + place).clamp(min=0)
    listed = (group.page_indptr[row_request] + column // size).clamp(max=len(group.pages) - 1)
    group.slots.copy_(group.pages[listed.to(torch.int64)] * size + column % size)


def _rotated(qk: Tensor, angles: Angles, positions: Tensor) -> Tensor:
    at = positions.to(torch.int64)
    cos, sin = angles.cos[at][:, None], angles.sin[at][:, None]
    turning = cos.shape[-1]
    one, two, still = qk.split([turning, turning, qk.shape[-1] - 2 * turning], dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin, still), dim=-1)


def _visible(masks: MaskTensors | None, rows: slice, total: int, device: torch.device) -> Tensor:
    """[n, L] of one request."""
    count = rows.stop - rows.start
    columns = torch.arange(total, device=device)
    limits = torch.arange(total - count, total, device=device)
    causal = columns <= limits[:, None]
    if masks is None:
        return causal
    bits = torch.arange(32, dtype=torch.int32, device=device)
    for row, entry in enumerate(masks.index[rows].tolist()):
        if entry >= 0:
            allowed = ((masks.words[entry][:, None] >> bits) & 1).view(-1)[:total].to(torch.bool)
            allowed = functional.pad(allowed, (0, total - len(allowed)))
            causal[row] = allowed & causal[row] if masks.causal[entry] else allowed
    return causal


def _attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [n, H, D] over k and v [K, L, D]; a row that sees nothing gives zeros."""
    rows, heads, dim = q.shape
    grouped = q.to(torch.float32).view(rows, k.shape[0], -1, dim)
    scores = torch.einsum("nkgd,kld->nkgl", grouped, k.to(torch.float32)) * scale
    scores = scores.masked_fill(~visible[:, None, None], HIDDEN)
    weights = scores.softmax(-1).nan_to_num(0.0)
    attended = torch.einsum("nkgl,kld->nkgd", weights, v.to(torch.float32))
    return attended.reshape(rows, heads, dim).to(q.dtype)


def _filtered(scaled: Tensor, step: StepTensors) -> Tensor:
    """Top-k, then top-p, then min-p; what they leave out is hidden."""
    size = scaled.shape[1]
    top_k, top_p, min_p = step.top_k, step.floats("top_p"), step.floats("min_p")
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(size, device=scaled.device)
    limit = torch.where(top_k > 0, top_k, size)[:, None]
    inside = ordered.masked_fill(ranks >= limit, HIDDEN)
    probabilities = inside.to(torch.float64).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    wanted = (before < top_p[:, None]) | (top_p >= 1)[:, None] | (ranks == 0)
    kept = torch.empty_like(scaled).scatter_(1, order, inside.masked_fill(~wanted, HIDDEN))
    floor = kept.amax(dim=-1) + torch.where(min_p > 0, min_p, 0.0).log()
    return kept.masked_fill(kept < floor[:, None], HIDDEN)


def random_words(step: StepTensors, vocab_size: int) -> Tensor:
    """[S, vocab] in int64: `contracts.sampling.random_words` for the samplers of the step."""
    blocks = (vocab_size + 3) // 4
    index = (step.index - step.shift[step.sampler_request.to(torch.int64)]).to(torch.int64) & _WORD
    count = torch.arange(blocks, device=index.device).expand(len(index), -1)
    wide = {name: step.parts[name].to(torch.int64)[:, None] & _WORD for name in ("slot", "epoch")}
    keys = [step.parts[name].to(torch.int64)[:, None] & _WORD for name in ("stream_low", "stream_high")]
    words = philox4x32((count, index[:, None], wide["slot"], wide["epoch"]), (keys[0], keys[1]))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).view(len(index), -1)[:, :vocab_size]


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over 32-bit words in int64 cells."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        h0, l0 = _product(c0, 0xD2511F53)
        h1, l1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 64-bit product, in halves, for int64 has a sign."""
    low, high = word & 0xFFFF, word >> 16
    below = low * factor
    above = high * factor + (below >> 16)
    return above >> 16, ((above & 0xFFFF) << 16) | (below & 0xFFFF)


def gumbel_noise(step: StepTensors, vocab_size: int) -> Tensor:
    """[S, vocab] in float32: `contracts.sampling.gumbel_noise`."""
    words = random_words(step, vocab_size)
    uniform = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _accepted(at_rows: Tensor, tokens: Tensor, first_draft: Tensor, drafts: Tensor, longest: int) -> Tensor:
    """[R]: drafts before the first that differs from the token sampled one row earlier."""
    if longest == 0:
        return torch.zeros_like(drafts)
    places = torch.arange(longest, device=drafts.device)
    rows = (first_draft[:, None] + places).clamp(max=len(tokens) - 1)
    agrees = (at_rows[(rows - 1).clamp(min=0)] == tokens[rows]) & (places < drafts[:, None])
    return agrees.to(torch.int64).cumprod(dim=1).sum(dim=1)
