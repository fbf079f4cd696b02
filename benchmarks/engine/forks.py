"""Forks of one prompt: how many pages they take together, and whether the driver is told what they share.

    python -m benchmarks.engine.forks [--quick] [--json FILE]

A context of some thousand rows is forked N times, and each fork goes its own way for some rows. The goal: its pages are
counted once, plus those of each fork's own rows (a page that is shared in part is copied by all but one). In decode
steps of all forks, passes with a prefix in common should be adjacent and named as a group.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.engine.command import Results, run, say
from benchmarks.engine.direct import DirectEngine
from pie_core.contracts.forward import ForwardBatch
from pie_core.engine.options import EngineOptions

PAGE = 16
SHARED_ROWS = 1000  # the last page of them is shared in part
OWN_ROWS = 40


@dataclass(frozen=True, slots=True)
class Forks:
    forks: int
    pages: int
    expected_pages: int
    grouped: float  # of the passes of decode steps, how many stand in a group
    shared_rows: float  # ... and how many rows of each are named as shared, at the median step


def measured(forks: int) -> Forks:
    direct = DirectEngine(
        EngineOptions(max_batch_tokens=8192, max_batch_requests=1024, speculation_depth=0),
        num_pages=32768,
        page_size=PAGE,
    )
    parent = direct.create()
    direct.run(direct.forward(parent, tuple(3 + row % 400 for row in range(SHARED_ROWS)), sampled=False))
    children = [direct.fork(parent) for _ in range(forks)]
    direct.watch()
    for row in range(OWN_ROWS):
        direct.run(*(direct.forward(child, (5 + (child + row) % 400,)) for child in children))
    status = direct.status()
    decode = [each for each in direct.batches if each.num_requests == forks]
    return Forks(
        forks=forks,
        pages=status.total_pages[0] - status.free_pages[0],
        expected_pages=_expected(forks),
        grouped=_grouped(decode),
        shared_rows=_shared_rows(decode),
    )


def _expected(forks: int) -> int:
    full, behind = divmod(SHARED_ROWS, PAGE)
    own = -(-(behind + OWN_ROWS) // PAGE)
    return full + (1 if behind else 0) + forks * own  # the parent keeps its last page


def _grouped(batches: list[ForwardBatch]) -> float:
    grouped = sum(int((each.prefixes.stop - each.prefixes.first).sum()) for each in batches)
    return grouped / max(sum(each.num_requests for each in batches), 1)


def _shared_rows(batches: list[ForwardBatch]) -> float:
    rows = [int(each.prefixes.rows.max()) if len(each.prefixes.rows) else 0 for each in batches]
    return float(sorted(rows)[len(rows) // 2]) if rows else 0.0


async def measure(quick: bool) -> Results:
    rows = [measured(forks) for forks in ((1, 10) if quick else (1, 10, 100, 1000))]
    for row in rows:
        say(
            f"{row.forks:5} forks: {row.pages} pages, {row.expected_pages} expected; "
            f"{row.grouped:.1%} of the passes grouped, over {row.shared_rows:.0f} rows"
        )
    return {"forks": [asdict(row) for row in rows]}


def main(arguments: list[str] | None = None) -> None:
    run("forks", __doc__, measure, arguments)


if __name__ == "__main__":
    main()
