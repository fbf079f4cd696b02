"""Triton kernels of decode attention: as many programs as the GPU holds share all tiles of columns of a step evenly.

`list_tiles_kernel` runs once a step and writes down, for every tile of columns of every request, all that a program has
to know of it. `decode_kernel` runs once a layer: a program belongs to one key head and takes a stretch of the list,
whatever requests it crosses, so that all end at the same time however lengths differ. A request that lies within one
program is answered there. Of one that several share, each leaves its part, and the last of them to arrive adds the
parts up in the order of the list.

An entry is a tile: 0 the request's first row, 1 its rows, 2 its columns from this tile on, 3 the tile's number in the
request, 4 the request's tiles, 5 where in a page the tile begins, 6 and 7 nothing, from 8 on the tile's pages.

Shapes and the running softmax are those of `triton_attention`, but for the parts: [2 programs, ROWS, DIMS] float32.
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import triton
import triton.language as tl

from pie_plugins.drivers.cuda_native.triton_launches import follow, let_next_begin


@triton.jit(do_not_specialize=["num_requests", "rows_each"])
def list_tiles_kernel(
    columns,
    row_indptr,
    page_indptr,
    page_list,
    work,
    num_requests,
    rows_each,
    COUNTERS: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    HEADER: tl.constexpr,
    TILES: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """`work`: how many tiles there are, counters of arrivals (zero), the entries. Listed are requests of at most
    `rows_each` rows."""
    request, share = tl.program_id(0), tl.program_id(1)
    before, mine, whole = 0, 0, 0
    for start in range(0, num_requests, REQUESTS):
        at = start + tl.arange(0, REQUESTS)
        is_request = at < num_requests
        count = tl.load(row_indptr + at + 1, mask=is_request, other=0)
        count -= tl.load(row_indptr + at, mask=is_request, other=0)
        tiles = tl.cdiv(tl.load(columns + at, mask=is_request, other=0), COLUMNS)
        tiles = tl.where((count > 0) & (count <= rows_each), tiles, 0)
        before += tl.sum(tl.where(at < request, tiles, 0))
        mine += tl.sum(tl.where(at == request, tiles, 0))
        whole += tl.sum(tiles)
    if (request == 0) & (share == 0):
        tl.store(work, whole)
        counter = tl.arange(0, COUNTERS)
        tl.store(work + HEADER + counter, 0 * counter)
    first = tl.load(row_indptr + request)
    total = tl.load(columns + request)
    listed = tl.load(page_indptr + request)
    word = tl.arange(0, WORDS)[None, :]
    for start in range(share * TILES, mine, TILES * tl.num_programs(1)):
        number = start + tl.arange(0, TILES)[:, None]
        entry = tl.where(word == 0, first, tl.load(row_indptr + request + 1) - first)
        entry = tl.where(word == 2, total - number * COLUMNS, entry)
        entry = tl.where(word == 3, number, entry)
        entry = tl.where(word == 4, mine, entry)
        entry = tl.where(word == 5, number * COLUMNS % PAGE, entry)
        page = number * COLUMNS // PAGE + word - 8
        is_page = (word >= 8) & (word < 8 + PAGES) & (page * PAGE < total)
        entry = tl.where(word < 8, entry, tl.load(page_list + listed + page, mask=is_page, other=0))
        tl.store(work + HEADER + COUNTERS + (before + number) * WORDS + word, entry, mask=number < mine)


@triton.jit
def decode_kernel(
    q,
    q_stride,
    pages,
    work,
    out,
    partial,
    partial_max,
    partial_sum,
    scale,
    num_kv_heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    HEADER: tl.constexpr,
    COUNTERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Every program has two places for parts: the first and the last request of its stretch may go on elsewhere.

    The list is read before the kernels ahead are done: it was finished before the first layer began."""
    let_next_begin(OVERLAPS)
    tiles = tl.load(work)
    share = tl.cdiv(tiles, tl.num_programs(0) // num_kv_heads)
    kv_head = tl.program_id(0) % num_kv_heads  # programs side by side read the same pages
    first = tl.program_id(0) // num_kv_heads * share
    if first >= tiles:  # its place is free at once, for the weights of the kernel behind this one
        if tiles == 0:  # a kernel must not be done before those ahead are, and here nobody else waits
            follow(OVERLAPS)
        return
    last = tl.minimum(first + share, tiles) - 1
    entries = work + HEADER + COUNTERS
    flat = tl.arange(0, ROWS)
    row, head = flat // GROUP, kv_head * GROUP + flat % GROUP
    dim, column = tl.arange(0, DIMS), tl.arange(0, COLUMNS)
    half = num_kv_heads * PAGE * DIM  # keys lie before values
    in_page = (kv_head * PAGE + column % PAGE)[:, None] * DIM + dim[None, :]
    in_rows = (row * q_stride + head * DIM)[:, None] + dim[None, :]
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIMS], tl.float32)
    token, count, left, offset, listed = _entry(entries + first * WORDS, True, PAGES)
    if OVERLAPS:
        _fetch_ahead(pages, listed, kv_head * PAGE + offset, half, DIM, PAGE, PAGES, COLUMNS)
    follow(OVERLAPS)
    for at in range(first, last + 1):
        is_cached = (column < left)[:, None] & (dim < DIM)[None, :]
        place = _page_places(pages, listed, column, 2 * half, DIM, PAGE, PAGES) + (in_page + offset * DIM)
        keys = tl.load(place, mask=is_cached, other=0.0)
        values = tl.load(place + half, mask=is_cached, other=0.0)
        is_value = (row < count)[:, None] & (dim < DIM)[None, :]
        query = tl.load(q + token.to(tl.int64) * q_stride + in_rows, mask=is_value, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        visible = column[None, :] < (left - count + 1 + row)[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1) * scale)
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores * scale - safe[:, None])
        decay = tl.exp2(best - safe)
        norm = norm * decay + tl.sum(weights, 1)
        sums = tl.dot(weights.to(values.dtype), values, sums * decay[:, None], input_precision=PRECISION)
        best = new_best
        is_end = left <= COLUMNS
        if is_end | (at == last):
            begin = at - tl.load(entries + at * WORDS + 3)
            if is_end & (begin >= first):
                row_head = (token + row).to(tl.int64) * (num_kv_heads * GROUP) + head
                answer = sums / tl.where(norm == 0.0, 1.0, norm)[:, None]
                tl.store(out + row_head[:, None] * DIM + dim[None, :], answer, mask=is_value)
            else:
                part = (2 * tl.program_id(0) + (begin > first).to(tl.int32)) * ROWS + flat
                tl.store(partial + part[:, None] * DIMS + dim[None, :], sums, mask=is_value)
                tl.store(partial_max + part, best, mask=row < count)
                tl.store(partial_sum + part, norm, mask=row < count)
            best = tl.full([ROWS], float("-inf"), tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            sums = tl.zeros([ROWS, DIMS], tl.float32)
        token, count, left, offset, listed = _entry(entries + (at + 1) * WORDS, at < last, PAGES)
    begin, end = _request(entries + first * WORDS, first)
    last_begin, last_end = _request(entries + last * WORDS, last)
    is_open = (begin < first) | (end > last + 1)
    is_last_open = (last_begin > begin) & (last_end > last + 1)
    if is_open | is_last_open:
        tl.debug_barrier()
    if is_open:
        _arrive(
            work, out, partial, partial_max, partial_sum, kv_head, num_kv_heads, share, begin, end,
            GROUP, DIM, DIMS, ROWS, WORDS, HEADER, COUNTERS, MEMBERS, PARTS,
        )  # fmt: skip
    if is_last_open:
        _arrive(
            work, out, partial, partial_max, partial_sum, kv_head, num_kv_heads, share, last_begin, last_end,
            GROUP, DIM, DIMS, ROWS, WORDS, HEADER, COUNTERS, MEMBERS, PARTS,
        )  # fmt: skip


@triton.jit
def _entry(entry, is_there, PAGES: tl.constexpr):
    """What the loop has to know of a tile, all zero behind the end, where pipelining runs ahead. It is loaded one tile
    before it is used: of numbers used at once the pipeline would make copies of their own, in place of the keys'."""
    listed = (tl.load(entry + 8, mask=is_there, other=0),)
    for at in tl.static_range(1, PAGES):
        listed = listed + (tl.load(entry + 8 + at, mask=is_there, other=0),)
    return (
        tl.load(entry, mask=is_there, other=0),
        tl.load(entry + 1, mask=is_there, other=0),
        tl.load(entry + 2, mask=is_there, other=0),
        tl.load(entry + 5, mask=is_there, other=0),
        listed,
    )


@triton.jit
def _page_places(pages, listed, column, size, DIM: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr):
    """[COLUMNS, 1]: where the page of each column begins. Chosen among numbers that all lanes have, which costs less
    than an address computed for each."""
    ALIGNED: tl.constexpr = DIM & -DIM  # noqa: N806  or newer compilers load word by word
    place = (listed[0].to(tl.int64) * size)[None, None]
    for at in tl.static_range(1, PAGES):
        place = tl.where((column // PAGE == at)[:, None], listed[at].to(tl.int64) * size, place)
    return pages + tl.multiple_of(tl.broadcast_to(place, [column.shape[0], 1]), [ALIGNED, ALIGNED])


@triton.jit
def _fetch_ahead(
    pages,
    listed,
    row,
    half,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Brings the first tile into the second cache while the kernels ahead run. A hint: what they still write of it is
    right there, too."""
    LINES: tl.constexpr = 2 * COLUMNS // PAGES  # noqa: N806  of a page, or of the part of one
    line = tl.arange(0, 2 * COLUMNS)
    place = listed[0].to(tl.int64) * (2 * half) + line % LINES * (DIM // 2)
    for at in tl.static_range(1, PAGES):
        place = tl.where(
            line // LINES == at, listed[at].to(tl.int64) * (2 * half) + line % LINES * (DIM // 2), place
        )
    for side in tl.static_range(2):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pages + place + row * DIM + side * half],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _request(entry, at):
    """The first tile of the request of tile `at`, and the one behind its last."""
    begin = at - tl.load(entry + 3)
    return begin, begin + tl.load(entry + 4)


@triton.jit
def _arrive(
    work,
    out,
    partial,
    partial_max,
    partial_sum,
    kv_head,
    num_kv_heads,
    share,
    begin,
    end,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    HEADER: tl.constexpr,
    COUNTERS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One part of the request with tiles `begin` … `end` - 1 is there. Once all are, adds them up and resets the
    counter, which is the one of the first part's place."""
    low, high = begin // share, (end - 1) // share
    counter = work + HEADER + 2 * (low * num_kv_heads + kv_head) + (low * share < begin).to(tl.int32)
    if tl.atomic_add(counter, 1) == high - low:
        tl.store(counter, 0)
        entry = work + HEADER + COUNTERS + begin * WORDS
        token, count = tl.load(entry), tl.load(entry + 1)
        member, dim = tl.arange(0, MEMBERS), tl.arange(0, DIMS)
        for row in range(count):
            best = tl.full([MEMBERS], float("-inf"), tl.float32)
            norm = tl.zeros([MEMBERS], tl.float32)
            sums = tl.zeros([MEMBERS, DIMS], tl.float32)
            for start in range(low, high + 1, PARTS):
                stretch = start + tl.arange(0, PARTS)
                place = 2 * (stretch * num_kv_heads + kv_head) + (stretch * share < begin).to(tl.int32)
                part = place[:, None] * ROWS + (row * GROUP + member)[None, :]
                is_part = (stretch <= high)[:, None] & (member < GROUP)[None, :]
                is_value = is_part[:, :, None] & (dim >= 0)[None, None, :]
                # past the first cache, which may hold what lay there before
                bests = tl.load(partial_max + part, mask=is_part, other=float("-inf"), cache_modifier=".cg")
                norms = tl.load(partial_sum + part, mask=is_part, other=0.0, cache_modifier=".cg")
                from_parts = partial + part[:, :, None] * DIMS + dim[None, None, :]
                values = tl.load(from_parts, mask=is_value, other=0.0, cache_modifier=".cg")
                new_best = tl.maximum(best, tl.max(bests, 0))
                safe = tl.where(new_best == float("-inf"), 0.0, new_best)
                weight = tl.exp2(bests - safe[None, :])
                decay = tl.exp2(best - safe)
                norm = norm * decay + tl.sum(norms * weight, 0)
                sums = sums * decay[:, None] + tl.sum(values * weight[:, :, None], 0)
                best = new_best
            place = (token + row).to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + member
            is_value = (member < GROUP)[:, None] & (dim < DIM)[None, :]
            answer = sums / tl.where(norm == 0.0, 1.0, norm)[:, None]
            tl.store(out + place[:, None] * DIM + dim[None, :], answer, mask=is_value)
