"""Triton kernels of the layers: norms, activation, and everything between the fused projection and attention.

x, delta, out  [T, hidden]         gate_up  [T, 2 I], gate first     weights in the model's dtype, sums in float32
qkv            [T, H + 2 K, D]     norm     [H + K, D]               cos, sin [positions, D / 2] float32
slots          [T] int32           pages    [P, 2 (key, value), K, PAGE, D]: slot is page * PAGE + place
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow


@triton.jit
def rms_norm_kernel(x, weight, out, columns, eps, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    follow(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / columns + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, values * scale * weights, mask=inside)


@triton.jit
def add_rms_norm_kernel(x, delta, weight, out, columns, eps, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """The norm is of the sum as it is kept, rounded."""
    follow(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    old = tl.load(x + row * columns + at, mask=inside, other=0.0)
    added = old.to(tl.float32) + tl.load(delta + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    kept = added.to(old.dtype)
    tl.store(x + row * columns + at, kept, mask=inside)
    values = kept.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / columns + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, values * scale * weights, mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, columns, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    follow(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(gate_up + row * 2 * columns + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * columns + columns + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


@triton.jit
def place_heads_kernel(
    qkv,
    norm,
    cos,
    sin,
    positions,
    slots,
    pages,
    eps,
    num_heads,
    num_kv_heads,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    NORMED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One token and a few of its heads: queries are rotated in place, keys and values go to their page."""
    follow(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    total = num_heads + 2 * num_kv_heads
    at = tl.arange(0, HALF)
    half = DIM // 2
    inside = (head < total)[:, None] & (at < half)[None, :]
    place = token * total * DIM + head[:, None] * DIM + at[None, :]
    one = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(qkv + place + half, mask=inside, other=0.0).to(tl.float32)
    is_rotated = (head < num_heads + num_kv_heads)[:, None]
    new_one, new_two = one, two
    if NORMED:
        scale = tl.rsqrt((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / DIM + eps)[:, None]
        weight = norm + head[:, None] * DIM + at[None, :]
        new_one = one * scale * tl.load(weight, mask=inside & is_rotated, other=0.0).to(tl.float32)
        new_two = two * scale * tl.load(weight + half, mask=inside & is_rotated, other=0.0).to(tl.float32)
    angle = tl.load(positions + token).to(tl.int64) * half + at
    c = tl.load(cos + angle, mask=at < half, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=at < half, other=0.0)[None, :]
    new_one, new_two = new_one * c - new_two * s, new_two * c + new_one * s
    new_one, new_two = tl.where(is_rotated, new_one, one), tl.where(is_rotated, new_two, two)
    is_query = (head < num_heads)[:, None]
    tl.store(qkv + place, new_one, mask=inside & is_query)
    tl.store(qkv + place + half, new_two, mask=inside & is_query)
    slot = tl.load(slots + token)
    page, row = (slot // PAGE).to(tl.int64), slot % PAGE
    kv_head = head - num_heads  # keys 0 to K - 1, then values: as they lie on a page
    target = (page * 2 * num_kv_heads + kv_head[:, None]) * PAGE * DIM + row * DIM + at[None, :]
    tl.store(pages + target, new_one, mask=inside & ~is_query)
    tl.store(pages + target + half, new_two, mask=inside & ~is_query)
