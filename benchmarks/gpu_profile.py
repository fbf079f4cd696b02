"""Where the time of a decode step goes: kernels and gaps as the GPU's own trace has them, and the host's calls.

    python -m benchmarks.gpu_profile --models 0.6B 8B --batches 1 256 [--prompt 128] [--temperature 0] --json FILE

A trace covers some steps in the middle of a run. `inside` is what lies between two kernels of one step, `between` what
lies between the last kernel of a step and the first of the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import load_driver
from benchmarks.gpu_loop import Contexts, Story, prefill
from benchmarks.gpu_models import SHAPES
from pie_core.contracts.driver import Driver
from pie_core.ids import Ticket

WARM_STEPS = 64
TRACED_STEPS = 12


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel or a copy as the device ran it, microseconds."""

    name: str
    start: float
    end: float


@dataclass(slots=True)
class Profile:
    """One cell; all times are microseconds of one step."""

    model: str
    batch: int
    step: float = 0.0
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (launches, all of them)
    inside: float = 0.0
    between: list[float] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        busy = sum(total for _, total in self.kernels.values())
        yield (
            f"{self.model} batch {self.batch}: step {self.step:.0f} us = kernels {busy:.0f} + inside"
            f" {self.inside:.0f} + between {median(self.between or [0.0]):.1f} (p50; largest"
            f" {max(self.between, default=0.0):.1f})"
        )
        yield "  host: " + ", ".join(f"{name} {us:.0f} us" for name, us in self.host.items())
        for name, (launches, total) in sorted(self.kernels.items(), key=lambda each: -each[1][1])[:18]:
            share = total / max(self.step, 1e-9)
            yield f"  {total:9.1f} us  {share:5.1%}  x{launches:<6.1f} {total / launches:8.2f}  {name[:84]}"


def main() -> None:
    arguments = _parse()
    found: list[Profile] = []
    for name in arguments.models:
        with TemporaryDirectory() as folder:
            driver = load_driver(SHAPES[name].write(Path(folder)), arguments.device, arguments.option)
            for batch in arguments.batches:
                found.append(_profile(driver, name, batch, arguments))
                print("\n".join(found[-1].lines()), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")
            driver.close()
            del driver


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["0.6B"], choices=sorted(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a driver option, as JSON"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _profile(driver: Driver, model: str, batch: int, arguments: argparse.Namespace) -> Profile:
    stories = [Story(arguments.prompt, 2 * WARM_STEPS + TRACED_STEPS + 8)] * batch
    contexts = Contexts(driver.capabilities, stories, arguments.temperature)
    prefill(driver, contexts)
    steps = _Steps(driver, contexts, np.arange(batch))
    steps.run(WARM_STEPS)
    steps.times.clear()
    steps.run(WARM_STEPS)
    found = Profile(model, batch)
    found.host = {name: 1e6 * median(seconds) for name, seconds in steps.times.items()}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        steps.run(TRACED_STEPS)
        torch.cuda.synchronize()
    steps.drain()
    _fill(found, _launches(trace))
    return found


class _Steps:
    """Decoding with one step queued behind the open one, and what each call on the host took."""

    def __init__(self, driver: Driver, contexts: Contexts, chosen: np.ndarray) -> None:
        self._driver, self._contexts, self._chosen = driver, contexts, chosen
        self._open: list[Ticket] = []
        self.times: dict[str, list[float]] = defaultdict(list)

    def run(self, count: int) -> None:
        for _ in range(count):
            self._timed("submit", self._submit)
            if len(self._open) > 1:
                self._timed("collect (waits for the GPU)", self._collect)

    def drain(self) -> None:
        while self._open:
            self._collect()

    def _timed(self, name: str, call: Callable[[], None]) -> None:
        started = time.perf_counter()
        call()
        self.times[name].append(time.perf_counter() - started)

    def _submit(self) -> None:
        self._open.append(self._contexts.decode(self._driver, self._chosen))

    def _collect(self) -> None:
        failed = self._driver.collect(self._open.pop(0)).failed
        assert not failed, failed


def _launches(trace: profile) -> list[Launch]:
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    return sorted(
        (
            Launch(event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3)
            for event in events
            if event.device_type() == DeviceType.CUDA and event.duration_ns()
        ),
        key=lambda launch: launch.start,
    )


def _fill(found: Profile, launches: Sequence[Launch]) -> None:
    """A step begins with the copy of its numbers to the device."""
    begins = [place for place, each in enumerate(launches) if "HtoD" in each.name]
    steps = [launches[first:stop] for first, stop in itertools.pairwise(begins)]
    steps = [step for step in steps if len(step) > 8]  # not the odd small copy
    if not steps:
        return
    found.step = (steps[-1][-1].end - steps[0][0].start) / len(steps)
    sums: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        for each in step:
            sums[each.name].append(each.end - each.start)
        found.inside += sum(
            max(0.0, later.start - earlier.end) for earlier, later in itertools.pairwise(step)
        ) / len(steps)
    found.kernels = {name: (len(each) / len(steps), sum(each) / len(steps)) for name, each in sums.items()}
    found.between = [later[0].start - earlier[-1].end for earlier, later in itertools.pairwise(steps)]


if __name__ == "__main__":
    main()
