"""Triton kernels around the layers: resolving what a step refers to, and leaving what later steps refer to.

Numbers that differ from step to step are not specialized on: a new variant is compiled in the middle of serving. All
arrays are int32: what `step_tensors` packs and makes, by rows [T], requests [R] and samplers [S], and the ring of
`outcomes`.
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "num_requests", "num_pages"])
def prepare_kernel(
    ring,
    token,
    token_source,
    token_dependency,
    position,
    row_request,
    length,
    length_source,
    length_dependency,
    row_indptr,
    fail,
    holes,
    page_indptr,
    page_list,
    tokens,
    positions,
    shift,
    columns,
    slots,
    num_rows,
    num_requests,
    num_pages,
    vocab_size,
    PAGE: tl.constexpr,
    DEPENDENCY: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A lane is a row and, independently, a request. FIRST: the first group also resolves tokens and positions."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_request = at < num_requests
    bound = tl.load(length + at, mask=is_request, other=0)
    source = tl.load(length_source + at, mask=is_request, other=-1)
    true_length = tl.load(ring + source, mask=source >= 0, other=0)
    true_length = tl.where(source >= 0, true_length, bound)
    count = tl.load(row_indptr + at + 1, mask=is_request, other=0) - tl.load(
        row_indptr + at, mask=is_request, other=0
    )
    given_up = tl.load(holes + at, mask=is_request, other=0)
    tl.store(columns + at, true_length - given_up + count, mask=is_request)
    if FIRST:
        tl.store(shift + at, bound - true_length, mask=is_request)
        dependency = tl.load(length_dependency + at, mask=is_request, other=-1)
        is_broken = tl.load(ring + dependency, mask=dependency >= 0, other=0) != 0
        tl.atomic_max(fail + at, tl.full([BLOCK], DEPENDENCY, tl.int32), mask=is_request & is_broken)

    is_row = at < num_rows
    request = tl.load(row_request + at, mask=is_row, other=0)
    bound = tl.load(length + request, mask=is_row, other=0)
    source = tl.load(length_source + request, mask=is_row, other=-1)
    true_length = tl.load(ring + source, mask=source >= 0, other=0)
    true_length = tl.where(source >= 0, true_length, bound)
    if FIRST:
        _resolve_rows(
            ring,
            token,
            token_source,
            token_dependency,
            position,
            fail,
            tokens,
            positions,
            vocab_size,
            at,
            is_row,
            request,
            bound - true_length,
            DEPENDENCY,
            BLOCK,
        )
    given_up = tl.load(holes + request, mask=is_row, other=0)
    column = true_length - given_up + at - tl.load(row_indptr + request, mask=is_row, other=0)
    column = tl.maximum(column, 0)
    listed = tl.load(page_indptr + request, mask=is_row, other=0) + column // PAGE
    page = tl.load(page_list + tl.minimum(listed, num_pages - 1), mask=is_row, other=0)
    tl.store(slots + at, page * PAGE + column % PAGE, mask=is_row)


@triton.jit
def _resolve_rows(
    ring,
    token,
    token_source,
    token_dependency,
    position,
    fail,
    tokens,
    positions,
    vocab_size,
    at,
    is_row,
    request,
    moved,
    DEPENDENCY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    source = tl.load(token_source + at, mask=is_row, other=-1)
    literal = tl.load(token + at, mask=is_row, other=0)
    found = tl.where(source >= 0, tl.load(ring + source, mask=source >= 0, other=0), literal)
    dependency = tl.load(token_dependency + at, mask=is_row, other=-1)
    is_broken = tl.load(ring + dependency, mask=dependency >= 0, other=0) != 0
    is_broken = is_broken | (found < 0) | (found >= vocab_size)
    tl.atomic_max(fail + request, tl.full([BLOCK], DEPENDENCY, tl.int32), mask=is_row & is_broken)
    tl.store(tokens + at, tl.where(is_broken, 0, found), mask=is_row)
    planned = tl.load(position + at, mask=is_row, other=0)
    tl.store(positions + at, tl.maximum(planned - moved, 0), mask=is_row)


@triton.jit(do_not_specialize=["num_requests", "num_samplers", "max_drafts"])
def settle_kernel(
    ring,
    base,
    fail,
    length,
    shift,
    drafts,
    row_indptr,
    first_sampler,
    tokens,
    sampled,
    sampler_row,
    sampler_request,
    num_requests,
    num_samplers,
    max_drafts,
    accepted_at,
    last_at,
    length_at,
    tokens_at,
    live_at,
    BLOCK: tl.constexpr,
):
    """A lane is a request and, independently, a sampler."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = ring + tl.load(base)
    is_request = at < num_requests
    start = tl.load(row_indptr + at, mask=is_request, other=0)
    end = tl.load(row_indptr + at + 1, mask=is_request, other=1)
    count = tl.load(drafts + at, mask=is_request, other=0)
    accepted = _accepted(first_sampler, tokens, sampled, end - count, count, is_request, max_drafts)
    last_row = tl.maximum(end - count - 1 + accepted, 0)
    sampler = tl.load(first_sampler + last_row, mask=is_request, other=-1)
    last = tl.load(sampled + sampler, mask=sampler >= 0, other=-1)
    reached = tl.load(length + at, mask=is_request, other=0) - tl.load(shift + at, mask=is_request, other=0)
    tl.store(target + at, tl.load(fail + at, mask=is_request, other=0), mask=is_request)
    tl.store(target + accepted_at + at, accepted, mask=is_request)
    tl.store(target + last_at + at, last, mask=is_request)
    tl.store(target + length_at + at, reached + end - start - count + accepted, mask=is_request)

    is_sampler = at < num_samplers
    owner = tl.load(sampler_request + at, mask=is_sampler, other=0)
    end = tl.load(row_indptr + owner + 1, mask=is_sampler, other=1)
    count = tl.load(drafts + owner, mask=is_sampler, other=0)
    accepted = _accepted(first_sampler, tokens, sampled, end - count, count, is_sampler, max_drafts)
    row = tl.load(sampler_row + at, mask=is_sampler, other=0)
    tl.store(target + tokens_at + at, tl.load(sampled + at, mask=is_sampler, other=0), mask=is_sampler)
    tl.store(target + live_at + at, (row <= end - count - 1 + accepted).to(tl.int32), mask=is_sampler)


@triton.jit
def _accepted(first_sampler, tokens, sampled, first_draft, count, is_lane, max_drafts):
    """Drafts before the first that differs from the token sampled one row earlier."""
    accepted = count * 0
    agrees = count * 0 + 1
    for place in range(max_drafts):
        is_draft = is_lane & (place < count) & (first_draft + place > 0)
        sampler = tl.load(first_sampler + first_draft + place - 1, mask=is_draft, other=-1)
        drawn = tl.load(sampled + sampler, mask=sampler >= 0, other=-1)
        draft = tl.load(tokens + first_draft + place, mask=is_draft, other=-2)
        agrees = agrees & (drawn == draft).to(tl.int32)
        accepted += agrees
    return accepted
