"""Triton kernels of sampling: greedy and filtered draws with the core's noise, without a sort and without the host.

    best_kernel        the best logit of each stretch of the vocabulary
    threshold_kernel   the best of all, and where top-k, top-p and min-p cut, by bisection over the floats' bits
    draw_kernel        the best of logit / temperature + noise among what is kept, of each stretch
    pick_kernel        the best of the stretches

A logit further than `NOISE_SPAN` below the best cannot win, so most of the vocabulary draws no noise at all.
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

NOISE_SPAN = tl.constexpr(19.5)  # Gumbel noise of 23 bits lies between -2.82 and 16.64
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def best_kernel(
    logits, best, best_id, is_number, vocab_size, span, STRETCHES: tl.constexpr, BLOCK: tl.constexpr
):
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum(vocab_size, (stretch + 1) * span)
    found = tl.full([BLOCK], LOWEST, tl.float32)
    where = tl.full([BLOCK], 2147483647, tl.int32)
    numbers = tl.full([BLOCK], 1, tl.int32)
    for start in range(stretch * span, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * vocab_size + at, mask=at < end, other=LOWEST).to(tl.float32)
        numbers = numbers & (values == values).to(tl.int32)
        is_better = (values > found) | ((values == found) & (at < where))
        found, where = tl.where(is_better, values, found), tl.where(is_better, at, where)
    highest = tl.max(found, 0)
    tl.store(best + row * STRETCHES + stretch, highest)
    tl.store(best_id + row * STRETCHES + stretch, tl.min(tl.where(found == highest, where, 2147483647), 0))
    tl.store(is_number + row * STRETCHES + stretch, tl.min(numbers, 0))


@triton.jit
def threshold_kernel(
    logits,
    best,
    best_id,
    is_number,
    temperature,
    top_k,
    top_p,
    min_p,
    sampler_request,
    fail,
    greedy,
    highest,
    threshold,
    last_equal,
    vocab_size,
    STRETCHES: tl.constexpr,
    BLOCK: tl.constexpr,
    NOTHING_ALLOWED: tl.constexpr,
    NOT_A_NUMBER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = row * STRETCHES + tl.arange(0, STRETCHES)
    found = tl.load(best + part)
    top = tl.max(found, 0)
    token = tl.min(tl.where(found == top, tl.load(best_id + part), 2147483647), 0)
    numbers = tl.min(tl.load(is_number + part), 0)
    tl.store(greedy + row, tl.where(token < vocab_size, token, 0))
    owner = fail + tl.load(sampler_request + row)
    if numbers == 0:
        tl.atomic_max(owner, NOT_A_NUMBER)
    elif top == LOWEST:
        tl.atomic_max(owner, NOTHING_ALLOWED)
    warmth = tl.load(temperature + row)
    divisor = tl.where(warmth > 0, warmth, 1.0)
    top = tl.div_rn(top, divisor)
    tl.store(highest + row, top)
    limit, mass = tl.load(top_k + row), tl.load(top_p + row)
    is_cut = ((limit > 0) & (limit < vocab_size)) | (mass < 1.0)
    cut, equal = _key(tl.full([1], LOWEST, tl.float32)), tl.full([1], 2147483647, tl.int32)
    if (warmth > 0) & is_cut & (numbers != 0) & (top != LOWEST):
        cut, equal = _cut(logits + row * vocab_size, divisor, top, limit, mass, vocab_size, BLOCK)
    share = tl.load(min_p + row)
    floor = tl.where(share > 0, top + accurate_log(tl.where(share > 0, share, 1.0)), LOWEST)
    kept = _value(cut)
    tl.store(threshold + row + tl.arange(0, 1), tl.maximum(kept, floor))
    tl.store(last_equal + row + tl.arange(0, 1), tl.where(floor > kept, 2147483647, equal))


@triton.jit
def _cut(logits, divisor, top, limit, mass, vocab_size, BLOCK: tl.constexpr):
    """The key of the least probable value that stays, and the highest id that stays among its equals."""
    highest = _key(tl.full([1], 0.0, tl.float32) + top)
    cut = tl.full([1], -2147483648, tl.int32)
    room = tl.full([1], 2147483647, tl.int32)  # how many equals of the cut stay
    if (limit > 0) & (limit < vocab_size):
        cut = _kth(logits, divisor, top, highest, limit, vocab_size, BLOCK)
        above, _, _, _, _ = _split(logits, divisor, top, cut, vocab_size, BLOCK)
        room = limit - above
    if mass < 1.0:
        _, beyond, least, _, equals = _split(logits, divisor, top, cut, vocab_size, BLOCK)
        staying = tl.minimum(equals, room).to(tl.float64) * _weight(cut, top)
        wanted = mass.to(tl.float64) * (beyond + tl.where(equals > 0, staying, 0.0))
        low = tl.where(equals > 0, cut, least)
        nucleus = _nucleus(logits, divisor, top, low, highest, wanted, vocab_size, BLOCK)
        _, beyond, _, _, _ = _split(logits, divisor, top, nucleus, vocab_size, BLOCK)
        weight = _weight(nucleus, top)
        needed = tl.ceil((wanted - beyond) / tl.where(weight > 0, weight, 1.0))
        needed = tl.minimum(tl.maximum(needed, 1.0), 2147483647.0).to(tl.int32)
        room = tl.where(nucleus == cut, tl.minimum(room, needed), needed)
        cut = nucleus
    last = tl.full([1], 2147483647, tl.int32)
    _, _, _, _, equals = _split(logits, divisor, top, cut, vocab_size, BLOCK)
    if tl.max((equals > room).to(tl.int32), 0) != 0:
        last = _nth_equal(logits, divisor, cut, room, vocab_size, BLOCK)
    return cut, last


@triton.jit
def _kth(logits, divisor, top, highest, limit, vocab_size, BLOCK: tl.constexpr):
    """The key of the limit-th best. Both ends are keys that occur, so equal ends end the search."""
    _, _, low, _, _ = _split(logits, divisor, top, tl.full([1], -2147483648, tl.int32), vocab_size, BLOCK)
    high = highest
    while tl.max((low < high).to(tl.int32), 0) != 0:
        middle = _middle(low, high)
        above, _, least, greatest, _ = _split(logits, divisor, top, middle, vocab_size, BLOCK)
        is_above = above >= limit
        low, high = tl.where(is_above, least, low), tl.where(is_above, high, greatest)
    return low


@triton.jit
def _nucleus(logits, divisor, top, low, highest, wanted, vocab_size, BLOCK: tl.constexpr):
    """The lowest key above which less than the wanted mass lies."""
    high = highest
    while tl.max((low < high).to(tl.int32), 0) != 0:
        middle = _middle(low, high)
        _, beyond, least, greatest, _ = _split(logits, divisor, top, middle, vocab_size, BLOCK)
        is_below = beyond < wanted
        low, high = tl.where(is_below, low, least), tl.where(is_below, greatest, high)
    return low


@triton.jit
def _middle(low, high):
    return (low.to(tl.int64) + (high.to(tl.int64) - low.to(tl.int64)) // 2).to(tl.int32)


@triton.jit
def _split(logits, divisor, top, cut, vocab_size, BLOCK: tl.constexpr):
    """The keys above `cut`: how many, their weight, the least; the greatest of the others; how many equal `cut`."""
    counts, equals = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float64)
    least, greatest = tl.full([BLOCK], 2147483647, tl.int32), tl.full([BLOCK], -2147483648, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        values, keys = _scaled(logits, divisor, start, vocab_size, BLOCK)
        is_inside = start + tl.arange(0, BLOCK) < vocab_size
        is_above, is_below = is_inside & (keys > cut), is_inside & (keys <= cut)
        counts += is_above.to(tl.int32)
        equals += (is_inside & (keys == cut)).to(tl.int32)
        sums += tl.where(is_above, tl.exp(values - top), 0.0).to(tl.float64)
        least = tl.where(is_above, tl.minimum(least, keys), least)
        greatest = tl.where(is_below, tl.maximum(greatest, keys), greatest)
    return (
        tl.sum(counts, 0, keep_dims=True),
        tl.sum(sums, 0, keep_dims=True),
        tl.min(least, 0, keep_dims=True),
        tl.max(greatest, 0, keep_dims=True),
        tl.sum(equals, 0, keep_dims=True),
    )


@triton.jit
def _nth_equal(logits, divisor, cut, count, vocab_size, BLOCK: tl.constexpr):
    """The id of the count-th key that equals `cut`."""
    seen = tl.zeros([1], tl.int32)
    found = tl.full([1], 2147483647, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, keys = _scaled(logits, divisor, start, vocab_size, BLOCK)
        is_equal = ((keys == cut) & (at < vocab_size)).to(tl.int32)
        order = seen + tl.cumsum(is_equal, 0)
        here = tl.min(tl.where((is_equal != 0) & (order == count), at, 2147483647), 0, keep_dims=True)
        found = tl.minimum(found, here)
        seen += tl.sum(is_equal, 0, keep_dims=True)
    return found


@triton.jit
def _scaled(logits, divisor, start, vocab_size, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    values = tl.load(logits + at, mask=at < vocab_size, other=LOWEST).to(tl.float32)
    values = tl.div_rn(values, tl.zeros([BLOCK], tl.float32) + divisor) + 0.0  # -0.0 becomes 0.0
    return values, _key(values)


@triton.jit
def _key(values):
    """An integer that orders as the float does."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(key, top):
    return tl.exp(_value(key) - top).to(tl.float64)


@triton.jit
def draw_kernel(
    logits,
    temperature,
    highest,
    threshold,
    last_equal,
    stream_low,
    stream_high,
    index,
    shift,
    sampler_request,
    slot,
    epoch,
    best,
    best_id,
    vocab_size,
    span,
    STRETCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    warmth = tl.load(temperature + row)
    if warmth <= 0:
        return
    cut = tl.load(threshold + row)
    least = tl.maximum(cut, tl.load(highest + row) - NOISE_SPAN)
    last = tl.load(last_equal + row)
    counter = tl.load(index + row) - tl.load(shift + tl.load(sampler_request + row))
    key_low, key_high = tl.load(stream_low + row), tl.load(stream_high + row)
    slot_number, epoch_number = tl.load(slot + row), tl.load(epoch + row)
    end = tl.minimum(vocab_size, (stretch + 1) * span)
    found = tl.full([BLOCK], LOWEST, tl.float32)
    where = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(stretch * span, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * vocab_size + at, mask=at < end, other=LOWEST).to(tl.float32)
        values = tl.div_rn(values, tl.zeros([BLOCK], tl.float32) + warmth)
        is_kept = (values >= least) & ((values > cut) | (at <= last)) & (values != LOWEST)
        if tl.max(is_kept.to(tl.int32), 0) != 0:
            noise = gumbel(start // 4, counter, slot_number, epoch_number, key_low, key_high, BLOCK)
            scores = tl.where(is_kept, values + noise, LOWEST)
            is_better = (scores > found) | ((scores == found) & (at < where) & is_kept)
            found, where = tl.where(is_better, scores, found), tl.where(is_better, at, where)
    top = tl.max(found, 0)
    tl.store(best + row * STRETCHES + stretch, top)
    tl.store(best_id + row * STRETCHES + stretch, tl.min(tl.where(found == top, where, 2147483647), 0))


@triton.jit
def pick_kernel(temperature, greedy, best, best_id, tokens, vocab_size, STRETCHES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(greedy + row)
    if tl.load(temperature + row) > 0:
        part = row * STRETCHES + tl.arange(0, STRETCHES)
        found = tl.load(best + part)
        drawn = tl.min(tl.where(found == tl.max(found, 0), tl.load(best_id + part), 2147483647), 0)
        token = tl.where(drawn < vocab_size, drawn, token)
    tl.store(tokens + row, token)


@triton.jit
def gumbel(first_block, index, slot, epoch, key_low, key_high, BLOCK: tl.constexpr):
    """Noise of the tokens 4 * first_block to 4 * first_block + BLOCK - 1."""
    uniform = (
        (random_words(first_block, index, slot, epoch, key_low, key_high, BLOCK) >> 9).to(tl.float32) + 0.5
    ) * (1.0 / 8388608.0)
    return -accurate_log(-accurate_log(uniform))


@triton.jit
def random_words(first_block, index, slot, epoch, key_low, key_high, BLOCK: tl.constexpr):
    """Ten rounds of Philox4x32; token t takes word t % 4 of block t // 4."""
    c0 = (first_block + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = c0 ^ c0
    c1, c2, c3 = zero + index.to(tl.uint32), zero + slot.to(tl.uint32), zero + epoch.to(tl.uint32)
    k0, k1 = zero + key_low.to(tl.uint32), zero + key_high.to(tl.uint32)
    first, second = zero + 0xD2511F53, zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, first), c0 * first
        h1, l1 = tl.umulhi(c2, second), c2 * second
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [BLOCK])


@triton.jit
def accurate_log(x):
    """The logarithm of positive normal floats to one unit in the last place (the method of fdlibm's logf).

    The hardware's is wrong by 2^-22 near 1, where the noise of the luckiest tokens comes from.
    """
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    r = w * (0.40000972152 + w * 0.24279078841) + z * (0.66666662693 + w * 0.28498786688)
    half = 0.5 * f * f
    return s * (half + r) + exponent * 9.0580006145e-06 - half + f + exponent * 6.9313812256e-01
