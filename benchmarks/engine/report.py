"""The figures of a whole run -> the section of docs/benchmarks.md between its two marks: goals, then tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine import grid
from benchmarks.engine.command import Results
from benchmarks.engine.guests import KINDS

BEGIN, END = "<!-- figures: engine -->", "<!-- end -->"

OFFLOADED, PYTHON, WAT = (kind.name for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Goal:
    what: str
    wanted: str
    found: str
    reached: bool | None  # None: nothing was asked for

    def row(self) -> str:
        verdict = {True: "reached", False: "**missed**", None: ""}[self.reached]
        return f"| {self.what} | {self.wanted} | {self.found} | {verdict} |"


def write_section(file: Path, results: Results) -> None:
    """Replaces what stands between the marks."""
    text = file.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(
            f"{file} has no {BEGIN!r} with an {END!r} behind it, between which figures could stand"
        )
    section = "\n".join(markdown(results))
    file.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")


def markdown(results: Results) -> Iterator[str]:
    yield from goals_table(results)
    yield "\nDriver busy over wall time, in percent. In parentheses: a step takes less than 1.3 times the host's work."
    yield "**Bold**: it takes longer, and yet the driver waited more than it should.\n"
    yield from grid.table(results["grid"])
    yield "\n![Driver utilisation over guests, one panel for each step time](frontier.svg)\n"
    yield from _host_work(results["grid"])
    yield from _hidden(results)
    yield from _oversubscription(results)
    yield from _latencies(results)
    yield from _workers(results)


# ---- goals


def goals_table(results: Results) -> Iterator[str]:
    yield "| | goal | found | |\n|---|---|---|---|"
    for goal in goals(results):
        yield goal.row()


def goals(results: Results) -> Iterator[Goal]:
    yield from _grid_goals(results["grid"], results.get("beside"))
    if "resume" in results:
        yield from _guest_goals(results)
        yield from _memory_goals(results)


def _grid_goals(found: Results, beside: Results | None) -> Iterator[Goal]:
    for kind, most in ((OFFLOADED, 0.5), (WAT, 8.0), (PYTHON, None)):
        if kind not in found["fits_us"]:
            continue
        a, b = found["fits_us"][kind]["a"], found["fits_us"][kind]["b"]
        wanted = "reported" if most is None else f"b at most {most:g} us"
        reached = None if most is None else b <= most
        yield Goal(f"host work of a step: {kind}", wanted, f"{a:.0f} us + {b:.2f} us a guest", reached)
    if beside is not None:
        a, b = (beside["fits_us"][WAT][part] for part in ("a", "b"))
        found_there = f"{a:.0f} us + {b:.2f} us a guest"
        yield Goal(f"host work of a step: {WAT}, `quick_calls` built", "b at most 8 us", found_there, b <= 8)
    for kind in (OFFLOADED, WAT):
        if kind not in found["fits_us"]:
            continue
        cells = [cell for cell in found["cells"] if cell["kind"] == kind and cell["hideable"]]
        busy = sum(cell["kept_busy"] for cell in cells)
        least = min((cell["decode"]["utilisation"] for cell in cells), default=1.0)
        wanted = f"{grid.SHARE_EXPECTED[kind]:.0%} where a step is long enough"
        yield Goal(
            f"driver busy: {kind}",
            wanted,
            f"{busy} of {len(cells)} cells; least {least:.1%}",
            busy == len(cells),
        )
    cells = [cell for cell in found["cells"] if cell["hideable"]]
    slow = [cell for cell in cells if cell["added_idle_us"] > 17]
    worst = max((cell["added_idle_us"] for cell in cells), default=0.0)
    yield Goal(
        "driver idle between steps, added to the bare loop, p50",
        "at most 17 us in every such cell",
        f"{len(cells) - len(slow)} of {len(cells)} cells; worst {worst:.0f} us",
        not slow,
    )


def _guest_goals(results: Results) -> Iterator[Goal]:
    taken, ahead = (results["resume"][label]["p50_us"] for label in ("taken", "computed ahead"))
    yield Goal("taking a result that has come, p50", "at most 10 us", f"{taken:.1f} us", taken <= 10)
    yield Goal(
        "a step that the engine has computed ahead, p50", "at most 10 us", f"{ahead:.0f} us", ahead <= 10
    )
    ratio = results["pauses"]["saturated"]["depth_4_over_depth_1"]
    yield Goal("depth 4 against depth 1, saturated", "never slower", f"{ratio:.3f} times", ratio >= 0.99)
    rate = min(row["hit_rate"] for row in results["pauses"]["plain"])
    yield Goal("passes computed ahead, plain decoding", "at least 99 %", f"{rate:.1%}", rate >= 0.99)
    moved = results["waiting"]["moved"]["period_p99_us"]
    yield Goal(
        f"{results['waiting']['waiting']} guests that wait for ever: the others' p99",
        "moves by at most 2 %",
        f"{moved:+.1%}",
        moved <= 0.02,
    )


def _memory_goals(results: Results) -> Iterator[Goal]:
    forks = results["forks"]["forks"]
    largest = forks[-1]
    yield Goal(
        f"pages of {largest['forks']} forks",
        f"shared + forks * own = {largest['expected_pages']}",
        str(largest["pages"]),
        all(row["pages"] == row["expected_pages"] for row in forks),
    )
    several = [row["grouped"] for row in forks if row["forks"] > 1]
    yield Goal("passes of forks handed over in groups", "all", f"{min(several):.0%}", min(several) == 1)
    completed = min(row["completed"] for row in results["oversubscription"]["rows"])
    most = max(row["oversubscription"] for row in results["oversubscription"]["rows"])
    yield Goal(
        f"memory wanted {most} times: programs that complete", "all", f"{completed:.0%}", completed == 1
    )
    long = results["evictions"]["evictions"]
    yield Goal(
        f"pages of a loop of {long['tokens']:,} tokens that evicts",
        "sink + window + 1, same tokens",
        f"{long['most_pages']}, {'same' if long['same_tokens'] else 'other'} tokens",
        long["same_tokens"] and long["most_pages"] <= long["pages_of_sink_and_window"] + 1,
    )
    for row in results["agent_session"]["rows"]:
        most = row["new_rows"] // 4 if _may_go(row) else 0
        yield Goal(
            f"agents, {row['turns']} turns, history {row['history']}, wanting {row['crowding']}x the pages: again",
            f"at most {most}, a quarter of what is new" if most else "nothing that was cached",
            f"{row['recomputed']} of {row['rows']} rows",
            row["recomputed"] <= most,
        )


def _may_go(row: Results) -> bool:
    """Between two turns only the cache holds what is sent again, and lets go of some where it has no copy elsewhere."""
    return bool(row["crowding"] > 1 and row["history"] == "sent again")


# ---- tables


def _host_work(found: Results) -> Iterator[str]:
    counts = sorted({cell["guests"] for cell in found["cells"]})
    yield "\nHost work of a step, CPU time in microseconds, median over the step times:\n"
    yield "| guests of | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts)
    for kind in KINDS:
        shown = []
        for count in counts:
            cells = [
                c["decode"]["host_us"]
                for c in found["cells"]
                if (c["kind"], c["guests"]) == (kind.name, count)
            ]
            shown.append(f"{sorted(cells)[len(cells) // 2]:.0f}" if cells else "")
        yield f"| {kind.name} | " + " | ".join(shown) + " |"


def _hidden(results: Results) -> Iterator[str]:
    if "pauses" not in results:
        return
    rows = results["pauses"]["hidden"]
    times = sorted({row["compute_ms"] for row in rows})
    yield "\nA guest that computes between two tokens, steps of 10 ms: how much of it is hidden.\n"
    yield "| depth | " + " | ".join(f"{each:g} ms" for each in times) + " |\n|---|" + "---|" * len(times)
    for depth in sorted({row["depth"] for row in rows}):
        hidden = {row["compute_ms"]: row["hidden"] for row in rows if row["depth"] == depth}
        yield f"| {depth} | " + " | ".join(f"{hidden[each]:.0%}" for each in times) + " |"


def _oversubscription(results: Results) -> Iterator[str]:
    if "oversubscription" not in results:
        return
    yield "\nMemory wanted so many times:\n"
    yield "| | completed | goodput | possible | suspended | swapped | rows computed again |"
    yield "|---|---|---|---|---|---|---|"
    for row in results["oversubscription"]["rows"]:
        yield (
            f"| {row['oversubscription']}x | {row['completed']:.0%} | {row['goodput']:.2f} | {row['possible']:.2f} "
            f"| {row['suspensions']} | {row['swapped']} | {row['replayed_tokens']} |"
        )


def _latencies(results: Results) -> Iterator[str]:
    if "latencies" not in results:
        return
    found = results["latencies"]
    yield "\nThe engine's CPU time, in microseconds, p50:\n"
    names = list(found["contexts"][0]["p50_us"])
    yield "| rows of the context | " + " | ".join(names) + " |\n|---|" + "---|" * len(names)
    for row in found["contexts"]:
        yield f"| {row['rows']} | " + " | ".join(f"{row['p50_us'][name]:.0f}" for name in names) + " |"
    forks = found["many_forks"]
    yield (
        f"\n{forks['forks']} forks of 1,000 rows take {forks['forking_ms']:.1f} ms, their first step "
        f"{forks['first_step_ms']:.1f} ms of the host's time.\n"
    )
    for row in found["launch"]:
        yield (
            f"- launch of a Python program beside {row['others']} guests: {row['p50_ms']:.1f} ms p50, "
            f"{row['p95_ms']:.1f} ms p95, {row['cpu_p50_ms']:.1f} ms of CPU time"
        )
    for row in found["memory"]:
        yield f"- {row['kind']}: {row['bytes_each'] / 1e3:.0f} kB for each of {row['guests']} suspended guests"


def _workers(results: Results) -> Iterator[str]:
    if "workers" not in results:
        return
    found = results["workers"]
    yield "\nPython guests with code per token, steps of 10 ms:\n"
    yield "| workers | guests | tok/s | driver busy | CPU time of the guests' processes, a token |"
    yield "|---|---|---|---|---|"
    for row in found["rows"]:
        yield (
            f"| {row['workers']} | {row['guests']} | {row['tokens_per_s']:.0f} | {row['utilisation']:.1%} "
            f"| {row['cpu_us_per_token']:.0f} us |"
        )
    needed = ", ".join(f"{workers} for {guests}" for guests, workers in found["workers_needed"].items())
    yield f"\nExtrapolated, workers that hide it on as many processors: {needed} guests."
