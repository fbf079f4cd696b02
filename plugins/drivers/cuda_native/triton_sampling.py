"""Triton kernels of sampling: greedy and filtered draws with the core's noise, without a sort of the vocabulary.

A row of logits is cut into chunks, several of them read by one program; the last of a row's programs says what is left.

    scout_kernel    the best logit, or that of logit / temperature + noise; where a filter cuts, lists the likely
    draw_kernel     the best of logit / temperature + noise among the listed, or in the row if more may stay
    contest_kernel  where more may stay: what all before that one weigh, and the best among them
    finish_kernel   where a filter cuts: whether what is drawn may stay, and draws before it if not

What lies above a threshold is listed, which a sample of the row puts where the list has the wanted length; whether all
that stay are in there is known once they are weighed. Nothing is sorted: a token drawn from all is the token if what
comes before it weighs less than top-p asks for, wherever the cut is. If not, what comes before it is drawn from, and so
on. A place is an integer that orders tokens, the most probable first. Weights of candidates are summed as integers,
those of chunks in a fixed order, so a row's tokens do not depend on its company.

    logits           [S, vocab] in the model's dtype       temperature, top_p, min_p [S] float32; top_k [S] int32
    best             [S, SHARES] float32, with its ids     score [S, 2, SHARES] float32: drawn, and contesting
    parts            [S, 2, SHARES] float32: what of each chunk lies above the threshold weighs, and the rest
    facts, weights   [S, FACTS] float64, [S, WEIGHTS] int64    words, counters [S, WORDS], [S, COUNTERS] int32
    listed           [S, LISTABLE] int64: a logit's bits and its id, from draw_kernel on its place
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST, HIGHEST = tl.constexpr(float("-inf")), tl.constexpr(float("inf"))
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
DOUBT = tl.constexpr(1e-5)  # sums over chunks may be wrong by so much of themselves
UNIT = tl.constexpr(2.0**42)  # of weights as integers: a million of the heaviest fit into 63 bits
FIRST_PLACE, LAST_PLACE = tl.constexpr(2**63 - 1), tl.constexpr(-(2**63))
NO_LIMIT = tl.constexpr(2**31 - 1)
UNKNOWN = tl.constexpr(-1.0)
STEEPEST = tl.constexpr(110.0)  # powers of two that sums have room for

TILE = tl.constexpr(1024)  # of scores that one program computes at a time
SAMPLED = tl.constexpr(4096)  # tokens that say where a row's threshold lies
STRETCH = tl.constexpr(32)  # of them in a row
LEAST_RANK = tl.constexpr(16)  # of the threshold in the sample: fewer would say little
HALVINGS = tl.constexpr(24)  # at most, until the threshold is found

# What is to be done about a row, and what is known of it between kernels.
DONE, OPEN, LISTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
VERDICT, COUNT, WORDS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
TOP, REST, TOTAL, FACTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LISTED_WEIGHT, WEIGHT_BEFORE, WEIGHTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ARRIVED, FILLED, COUNTERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["shares", "chunks", "chunks_each"])
def scout_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    stream_low,
    stream_high,
    index,
    shift,
    sampler_request,
    slot,
    epoch,
    fail,
    counters,
    best,
    best_id,
    score,
    score_id,
    parts,
    facts,
    weights,
    words,
    listed,
    tokens,
    vocab_size,
    shares,
    chunks,
    chunks_each,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    LISTABLE: tl.constexpr,
    NOTHING_ALLOWED: tl.constexpr,
    NOT_A_NUMBER: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = row * SHARES + share
    warmth, limit, mass = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    least_share = tl.load(min_p + row)
    has_limit = (limit > 0) & (limit < vocab_size)
    has_cut = (warmth > 0) & (has_limit | (mass < 1.0) | (least_share > 0))
    request = tl.load(sampler_request + row)
    start = share * chunks_each * CHUNK
    stop = tl.minimum(start + chunks_each * CHUNK, vocab_size)
    threshold = tl.full([], LOWEST, tl.float32)
    if has_cut:
        threshold = _threshold(
            logits + row * vocab_size, warmth, limit, has_limit, vocab_size, LISTABLE, SAMPLED
        )
        top = _list(
            logits + row * vocab_size, start, stop, threshold, warmth, parts + row * 2 * SHARES,
            listed + row * LISTABLE, counters + row * COUNTERS, CHUNK, SHARES, LISTABLE, STAGES,
        )  # fmt: skip
        token = start
    elif warmth > 0:
        counter = tl.load(index + row) - tl.load(shift + request)
        top, won, token = _drawn(
            logits + row * vocab_size, start, stop, LOWEST, warmth, counter, tl.load(slot + row), tl.load(epoch + row),
            tl.load(stream_low + row), tl.load(stream_high + row), min(CHUNK, TILE), False,
        )  # fmt: skip
        tl.store(score + row * 2 * SHARES + share, won)
    else:
        top, token = _best_of(logits + row * vocab_size, start, stop, CHUNK)
    tl.store(best + part, top)
    tl.store(best_id + part, token)
    if _is_last(counters + row * COUNTERS, shares):
        lanes = tl.arange(0, SHARES)
        ours, is_part = row * SHARES + lanes, lanes < shares
        found = tl.load(best + ours, mask=is_part, other=LOWEST, cache_modifier=".cg")
        are_numbers = tl.min((found == found).to(tl.int32), 0)
        top = tl.max(tl.where(found == found, found, LOWEST), 0)
        if are_numbers == 0:
            tl.atomic_max(fail + request, NOT_A_NUMBER)
        elif top == LOWEST:
            tl.atomic_max(fail + request, NOTHING_ALLOWED)
        verdict = tl.full([], DONE, tl.int32)
        if has_cut:
            count = tl.load(counters + row * COUNTERS + FILLED, cache_modifier=".cg")
            tl.store(counters + row * COUNTERS + FILLED, 0)
            sums = parts + row * 2 * SHARES + lanes
            above = tl.sum(
                tl.load(sums, mask=lanes < chunks, other=0.0, cache_modifier=".cg").to(tl.float64), 0
            )
            below = tl.load(sums + SHARES, mask=lanes < chunks, other=0.0, cache_modifier=".cg")
            below = tl.sum(below.to(tl.float64), 0)
            floor = _floor(top, warmth, least_share)
            is_whole = _holds_all(count, above, below, threshold, warmth, limit, has_limit, mass, floor)
            verdict = tl.where(is_whole & (count <= LISTABLE), LISTED, OPEN)
            verdict = tl.where((are_numbers != 0) & (top != LOWEST), verdict, DONE)
            heavier = tl.exp2(tl.minimum((_finite(threshold) - top) * (LOG2_E / warmth), STEEPEST)).to(
                tl.float64
            )
            rest = tl.where(below > 0, heavier * below, 0.0)
            tl.store(facts + row * FACTS + TOP, top)
            tl.store(facts + row * FACTS + REST, rest)
            total = heavier * above + rest
            is_sound = (above < 1e30) & (total > 0.9) & (total < 1e30)  # the best alone weighs 1
            tl.store(facts + row * FACTS + TOTAL, tl.where(is_sound, total, UNKNOWN))
            tl.store(weights + row * WEIGHTS + LISTED_WEIGHT, tl.full([], 0, tl.int64))
            tl.store(weights + row * WEIGHTS + WEIGHT_BEFORE, tl.full([], 0, tl.int64))
            tl.store(words + row * WORDS + COUNT, count)
        else:
            ranked = found
            if warmth > 0:
                ranked = tl.load(
                    score + row * 2 * SHARES + lanes, mask=is_part, other=LOWEST, cache_modifier=".cg"
                )
            named = tl.load(best_id + ours, mask=is_part, other=0, cache_modifier=".cg")
            ranked = tl.where(ranked == ranked, ranked, LOWEST)
            token = _first(is_part & (ranked == tl.max(ranked, 0)), named)
        tl.store(words + row * WORDS + VERDICT, verdict)
        tl.store(tokens + row, token)


@triton.jit
def _threshold(logits, warmth, limit, has_limit, vocab_size, LISTABLE: tl.constexpr, SAMPLE: tl.constexpr):
    """A logit above which about as many lie as shall be listed: all where so many fit. What lies above it scales to
    more than what does not, so nothing that is not listed comes before what is; HIGHEST where none would do."""
    threshold = tl.full([], LOWEST, tl.float32)
    if vocab_size > LISTABLE:
        wanted = tl.minimum(
            tl.where(has_limit, 512 + 2 * tl.minimum(limit, LISTABLE), LISTABLE), LISTABLE * 3 // 4
        )
        lanes = tl.arange(0, SAMPLE)
        at = lanes // STRETCH * (vocab_size // (SAMPLE // STRETCH)) + lanes % STRETCH
        values = tl.load(logits + at, mask=at < vocab_size, other=LOWEST).to(tl.float32)
        rank = tl.maximum((wanted.to(tl.int64) * SAMPLE // vocab_size).to(tl.int32), LEAST_RANK)
        if tl.sum((values > LOWEST).to(tl.int32), 0) > rank:
            low, high = tl.min(tl.where(values > LOWEST, values, HIGHEST), 0), tl.max(values, 0)
            halvings = HALVINGS + 0
            while halvings > 0:
                middle = 0.5 * low + 0.5 * high
                above = tl.sum((values > middle).to(tl.int32), 0)
                is_found = (above >= rank) & (above <= rank + rank // 16)
                low, high = tl.where(above >= rank, middle, low), tl.where(above >= rank, high, middle)
                halvings = tl.where(is_found, 0, halvings - 1)
            threshold = low
            for _ in tl.static_range(3):
                threshold = tl.where(_scales_alike(threshold, warmth), _value(_key(threshold) + 1), threshold)
            threshold = tl.where(_scales_alike(threshold, warmth), HIGHEST, threshold)
    return threshold


@triton.jit
def _list(
    logits, start, stop, threshold, warmth, parts, listed, counters, CHUNK: tl.constexpr, SHARES: tl.constexpr,
    LISTABLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Lists what lies above the threshold, leaves what this and the others of each chunk weigh, and gives the best
    logit, not a number where one is none. Places come in whatever order programs do; beyond the end is only counted."""
    found = tl.full([CHUNK], LOWEST, tl.float32)
    scale, origin = LOG2_E / warmth, _finite(threshold)
    for first in tl.range(start, stop, CHUNK, num_stages=STAGES):
        values = _values(logits, first, stop, CHUNK)
        found = tl.maximum(found, values, propagate_nan=tl.PropagateNan.ALL)
        is_above = values > threshold
        ones = is_above.to(tl.int32)
        weights = tl.exp2(tl.minimum((values - origin) * scale, STEEPEST))
        heavy, light = tl.where(is_above, weights, 0.0), tl.where(is_above, 0.0, weights)
        above, below, count = tl.reduce((heavy, light, ones), 0, _sums)
        tl.store(parts + first // CHUNK, above)
        tl.store(parts + SHARES + first // CHUNK, below)
        if count > 0:
            place = tl.atomic_add(counters + FILLED, count, sem="relaxed") + tl.cumsum(ones, 0) - 1
            packed = (values.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (first + tl.arange(0, CHUNK))
            tl.store(listed + place, packed, mask=is_above & (place < LISTABLE))
    top, _ = _top_of(found, tl.arange(0, CHUNK), start)
    return top


@triton.jit
def _sums(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def _finite(threshold):
    """What weights are measured by until the best logit is known."""
    return tl.where(tl.abs(threshold) < HIGHEST, threshold, 0.0)


@triton.jit
def _holds_all(count, above, below, threshold, warmth, limit, has_limit, mass, floor):
    """Whether nothing that stays lies below the threshold."""
    holds_mass = (mass < 1.0) & (above >= mass.to(tl.float64) * (above + below) * (1.0 + DOUBT))
    holds_limit = has_limit & (count >= limit)
    holds_floor = tl.div_rn(threshold, warmth) < floor
    return (threshold == LOWEST) | holds_limit | holds_floor | (holds_mass & (has_limit == 0))


@triton.jit
def _best_of(logits, start, stop, BLOCK: tl.constexpr):
    """The best logit from `start` to `stop`, not a number where one is none, and the first token that has it."""
    found, where = tl.full([BLOCK], LOWEST, tl.float32), tl.full([BLOCK], 0, tl.int32) + start
    for first in range(start, stop, BLOCK):
        values = _values(logits, first, stop, BLOCK)
        where = tl.where(values > found, first, where)
        found = tl.maximum(found, values, propagate_nan=tl.PropagateNan.ALL)
    return _top_of(found, where + tl.arange(0, BLOCK), start)


@triton.jit
def _top_of(found, tokens, start):
    are_numbers = tl.min((found == found).to(tl.int32), 0)
    top = tl.max(tl.where(found == found, found, LOWEST), 0)
    token = tl.where(top == LOWEST, start, _first(found == top, tokens))
    return tl.where(are_numbers != 0, top, float("nan")), token


@triton.jit
def _values(logits, first, stop, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    return tl.load(logits + at, mask=at < stop, other=LOWEST).to(tl.float32)


@triton.jit
def _drawn(
    logits, start, stop, floor, warmth, counter, slot, epoch, key_low, key_high, BLOCK: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """The best logit, not a number where one is none; the best score of what scales to the floor or more, and whose."""
    found = tl.full([BLOCK], LOWEST, tl.float32)
    best, second, where = _nobody(start, BLOCK)
    for first in range(start, stop, BLOCK):
        values = _values(logits, first, stop, BLOCK)
        found = tl.maximum(found, values, propagate_nan=tl.PropagateNan.ALL)
        if HAS_FLOOR:
            values = tl.where(tl.div_rn(values, tl.zeros_like(values) + warmth) >= floor, values, LOWEST)
        rough = _rough_scores(values, first, warmth, counter, slot, epoch, key_low, key_high, BLOCK)
        best, second, where = _challenged(best, second, where, rough, first)
    won, token = _decided(
        logits, best, second, where, start, stop, floor, warmth, counter, slot, epoch, key_low, key_high, BLOCK
    )  # fmt: skip
    top, _ = _top_of(found, where, start)
    return top, won, token


@triton.jit
def _is_last(counters, shares):
    """Whether all other programs of this row have left what they found. The count begins anew."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counters + ARRIVED, 1, sem="acq_rel") == shares - 1
    if is_last:
        tl.store(counters + ARRIVED, 0)
    return is_last


@triton.jit
def _first(is_best, tokens):
    return tl.min(tl.where(is_best, tokens, 2147483647), 0)


@triton.jit
def _floor(top, warmth, share):
    """The least scaled logit that min-p lets stay."""
    floor = tl.div_rn(top, warmth) + accurate_log(tl.where(share > 0, share, 1.0))
    return tl.where(share > 0, floor, LOWEST)


@triton.jit
def _scales_alike(chosen, warmth):
    """Whether the next number above scales to the same one."""
    is_finite = (chosen > LOWEST) & (chosen < HIGHEST)
    chosen, divisor = tl.where(is_finite, chosen, 0.0), tl.zeros_like(chosen) + warmth
    return is_finite & (tl.div_rn(_value(_key(chosen) + 1), divisor) == tl.div_rn(chosen, divisor))


@triton.jit(do_not_specialize=["shares", "chunks_each"])
def draw_kernel(
    logits,
    temperature,
    min_p,
    stream_low,
    stream_high,
    index,
    shift,
    sampler_request,
    slot,
    epoch,
    score,
    score_id,
    facts,
    weights,
    words,
    listed,
    vocab_size,
    shares,
    chunks_each,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    LISTABLE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    verdict = tl.load(words + row * WORDS + VERDICT)
    if verdict != DONE:
        warmth, top = tl.load(temperature + row), tl.load(facts + row * FACTS + TOP).to(tl.float32)
        floor = _floor(top, warmth, tl.load(min_p + row))
        counter = tl.load(index + row) - tl.load(shift + tl.load(sampler_request + row))
        slots, epochs = tl.load(slot + row), tl.load(epoch + row)
        key_low, key_high = tl.load(stream_low + row), tl.load(stream_high + row)
        block: tl.constexpr = min(CHUNK, TILE)
        if verdict == LISTED:
            won, token = _draw_listed(
                listed + row * LISTABLE, tl.load(words + row * WORDS + COUNT), weights + row * WEIGHTS + LISTED_WEIGHT,
                share, shares, warmth, tl.div_rn(top, warmth), floor, counter, slots, epochs, key_low, key_high,
                min(block, 256),
            )  # fmt: skip
        else:
            start = share * chunks_each * CHUNK
            stop = tl.minimum(start + chunks_each * CHUNK, vocab_size)
            _, won, token = _drawn(
                logits + row * vocab_size, start, stop, floor, warmth, counter, slots, epochs, key_low, key_high,
                block, True,
            )  # fmt: skip
        tl.store(score + row * 2 * SHARES + share, won)
        tl.store(score_id + row * 2 * SHARES + share, token)


@triton.jit
def _draw_listed(
    listed, count, weight, share, shares, warmth, top, floor, counter, slot, epoch, key_low, key_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The best score of this share of the list, and whose; each of it becomes its place, and its weight is added."""
    best, where = tl.full([BLOCK], LOWEST, tl.float32), tl.full([BLOCK], NO_LIMIT, tl.int32)
    sums = tl.zeros([BLOCK], tl.int64)
    for first in range(share * BLOCK, count, shares * BLOCK):
        at = first + tl.arange(0, BLOCK)
        packed = tl.load(listed + at, mask=at < count, other=0)
        tokens = packed.to(tl.int32)
        scaled = _scaled((packed >> 32).to(tl.int32).to(tl.float32, bitcast=True), warmth)
        tl.store(listed + at, _place(scaled, tokens), mask=at < count)
        sums += _weights(scaled, top, at < count)
        can_win = (at < count) & (scaled >= floor)
        scores = scaled + _noise_at(tokens, counter, slot, epoch, key_low, key_high)
        best, where = _better(best, where, scores, tokens, can_win)
    tl.atomic_add(weight, tl.sum(sums, 0), sem="relaxed")
    return tl.max(best, 0), _first(best == tl.max(best, 0), where)


@triton.jit
def _better(best, where, scores, tokens, can_win):
    is_better = can_win & ((scores > best) | ((scores == best) & (tokens < where)))
    return tl.where(is_better, scores, best), tl.where(is_better, tokens, where)


@triton.jit
def _weights(scaled, top, counts):
    return (tl.exp(tl.where(counts, scaled - top, LOWEST)) * UNIT).to(tl.int64)


@triton.jit
def _scaled(values, warmth):
    """As a division rounds it: no quotient of two floats lies as near to where rounding turns as this may be wrong."""
    inverse = tl.full([], 1.0, tl.float64) / warmth.to(tl.float64)
    return (values.to(tl.float64) * inverse).to(tl.float32) + 0.0  # -0.0 becomes 0.0


@triton.jit(do_not_specialize=["shares", "chunks_each"])
def contest_kernel(
    logits,
    temperature,
    min_p,
    stream_low,
    stream_high,
    index,
    shift,
    sampler_request,
    slot,
    epoch,
    score,
    score_id,
    facts,
    weights,
    words,
    vocab_size,
    shares,
    chunks_each,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(words + row * WORDS + VERDICT) == OPEN:
        row_logits, warmth = logits + row * vocab_size, tl.load(temperature + row)
        top = tl.load(facts + row * FACTS + TOP).to(tl.float32)
        floor, top = _floor(top, warmth, tl.load(min_p + row)), tl.div_rn(top, warmth)
        counter = tl.load(index + row) - tl.load(shift + tl.load(sampler_request + row))
        slots, epochs = tl.load(slot + row), tl.load(epoch + row)
        key_low, key_high = tl.load(stream_low + row), tl.load(stream_high + row)
        token = _winner(score + row * 2 * SHARES, score_id + row * 2 * SHARES, shares, vocab_size, SHARES)
        place = _place_of(row_logits, token, warmth)
        block: tl.constexpr = min(CHUNK, TILE)
        best, where = tl.full([block], LOWEST, tl.float32), tl.full([block], NO_LIMIT, tl.int32)
        sums = tl.zeros([block], tl.int64)
        start = share * chunks_each * CHUNK
        stop = tl.minimum(start + chunks_each * CHUNK, vocab_size)
        for first in range(start, stop, block):
            tokens = first + tl.arange(0, block)
            scaled = _scaled(_values(row_logits, first, stop, block), warmth)
            is_before = (_place(scaled, tokens) > place) & (tokens < stop)
            if tl.max(is_before.to(tl.int32), 0) != 0:
                sums += _weights(scaled, top, is_before)
                scores = scaled + gumbel(first // 4, counter, slots, epochs, key_low, key_high, block)
                best, where = _better(best, where, scores, tokens, is_before & (scaled >= floor))
        tl.atomic_add(weights + row * WEIGHTS + WEIGHT_BEFORE, tl.sum(sums, 0), sem="relaxed")
        part = (row * 2 + 1) * SHARES + share
        tl.store(score + part, tl.max(best, 0))
        tl.store(score_id + part, _first(best == tl.max(best, 0), where))


@triton.jit
def _winner(score, score_id, shares, vocab_size, SHARES: tl.constexpr):
    """The token with the best of all shares' scores."""
    parts = tl.arange(0, SHARES)
    scores = tl.load(score + parts, mask=parts < shares, other=LOWEST)
    names = tl.load(score_id + parts, mask=parts < shares, other=NO_LIMIT)
    return tl.minimum(_first(scores == tl.max(scores, 0), names), vocab_size - 1)


@triton.jit
def _place_of(logits, token, warmth):
    return _place(_scaled(tl.load(logits + token).to(tl.float32), warmth), token)


@triton.jit
def _nobody(start, BLOCK: tl.constexpr):
    """Before the first scores: the best and the second best of each lane, and where its best was found."""
    nothing = tl.full([BLOCK], LOWEST, tl.float32)
    return nothing, nothing, tl.full([BLOCK], 0, tl.int32) + start


@triton.jit
def _challenged(best, second, where, scores, first):
    second = tl.maximum(second, tl.minimum(scores, best))
    where = tl.where(scores > best, first, where)
    return tl.maximum(best, scores), second, where


@triton.jit
def _rough_scores(values, first, warmth, counter, slot, epoch, key_low, key_high, BLOCK: tl.constexpr):
    """Logit / temperature + noise but for a constant, up to a few millionths."""
    random = random_words(first // 4, counter, slot, epoch, key_low, key_high, BLOCK)
    return values * (1.0 / warmth) - LN_2 * _rough_log2(_rough_exponential(random))


@triton.jit
def _decided(
    logits, best, second, where, start, stop, floor, warmth, counter, slot, epoch, key_low, key_high,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The best score and its token, exactly: that of the only one near the best, or of all that there are."""
    won, token = tl.max(best, 0), start
    if won != LOWEST:
        least = won - (3e-5 + 1e-6 * tl.abs(won))
        is_near = (best < least) == 0
        if tl.sum(is_near.to(tl.int32) + (second >= least).to(tl.int32), 0) == 1:
            token = tl.sum(tl.where(is_near, where + tl.arange(0, BLOCK), 0), 0)
            noise = gumbel(token // 4, counter, slot, epoch, key_low, key_high, 4)
            won = tl.sum(tl.where(tl.arange(0, 4) == token % 4, noise, 0.0), 0)
            won += tl.div_rn(tl.load(logits + token).to(tl.float32), warmth)
        else:
            won, token = _drawn_exactly(
                logits, start, stop, floor, warmth, counter, slot, epoch, key_low, key_high, BLOCK
            )  # fmt: skip
    return won, token


@triton.jit
def _drawn_exactly(
    logits, start, stop, floor, warmth, counter, slot, epoch, key_low, key_high, BLOCK: tl.constexpr
):  # fmt: skip
    """The best score from `start` to `stop`, of logits that scale to `floor` or more."""
    found, where = tl.full([BLOCK], LOWEST, tl.float32), tl.full([BLOCK], 2147483647, tl.int32)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        values = _values(logits, first, stop, BLOCK)
        scaled = tl.div_rn(values, tl.zeros_like(values) + warmth)
        scores = scaled + gumbel(first // 4, counter, slot, epoch, key_low, key_high, BLOCK)
        is_better = (scaled >= floor) & ((scores > found) | ((scores == found) & (at < where)))
        found, where = tl.where(is_better, scores, found), tl.where(is_better, at, where)
    best = tl.max(found, 0)
    return best, _first(found == best, where)


@triton.jit
def _rough_exponential(random):
    """-log2 of the uniform numbers that noise is made of, up to a few millionths of itself."""
    uniform = ((random >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994
    rest = 1.0 - uniform
    small = rest * LOG2_E * (1.0 + rest * (0.5 + rest * (0.33333334 + rest * 0.25)))
    return tl.where(rest < 0.0625, small, -_rough_log2(uniform))


@triton.jit
def _rough_log2(x):
    """The hardware's: wrong by 2^-22 near 1."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit(do_not_specialize=["shares"])
def finish_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    stream_low,
    stream_high,
    index,
    shift,
    sampler_request,
    slot,
    epoch,
    score,
    score_id,
    facts,
    weights,
    words,
    listed,
    tokens,
    vocab_size,
    shares,
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,
    LISTABLE: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    verdict = tl.load(words + row * WORDS + VERDICT)
    if verdict != DONE:
        row_logits, row_listed = logits + row * vocab_size, listed + row * LISTABLE
        warmth, limit, mass = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
        has_limit = (limit > 0) & (limit < vocab_size)
        limit = tl.where(has_limit, limit, NO_LIMIT)
        known, is_listed = facts + row * FACTS, verdict == LISTED
        count = tl.where(is_listed, tl.load(words + row * WORDS + COUNT), vocab_size)
        top = tl.load(known + TOP).to(tl.float32)
        floor, top = _floor(top, warmth, tl.load(min_p + row)), tl.div_rn(top, warmth)
        counter = tl.load(index + row) - tl.load(shift + tl.load(sampler_request + row))
        slots, epochs = tl.load(slot + row), tl.load(epoch + row)
        key_low, key_high = tl.load(stream_low + row), tl.load(stream_high + row)

        weight = tl.load(weights + row * WEIGHTS + LISTED_WEIGHT).to(tl.float64) * (1.0 / UNIT) + tl.load(
            known + REST
        )
        weight = tl.where(is_listed, weight, tl.load(known + TOTAL))
        end = tl.full([], LAST_PLACE, tl.int64)
        if has_limit:
            end = _end(row_logits, row_listed, count, is_listed, warmth, top, limit, BLOCK)
        if (mass < 1.0) & (has_limit | (weight == UNKNOWN)):
            weight = _weight_before(row_logits, row_listed, count, is_listed, warmth, top, end, BLOCK, STAGES)
        goal = tl.where(mass < 1.0, mass.to(tl.float64) * weight, HIGHEST)

        token = tl.full([], 0, tl.int32)
        drawn, given = tl.full([], 0, tl.int32), tl.where(is_listed, 1, 2)
        is_open = verdict != DONE
        while is_open:
            if drawn < given:
                ours = (row * 2 + drawn) * SHARES
                token = _winner(score + ours, score_id + ours, shares, vocab_size, SHARES)
            else:
                token = _drawn_before(
                    row_logits, row_listed, count, is_listed, end, floor, warmth, counter, slots, epochs, key_low,
                    key_high, min(BLOCK, 512), STAGES,
                )  # fmt: skip
                token = tl.minimum(token, vocab_size - 1)
            place = _place_of(row_logits, token, warmth)
            is_open = (drawn < given) & (place <= end)
            if (place > end) & (goal < HIGHEST):
                if drawn < given - 1:
                    weight = tl.load(weights + row * WEIGHTS + WEIGHT_BEFORE).to(tl.float64) * (1.0 / UNIT)
                else:
                    weight = _weight_before(
                        row_logits, row_listed, count, is_listed, warmth, top, place, BLOCK, STAGES
                    )
                is_open = (weight > 0) & (weight >= goal)
            end = tl.maximum(end, place)
            drawn += 1
        tl.store(tokens + row, token)


@triton.jit
def _end(logits, listed, count, is_listed, warmth, top, limit, BLOCK: tl.constexpr):
    """A place that exactly `limit` candidates come before, or all where there are no more."""
    end = tl.full([], LAST_PLACE, tl.int64)
    if count > limit:
        held = _places(logits, listed, 0, count, is_listed, warmth, BLOCK)
        last = tl.min(tl.where(held > LAST_PLACE, held, FIRST_PLACE), 0)
        low, high = tl.where(count <= BLOCK, last - 1, end), _place(top + 0.0, 0)  # more before it, and fewer
        is_open = limit > 0
        while is_open:
            end = (low >> 1) + (high >> 1) + (low & high & 1)
            inside = tl.sum((held > end).to(tl.int32), 0)
            for first in range(BLOCK, count, BLOCK):
                places = _places(logits, listed, first, count, is_listed, warmth, BLOCK)
                inside += tl.sum((places > end).to(tl.int32), 0)
            low, high = tl.where(inside > limit, end, low), tl.where(inside > limit, high, end)
            is_open = (inside != limit) & (low + 1 < high)
    return end


@triton.jit
def _weight_before(
    logits, listed, count, is_listed, warmth, top, place, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """What all candidates that come before this place weigh."""
    sums = tl.zeros([BLOCK], tl.int64)
    for first in tl.range(0, count, BLOCK, num_stages=STAGES):
        places = _places(logits, listed, first, count, is_listed, warmth, BLOCK)
        sums += _weights(_scaled_at(places), top, places > place)
    return tl.sum(sums, 0).to(tl.float64) * (1.0 / UNIT)


@triton.jit
def _drawn_before(
    logits, listed, count, is_listed, end, floor, warmth, counter, slot, epoch, key_low, key_high,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The token with the best score of the candidates before `end` that scale to the floor or more."""
    best, where = tl.full([BLOCK], LOWEST, tl.float32), tl.full([BLOCK], NO_LIMIT, tl.int32)
    for first in tl.range(0, count, BLOCK, num_stages=STAGES):
        places = _places(logits, listed, first, count, is_listed, warmth, BLOCK)
        can_win = (places > end) & (_scaled_at(places) >= floor)
        if tl.max(can_win.to(tl.int32), 0) != 0:
            tokens = 2147483647 - (places & 2147483647).to(tl.int32)
            scores = _scaled_at(places) + _noise_at(tokens, counter, slot, epoch, key_low, key_high)
            best, where = _better(best, where, scores, tokens, can_win)
    return _first(best == tl.max(best, 0), where)


@triton.jit
def _places(logits, listed, first, count, is_listed, warmth, BLOCK: tl.constexpr):
    """Those of the list, or of the whole row; the last of all where there is nothing."""
    at = first + tl.arange(0, BLOCK)
    places = tl.load(listed + at, mask=at < tl.where(is_listed, count, 0), other=LAST_PLACE)
    values = tl.load(logits + at, mask=at < tl.where(is_listed, 0, count), other=LOWEST).to(tl.float32)
    return tl.where(is_listed | (at >= count), places, _place(_scaled(values, warmth), at))


@triton.jit
def _scaled_at(places):
    return _value((places >> 32).to(tl.int32))


@triton.jit
def _place(scaled, tokens):
    """An integer that is greater for what comes before: the more probable, and of equals the lower id."""
    return (_key(scaled).to(tl.int64) << 32) | (2147483647 - tokens)


@triton.jit
def _key(values):
    """An integer that orders as the float does."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def gumbel(first_block, index, slot, epoch, key_low, key_high, BLOCK: tl.constexpr):
    """Noise of the tokens 4 * first_block to 4 * first_block + BLOCK - 1."""
    return _noise(random_words(first_block, index, slot, epoch, key_low, key_high, BLOCK))


@triton.jit
def _noise_at(tokens, index, slot, epoch, key_low, key_high):
    """Noise of these tokens, in any order."""
    w0, w1, w2, w3 = _philox(tokens // 4, index, slot, epoch, key_low, key_high)
    word = tokens % 4
    return _noise(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))


@triton.jit
def _noise(random):
    uniform = ((random >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -accurate_log(-accurate_log(uniform))


@triton.jit
def random_words(first_block, index, slot, epoch, key_low, key_high, BLOCK: tl.constexpr):
    """Token t takes word t % 4 of block t // 4."""
    blocks = first_block + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = _philox(blocks, index, slot, epoch, key_low, key_high)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])


@triton.jit
def _philox(blocks, index, slot, epoch, key_low, key_high):
    """Ten rounds of Philox4x32."""
    c0 = blocks.to(tl.uint32)
    zero = c0 ^ c0
    c1, c2, c3 = zero + index.to(tl.uint32), zero + slot.to(tl.uint32), zero + epoch.to(tl.uint32)
    k0, k1 = zero + key_low.to(tl.uint32), zero + key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        one, two = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (two >> 32).to(tl.uint32) ^ c1 ^ k0, two.to(tl.uint32)
        c2, c3 = (one >> 32).to(tl.uint32) ^ c3 ^ k1, one.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


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
