"""Triton kernels of sampling: greedy and filtered draws with the core's noise, without a sort of the vocabulary.

A row of logits is cut into chunks, each read by one program; the last of a row's programs says what the row needs next.

    scout_kernel    the best logit; but for rows with top-k also the best of logit / temperature + noise
    weigh_kernel    how many tokens, or how much of their mass, lie above each of a few pivots: coarsely, then finer
    draw_kernel     where the scout's winner may not stay: the best of those that do, and a list of those in doubt
    finish_kernel   sorts the listed, cuts them as top-k, top-p and min-p say, and takes the best of all that stay

Pivots narrow the bracket of two logits that the cut lies in. All above the bracket stays, so a winner found there is
the token, wherever the cut is. A bracket of too many tokens to list, such as thousands of equal logits, is searched by
one program. Sums are those of whole chunks in a fixed order, so a row's tokens do not depend on its company.

    logits         [S, vocab] in the model's dtype       temperature, top_p, min_p [S] float32; top_k [S] int32
    best, score    [S, SHARES] float32, with their ids   pivots [S, 3 PIVOTS] float32; parts [S, CHUNKS, PIVOTS] float32
    facts, words   [S, FACTS] float64, [S, WORDS] int32  listed [S, LISTABLE] float32, with their ids
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
NOISE_SPAN = tl.constexpr(19.5)  # Gumbel noise of 23 bits lies between -2.82 and 16.64
LOWEST, HIGHEST = tl.constexpr(float("-inf")), tl.constexpr(float("inf"))
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(2.0**-60)  # of pivots, but for their sign
DOUBT = tl.constexpr(4e-6)  # sums over a chunk may be wrong by so much of themselves

TILE = tl.constexpr(1024)  # of scores that one program computes at a time
SHORT = tl.constexpr(256)  # a list that is sorted in a fraction of the time

# What is to be done about a row, and what is known of it between kernels.
DONE, OPEN, LISTED, SEARCHED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
VERDICT, WINNER, COUNT, WORDS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
LOW, HIGH, ABOVE_LOW, ABOVE_HIGH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
TOTAL, TOP, WON, DEEP, FACTS = (
    tl.constexpr(4),
    tl.constexpr(5),
    tl.constexpr(6),
    tl.constexpr(7),
    tl.constexpr(8),
)


@triton.jit(do_not_specialize=["shares", "chunks_each"])
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
    arrivals,
    best,
    best_id,
    score,
    score_id,
    pivots,
    facts,
    words,
    tokens,
    vocab_size,
    shares,
    chunks_each,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    PIVOTS: tl.constexpr,
    LISTABLE: tl.constexpr,
    NOTHING_ALLOWED: tl.constexpr,
    NOT_A_NUMBER: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = row * SHARES + share
    warmth, limit, mass = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    has_limit = (limit > 0) & (limit < vocab_size)
    has_cut = (warmth > 0) & (has_limit | (mass < 1.0))
    request = tl.load(sampler_request + row)
    start = share * chunks_each * CHUNK
    stop = tl.minimum(start + chunks_each * CHUNK, vocab_size)
    if (warmth > 0) & (has_limit == 0):
        counter = tl.load(index + row) - tl.load(shift + request)
        top, token = _scout_drawing(
            logits + row * vocab_size, start, stop, warmth, counter, tl.load(slot + row), tl.load(epoch + row),
            tl.load(stream_low + row), tl.load(stream_high + row), score + part, score_id + part, min(CHUNK, TILE),
        )  # fmt: skip
    else:
        top, token = _best_of(logits + row * vocab_size, start, stop, CHUNK)
    tl.store(best + part, top)
    tl.store(best_id + part, token)
    if _is_last(arrivals + row, shares):
        lanes = tl.arange(0, SHARES)
        parts, is_part = row * SHARES + lanes, lanes < shares
        found = tl.load(best + parts, mask=is_part, other=LOWEST, cache_modifier=".cg")
        are_numbers = tl.min((found == found).to(tl.int32), 0)
        found = tl.where(found == found, found, LOWEST)
        top = tl.max(found, 0)
        token = _first(found == top, tl.load(best_id + parts, mask=is_part, other=0, cache_modifier=".cg"))
        if are_numbers == 0:
            tl.atomic_max(fail + request, NOT_A_NUMBER)
        elif top == LOWEST:
            tl.atomic_max(fail + request, NOTHING_ALLOWED)
        verdict, won = tl.full([], DONE, tl.int32), tl.full([], LOWEST, tl.float32)
        is_drawn = (warmth > 0) & (are_numbers != 0) & (top != LOWEST)
        if is_drawn & (has_limit == 0):
            scores = tl.load(score + parts, mask=is_part, other=LOWEST, cache_modifier=".cg")
            named = tl.load(score_id + parts, mask=is_part, other=0, cache_modifier=".cg")
            winner = _first(scores == tl.max(scores, 0), named)
            won = tl.load(logits + row * vocab_size + winner).to(tl.float32)
            is_kept = tl.div_rn(won, warmth) >= _floor(top, warmth, tl.load(min_p + row))
            token = tl.where(is_kept, winner, token)
            won = tl.where(is_kept, won, LOWEST)
            verdict = tl.where(has_cut, OPEN, tl.where(is_kept, DONE, LISTED))
        elif is_drawn:
            verdict = tl.where((mass < 1.0) & (2 * limit > LISTABLE), SEARCHED, OPEN)
        tl.store(tokens + row, token)
        tl.store(words + row * WORDS + VERDICT, verdict)
        tl.store(words + row * WORDS + WINNER, token)
        tl.store(words + row * WORDS + COUNT, 0)
        _leave(facts + row * FACTS, LOWEST, tl.where(has_cut, HIGHEST, LOWEST), 0.0, 0.0)
        tl.store(facts + row * FACTS + TOP, top)
        tl.store(facts + row * FACTS + WON, won)
        if verdict == OPEN:
            mean, spread = _sampled_moments(logits + row * vocab_size, top, vocab_size)
            tl.store(facts + row * FACTS + DEEP, mean - 8.0 * spread)
            chosen = _coarse_pivots(top, mean, spread, PIVOTS)
            _leave_pivots(pivots + 3 * row * PIVOTS, words + row * WORDS, chosen, warmth, PIVOTS)


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
def _scout_drawing(
    logits, start, stop, warmth, counter, slot, epoch, key_low, key_high, score, score_id, BLOCK: tl.constexpr
):  # fmt: skip
    """As `_best_of`, and leaves the best score and its token."""
    found = tl.full([BLOCK], LOWEST, tl.float32)
    best, second, where = _nobody(start, BLOCK)
    for first in range(start, stop, BLOCK):
        values = _values(logits, first, stop, BLOCK)
        found = tl.maximum(found, values, propagate_nan=tl.PropagateNan.ALL)
        rough = _rough_scores(values, first, warmth, counter, slot, epoch, key_low, key_high, BLOCK)
        best, second, where = _challenged(best, second, where, rough, first)
    won, token = _decided(
        logits, best, second, where, start, stop, LOWEST, LOWEST, warmth, counter, slot, epoch, key_low, key_high, BLOCK
    )  # fmt: skip
    tl.store(score, won)
    tl.store(score_id, token)
    top, _ = _top_of(found, where, start)
    return top, token


@triton.jit
def _sampled_moments(logits, top, vocab_size):
    """Mean and standard deviation of the logits, about: from eight stretches of the vocabulary."""
    lanes = tl.arange(0, 1024)
    at = lanes // 128 * (vocab_size // 8) + lanes % 128
    values = tl.load(logits + at, mask=at < vocab_size, other=LOWEST).to(tl.float32)
    is_finite = (values > LOWEST) & (values < HIGHEST)
    count = tl.sum(is_finite.to(tl.float32), 0)
    mean = tl.sum(tl.where(is_finite, values, 0.0), 0) / tl.maximum(count, 1.0)
    away = tl.where(is_finite, values - mean, 0.0)
    spread = tl.sqrt(tl.sum(away * away, 0) / tl.maximum(count, 1.0))
    return tl.where(count > 0, mean, top - 4.0), tl.where(count > 0, spread, 1.0)


@triton.jit
def _is_last(arrivals, chunks):
    """Whether all other programs of this row have left what they found. The count begins anew."""
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel") == chunks - 1
    if is_last:
        tl.store(arrivals, 0)
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
def _leave(facts, low, high, above_low, above_high):
    tl.store(facts + LOW, low)
    tl.store(facts + HIGH, high)
    tl.store(facts + ABOVE_LOW, above_low)
    tl.store(facts + ABOVE_HIGH, above_high)


@triton.jit
def _coarse_pivots(top, mean, spread, PIVOTS: tl.constexpr):
    """Most where the bulk of the logits lies, if they are normal, the others from there to the best; one below all."""
    lanes = tl.arange(0, PIVOTS)
    bulk: tl.constexpr = (PIVOTS - 1) * 5 // 8
    behind: tl.constexpr = PIVOTS - 1 - bulk
    height = tl.maximum((top - mean) / tl.where(spread > 0, spread, 1.0), 3.0)
    in_bulk = 6.0 / (bulk - 1) * lanes - 3.5
    in_tail = 2.5 + (height - 2.5) * ((lanes - bulk + 1).to(tl.float32) / (behind + 1))
    chosen = mean + spread * tl.where(lanes < bulk, in_bulk, in_tail)
    return tl.where(lanes == PIVOTS - 1, LOWEST, tl.where(chosen == chosen, chosen, HIGHEST))


@triton.jit
def _fine_pivots(low, high, above_low, above_high, goal, top, deep, PIVOTS: tl.constexpr):
    """Around where the cut is if the bracket is filled evenly, the closer to it the denser."""
    lanes = tl.arange(0, PIVOTS)
    upper = tl.where(high < HIGHEST, high, top)
    lower = tl.where(low > LOWEST, low, tl.minimum(deep, upper - 1.0))
    between = above_low - above_high
    share = tl.where(between > 0, goal - above_high, 0.5) / tl.where(between > 0, between, 1.0)
    share = tl.minimum(tl.maximum(share, 0.02), 0.98)
    half: tl.constexpr = PIVOTS // 2
    away = 0.64 * tl.exp2(-(lanes % half).to(tl.float32)) * (upper - lower)
    chosen = upper - share * (upper - lower) + tl.where(lanes < half, away, -away)
    return tl.where(chosen == chosen, chosen, HIGHEST).to(tl.float32)


@triton.jit
def _leave_pivots(pivots, words, chosen, warmth, PIVOTS: tl.constexpr):
    """A pivot is the last of the logits that scale to one number: equals stay together."""
    chosen = tl.where(tl.abs(chosen) < LEAST, -LEAST, chosen)
    for _ in tl.static_range(3):
        chosen = tl.where(_scales_alike(chosen, warmth), _value(_key(chosen) + 1), chosen)
    if tl.max(_scales_alike(chosen, warmth).to(tl.int32), 0) != 0:
        tl.store(words + VERDICT, SEARCHED)
    lanes = tl.arange(0, PIVOTS)
    exponent = (chosen.to(tl.int32, bitcast=True) >> 23) & 255
    steep = tl.where(exponent == 255, 1.0, ((278 - exponent) << 23).to(tl.float32, bitcast=True))
    tl.store(pivots + lanes, chosen)
    tl.store(pivots + PIVOTS + lanes, steep)
    tl.store(pivots + 2 * PIVOTS + lanes, -chosen * steep)


@triton.jit
def _is_above(values, pivot, PIVOTS: tl.constexpr):
    """1.0 or 0.0: the difference, as steep as takes the least one beyond 1. Comparisons take twice the time."""
    steep, offset = tl.load(pivot + PIVOTS), tl.load(pivot + 2 * PIVOTS)
    if INTERPRETED:
        is_finite = values > LOWEST  # numpy warns of what a saturated sum takes for 0
        return tl.where(is_finite & (tl.where(is_finite, values, 0.0) * steep + offset >= 1.0), 1.0, 0.0)
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [values, steep, offset], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _scales_alike(chosen, warmth):
    """Whether the next number above scales to the same one."""
    is_finite = (chosen > LOWEST) & (chosen < HIGHEST)
    chosen, divisor = tl.where(is_finite, chosen, 0.0), tl.zeros_like(chosen) + warmth
    return is_finite & (tl.div_rn(_value(_key(chosen) + 1), divisor) == tl.div_rn(chosen, divisor))


@triton.jit(do_not_specialize=["chunks_each"])
def weigh_kernel(
    logits,
    temperature,
    top_k,
    top_p,
    arrivals,
    pivots,
    parts,
    facts,
    words,
    tokens,
    vocab_size,
    chunks,
    chunks_each,
    LAST: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIVOTS: tl.constexpr,
    LISTABLE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(words + row * WORDS + VERDICT) == OPEN:
        warmth, limit, mass = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
        has_limit = (limit > 0) & (limit < vocab_size)
        top = tl.load(facts + row * FACTS + TOP).to(tl.float32)
        scale = LOG2_E / warmth
        chosen_here = pivots + 3 * row * PIVOTS
        for chunk in range(share * chunks_each, tl.minimum((share + 1) * chunks_each, chunks)):
            values = _values(logits + row * vocab_size, chunk * CHUNK, vocab_size, CHUNK)
            weights = tl.where(has_limit, 1.0, tl.exp2((values - top) * scale))
            for pivot in tl.static_range(PIVOTS):
                is_above = _is_above(values, chosen_here + pivot, PIVOTS)
                tl.store(parts + (row * CHUNKS + chunk) * PIVOTS + pivot, tl.sum(is_above * weights, 0))
        if _is_last(arrivals + row, tl.num_programs(1)):
            at = (row * CHUNKS + tl.arange(0, CHUNKS)[:, None]) * PIVOTS + tl.arange(0, PIVOTS)[None, :]
            is_part = tl.arange(0, CHUNKS)[:, None] < chunks
            sums = tl.load(parts + at, mask=is_part, other=0.0, cache_modifier=".cg")
            sums = tl.sum(sums.to(tl.float64), 0)
            chosen = tl.load(chosen_here + tl.arange(0, PIVOTS))
            _judge(
                sums, chosen, warmth, limit, mass, has_limit, top, scale, chosen_here, facts + row * FACTS,
                words + row * WORDS, tokens + row, LAST, PIVOTS, LISTABLE,
            )  # fmt: skip


@triton.jit
def _judge(
    sums, chosen, warmth, limit, mass, has_limit, top, scale, pivots, facts, words, tokens,
    LAST: tl.constexpr, PIVOTS: tl.constexpr, LISTABLE: tl.constexpr,
):  # fmt: skip
    """Narrows the bracket, and says what the row needs next."""
    low, high = tl.load(facts + LOW), tl.load(facts + HIGH)
    above_low, above_high = tl.load(facts + ABOVE_LOW), tl.load(facts + ABOVE_HIGH)
    if low == LOWEST:
        above_low = tl.maximum(above_low, tl.max(tl.where(chosen == LOWEST, sums, 0.0), 0))
    total = tl.where(low == LOWEST, above_low, tl.load(facts + TOTAL))
    goal = tl.where(has_limit, limit.to(tl.float64), mass.to(tl.float64) * total)
    doubt = tl.where(has_limit, 0.0, DOUBT)
    stay = (sums < goal * (1.0 - doubt)) | (has_limit & (sums <= goal))
    leave = (sums > 0.0) & (sums >= goal * (1.0 + doubt))
    found = tl.min(tl.where(stay, chosen, HIGHEST), 0)
    above_high = tl.where(found < high, tl.max(tl.where(stay, sums, 0.0), 0), above_high)
    high = tl.minimum(high, found)
    found = tl.max(tl.where(leave, chosen, LOWEST), 0)
    above_low = tl.where(found > low, tl.min(tl.where(leave, sums, HIGHEST), 0), above_low)
    low = tl.maximum(low, found)
    least = tl.where(has_limit, 1.0, tl.exp2((low.to(tl.float32) - top) * scale))
    has_both = has_limit & (mass < 1.0)
    is_small = above_low <= LISTABLE * least  # all that may stay, not only the bracket
    is_listable = is_small | ((above_low - above_high <= LISTABLE * least) & (has_both == 0))
    verdict = tl.where(is_listable | LAST, LISTED, OPEN)
    is_all_listed = is_small | (has_both & (verdict == LISTED))
    high, above_high = tl.where(is_all_listed, HIGHEST, high), tl.where(is_all_listed, 0.0, above_high)
    if tl.load(facts + WON) > high:
        tl.store(tokens, tl.load(words + WINNER))
        verdict = verdict * 0 + DONE
    _leave(facts, low, high, above_low, above_high)
    tl.store(facts + TOTAL, total)
    tl.store(words + VERDICT, verdict)
    if verdict == OPEN:
        fine = _fine_pivots(low, high, above_low, above_high, goal, top, tl.load(facts + DEEP), PIVOTS)
        _leave_pivots(pivots, words, fine, warmth, PIVOTS)


@triton.jit(do_not_specialize=["chunks_each"])
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
    words,
    listed,
    listed_id,
    vocab_size,
    chunks_each,
    CHUNK: tl.constexpr,
    SHARES: tl.constexpr,
    LISTABLE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = row * SHARES + share
    if tl.load(words + row * WORDS + VERDICT) == LISTED:
        warmth, known = tl.load(temperature + row), facts + row * FACTS
        low, high = tl.load(known + LOW).to(tl.float32), tl.load(known + HIGH).to(tl.float32)
        top = tl.load(known + TOP).to(tl.float32)
        floor = _floor(top, warmth, tl.load(min_p + row))
        hopeless = top - (NOISE_SPAN + 0.1) * warmth
        counter = tl.load(index + row) - tl.load(shift + tl.load(sampler_request + row))
        slots, epochs = tl.load(slot + row), tl.load(epoch + row)
        key_low, key_high = tl.load(stream_low + row), tl.load(stream_high + row)
        start = share * chunks_each * CHUNK
        stop = tl.minimum(start + chunks_each * CHUNK, vocab_size)
        block: tl.constexpr = min(CHUNK, TILE)
        best, second, where = _nobody(start, block)
        for first in range(start, stop, block):
            values = _values(logits + row * vocab_size, first, stop, block)
            can_win = (values > high) & (values >= hopeless)
            in_doubt = (values > low) & (values <= high)
            if tl.max((can_win | in_doubt).to(tl.int32), 0) != 0:
                _list(values, in_doubt, first, words + row * WORDS, listed + row * LISTABLE, listed_id + row * LISTABLE,
                      block, LISTABLE)  # fmt: skip
                scaled = tl.div_rn(values, tl.zeros_like(values) + warmth)
                kept = tl.where(can_win & (scaled >= floor), values, LOWEST)
                if tl.max(kept, 0) > LOWEST:
                    rough = _rough_scores(
                        kept, first, warmth, counter, slots, epochs, key_low, key_high, block
                    )
                    best, second, where = _challenged(best, second, where, rough, first)
        won, token = _decided(
            logits + row * vocab_size, best, second, where, start, stop, high, floor, warmth, counter, slots, epochs,
            key_low, key_high, block,
        )  # fmt: skip
        tl.store(score + part, won)
        tl.store(score_id + part, token)


@triton.jit
def _list(values, in_doubt, first, words, listed, listed_id, BLOCK: tl.constexpr, LISTABLE: tl.constexpr):
    """In whatever order programs come; what they would list beyond the end is only counted."""
    ones = in_doubt.to(tl.int32)
    count = tl.sum(ones, 0)
    if count > 0:
        place = tl.atomic_add(words + COUNT, count) + tl.cumsum(ones, 0) - 1
        has_room = in_doubt & (place < LISTABLE)
        tl.store(listed + place, values, mask=has_room)
        tl.store(listed_id + place, first + tl.arange(0, BLOCK), mask=has_room)


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
    logits, best, second, where, start, stop, high, floor, warmth, counter, slot, epoch, key_low, key_high,
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
                logits, start, stop, high, floor, warmth, counter, slot, epoch, key_low, key_high, BLOCK
            )  # fmt: skip
    return won, token


@triton.jit
def _drawn_exactly(
    logits, start, stop, high, floor, warmth, counter, slot, epoch, key_low, key_high, BLOCK: tl.constexpr
):  # fmt: skip
    """The best score from `start` to `stop`, of logits that lie above `high` and scale to `floor` or more."""
    found, where = tl.full([BLOCK], LOWEST, tl.float32), tl.full([BLOCK], 2147483647, tl.int32)
    for first in range(start, stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        values = _values(logits, first, stop, BLOCK)
        scaled = tl.div_rn(values, tl.zeros_like(values) + warmth)
        scores = scaled + gumbel(first // 4, counter, slot, epoch, key_low, key_high, BLOCK)
        is_better = (
            (values > high) & (scaled >= floor) & ((scores > found) | ((scores == found) & (at < where)))
        )
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
    words,
    listed,
    listed_id,
    tokens,
    vocab_size,
    shares,
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,
    LISTABLE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    follow(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    verdict = tl.load(words + row * WORDS + VERDICT)
    if verdict != DONE:
        warmth, limit, mass = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
        limit = tl.where((limit > 0) & (limit < vocab_size), limit, 2147483647)
        known = facts + row * FACTS
        top = tl.load(known + TOP).to(tl.float32)
        floor = _floor(top, warmth, tl.load(min_p + row))
        counter = tl.load(index + row) - tl.load(shift + tl.load(sampler_request + row))
        slots, epochs = tl.load(slot + row), tl.load(epoch + row)
        key_low, key_high = tl.load(stream_low + row), tl.load(stream_high + row)
        count = tl.load(words + row * WORDS + COUNT)
        if (verdict == SEARCHED) | (count > LISTABLE):
            token = _searched(
                logits + row * vocab_size, warmth, tl.div_rn(top, warmth), limit, mass, floor, counter, slots, epochs,
                key_low, key_high, vocab_size, BLOCK,
            )  # fmt: skip
        else:
            parts = tl.arange(0, SHARES)
            scores = tl.load(score + row * SHARES + parts, mask=parts < shares, other=LOWEST)
            names = tl.load(score_id + row * SHARES + parts, mask=parts < shares, other=0)
            best = tl.max(scores, 0)
            token = _first(scores == best, names)
            if count > 0:
                above_high, total = tl.load(known + ABOVE_HIGH), tl.load(known + TOTAL)
                if count <= min(SHORT, LISTABLE):
                    won, winner = _best_listed(
                        listed + row * LISTABLE, listed_id + row * LISTABLE, count, top, warmth, limit, mass, floor,
                        above_high, total, counter, slots, epochs, key_low, key_high, min(SHORT, LISTABLE),
                    )  # fmt: skip
                else:
                    won, winner = _best_listed(
                        listed + row * LISTABLE, listed_id + row * LISTABLE, count, top, warmth, limit, mass, floor,
                        above_high, total, counter, slots, epochs, key_low, key_high, LISTABLE,
                    )  # fmt: skip
                token = tl.where((won > best) | ((won == best) & (winner < token)), winner, token)
        tl.store(tokens + row, token)


@triton.jit
def _best_listed(
    listed, listed_id, count, top, warmth, limit, mass, floor, above_high, total, counter, slot, epoch, key_low,
    key_high, LENGTH: tl.constexpr,
):  # fmt: skip
    """The best score of the listed tokens that stay, and its token."""
    ranks = tl.arange(0, LENGTH)
    is_listed = ranks < count
    values = tl.load(listed + ranks, mask=is_listed, other=LOWEST)
    named = tl.load(listed_id + ranks, mask=is_listed, other=0)
    scaled = tl.div_rn(values, tl.zeros_like(values) + warmth) + 0.0  # -0.0 becomes 0.0
    order = (_key(scaled).to(tl.int64) << 32) | (2147483647 - named)
    order = tl.sort(tl.where(is_listed, order, -9223372036854775807), descending=True)
    scaled, named = _value((order >> 32).to(tl.int32)), 2147483647 - (order & 0x7FFFFFFF).to(tl.int32)
    stays = _stays(scaled, ranks, is_listed, tl.div_rn(top, warmth), limit, mass, above_high, total)
    scores = scaled + _noise_at(named, counter, slot, epoch, key_low, key_high)
    scores = tl.where(is_listed & stays & (scaled >= floor), scores, LOWEST)
    best = tl.max(scores, 0)
    return best, _first(scores == best, named)


@triton.jit
def _stays(scaled, ranks, is_listed, top, limit, mass, above_high, total):
    """Of the listed in their order: which top-k and top-p let stay. What lies above the bracket is known by its sum."""
    weights = tl.where(is_listed, tl.exp(scaled - top), 0.0).to(tl.float64)
    has_limit = limit < 2147483647
    is_inside = (ranks + tl.where(has_limit, above_high, 0.0)) < limit
    weights = tl.where(is_inside, weights, 0.0)
    before = tl.cumsum(weights, 0) - weights
    base = tl.where(has_limit, 0.0, above_high)
    goal = mass.to(tl.float64) * tl.where(has_limit, tl.sum(weights, 0), total)
    goal = tl.where(mass < 1.0, goal, HIGHEST)
    is_first = tl.where(ranks == 0, base, 1.0) == 0.0
    return is_inside & (is_first | (base + before < goal))


@triton.jit
def _searched(
    logits, warmth, top, limit, mass, floor, counter, slot, epoch, key_low, key_high, vocab_size, BLOCK: tl.constexpr
):  # fmt: skip
    """The token of a row whose cut one program finds, over the whole row, and draws behind."""
    cut, last = _cut(logits, warmth, top, limit, mass, vocab_size, BLOCK)
    found = tl.full([BLOCK], LOWEST, tl.float32)
    where = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        scaled, keys = _scaled(logits, warmth, start, vocab_size, BLOCK)
        is_kept = ((keys > cut) | ((keys == cut) & (at <= last))) & (scaled >= floor) & (scaled != LOWEST)
        if tl.max((is_kept & (scaled >= top - NOISE_SPAN)).to(tl.int32), 0) != 0:
            noise = gumbel(start // 4, counter, slot, epoch, key_low, key_high, BLOCK)
            scores = tl.where(is_kept, scaled + noise, LOWEST)
            is_better = is_kept & ((scores > found) | ((scores == found) & (at < where)))
            found, where = tl.where(is_better, scores, found), tl.where(is_better, at, where)
    return _first(found == tl.max(found, 0), where)


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
