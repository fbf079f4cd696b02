"""A simulation of engine, pages and scheduler on the dummy driver: virtual clock, seeded faults, every token checked.

    python -m pie_core.testing.simulate --histories 10000 --seed 0

Each seed is one history (`simulated_history`), which depends on it alone: a failure is replayed with
`--histories 1 --seed SEED`. Histories run in as many processes as there are processors; what comes out does not depend
on their number. Ends with how often each thing happened, and with `N passed, N failed`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pie_core.cli.progress import ProgressDisplay
from pie_core.contracts.driver import DriverDeclaration, Progress
from pie_core.plugins import load_plugins
from pie_core.testing.simulated_history import COVERAGE, History
from pie_core.testing.simulation_jobs import Outcome, in_processes, run_as_job

DRAWN_EVERY = 10  # histories: drawing the bar costs as much as a step
COVERED_AT = 1000  # histories, in which everything has to happen


@dataclass(slots=True)
class Report:
    passed: int = 0
    failures: dict[int, str] = field(default_factory=dict)  # by seed
    coverage: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.coverage.update(outcome.counts)
        if outcome.failure is None:
            self.passed += 1
        else:
            self.failures[outcome.seed] = outcome.failure

    @property
    def never_happened(self) -> list[str]:
        return [name for name in COVERAGE if not self.coverage[name]]


def simulate(histories: int, seed: int) -> Report:
    """Runs the histories of these seeds in this process."""
    report, declaration = Report(), load_plugins().driver("dummy")
    for number in range(seed, seed + histories):
        report.add(run_history(number, declaration))
    return report


def run_history(seed: int, declaration: DriverDeclaration) -> Outcome:
    try:
        history = History(seed, declaration)
        history.run()
    except Exception as error:  # whatever goes wrong belongs to this seed
        return Outcome(seed, f"{type(error).__name__}: {error}", {})
    return Outcome(seed, None, dict(history.counts))


def simulate_in_jobs(histories: int, seed: int, jobs: int, tell: Callable[[str], None]) -> Report:
    """Likewise in processes; each failure is told as it comes, in the order of the seeds."""
    report, display = Report(), ProgressDisplay()
    try:
        for done, outcome in enumerate(in_processes(range(seed, seed + histories), jobs), start=1):
            report.add(outcome)
            if done % DRAWN_EVERY == 0 or done in (1, histories):
                display(Progress("histories", done, histories, unit="history"))
            if outcome.failure is not None:
                if sys.stderr.isatty():
                    display.close()  # the bar stands where the line is to be written
                tell(f"seed {outcome.seed}: {outcome.failure}")
    finally:
        display.end()
    return report


def main() -> None:
    arguments = _parse()
    if arguments.job:
        declaration = load_plugins().driver("dummy")
        run_as_job(lambda seed: run_history(seed, declaration))
        return
    report = simulate_in_jobs(arguments.histories, arguments.seed, arguments.jobs, print)
    for name in COVERAGE:
        print(f"{name:18} {report.coverage[name]}")
    missing = report.never_happened if arguments.histories >= COVERED_AT else []
    if missing:
        print(f"never happened in {arguments.histories} histories: {', '.join(missing)}")
    if report.failures:
        print(f"failing seeds: {' '.join(map(str, sorted(report.failures)))}")
    print(f"{report.passed} passed, {len(report.failures)} failed")
    sys.exit(bool(report.failures or missing))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pie_core.testing.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first history; the next ones count up")
    parser.add_argument(
        "--jobs", type=int, default=_processors(), help="processes; all processors if not given"
    )
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
