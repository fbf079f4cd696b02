"""What a batch promises beyond its shapes, looked up in its arrays: for tests and simulations, not for every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pie_core.contracts.driver import CacheSpace
from pie_core.contracts.forward import ForwardBatch, PageTable


def broken_promises(batch: ForwardBatch, spaces: Sequence[CacheSpace]) -> list[str]:
    """Of `ForwardBatch.prefixes`: whole pages, listed without holes, the same in every paged and latent group."""
    groups = batch.prefixes
    columns = (groups.first.tolist(), groups.stop.tolist(), groups.rows.tolist())
    broken = list(_misplaced(batch, *columns[:2]))
    if not broken:
        for first, stop, rows in zip(*columns, strict=True):
            broken += _not_shared(batch, spaces, first, stop, rows)
    return broken


def _misplaced(batch: ForwardBatch, firsts: Sequence[int], stops: Sequence[int]) -> Iterator[str]:
    end = 0
    for first, stop in zip(firsts, stops, strict=True):
        if first < end:
            yield f"prefix group {first} to {stop} begins before {end}, where the one before it ends"
        if not first + 2 <= stop <= batch.num_requests:
            yield f"prefix group {first} to {stop}: expected two requests or more, of {batch.num_requests}"
        end = stop


def _not_shared(
    batch: ForwardBatch, spaces: Sequence[CacheSpace], first: int, stop: int, rows: int
) -> Iterator[str]:
    what = f"prefix group {first} to {stop} of {rows} rows"
    if not 0 < rows <= batch.kv_lengths[first:stop].min():
        yield f"{what}: expected rows that all of them had written before"
        return
    for table, space in zip(batch.cache, spaces, strict=True):
        if not isinstance(table, PageTable) or space.group.kind == "window":
            continue
        count, part = divmod(rows, space.page_size)
        if part:
            yield f"{what}: expected whole pages of {space.page_size} in cache group {space.group.name!r}"
        begins = table.indptr[first:stop]
        listed = [table.pages[begin : begin + count].tolist() for begin in begins]
        numbers = [table.logical[begin : begin + count].tolist() for begin in begins]
        if any(each != listed[0] for each in listed) or any(each != list(range(count)) for each in numbers):
            yield f"{what}: its requests have other pages, or holes, in cache group {space.group.name!r}"
