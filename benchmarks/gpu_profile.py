"""Where the time of a decode step goes: kernels and gaps as the GPU's own trace has them, and the host's calls.

    python -m benchmarks.gpu_profile --models 0.6B 8B --batches 1 256 [--prompt 128] [--temperature 0] --json FILE

A trace covers some steps in the middle of a run. A kernel has the time from the end of the one before it, or from its
own start where that is later; many begin early and wait. `inside` is what lies between two kernels of one step,
`between` what lies between the last kernel of a step and the first of the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import numpy as np
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_driver import driver_arguments, loaded
from benchmarks.gpu_loop import Contexts, Story, prefill
from benchmarks.gpu_models import SHAPES
from pie_core.contracts.driver import Driver
from pie_core.ids import Ticket

WARM_STEPS = 64
TRACED_STEPS = 12
LEAST_LAUNCHES = 8  # of a step


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
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (launches, time of all)
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
    arguments = driver_arguments(__doc__, batches=(1, 256)).parse_args()
    found: list[Profile] = []
    for name in arguments.models:
        with loaded(SHAPES[name], arguments.device, arguments.option) as driver:
            for batch in arguments.batches:
                found.append(_profile(driver, name, batch, arguments))
                print("\n".join(found[-1].lines()), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


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
    fill(found, _launches(trace))
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


def fill(found: Profile, launches: Sequence[Launch]) -> None:
    """A step begins with the copy of its numbers to the device. A kernel that began while the one before it ran has
    only the time that it alone took, so that all of them and the gaps add up to the step."""
    begins = [place for place, each in enumerate(launches) if "HtoD" in each.name]
    steps = [launches[first:stop] for first, stop in itertools.pairwise(begins)]
    steps = [step for step in steps if len(step) > LEAST_LAUNCHES]  # not the odd small copy
    if not steps:
        return
    sums: dict[str, list[float]] = defaultdict(list)
    until = steps[0][0].start
    for step in steps:
        found.between.append(step[0].start - until)
        until = step[0].start
        for each in step:
            found.inside += max(0.0, each.start - until) / len(steps)
            sums[each.name].append(max(0.0, each.end - max(each.start, until)))
            until = max(until, each.end)
    found.between.pop(0)  # nothing lies before the first
    found.step = (until - steps[0][0].start) / len(steps)
    found.kernels = {name: (len(each) / len(steps), sum(each) / len(steps)) for name, each in sums.items()}


if __name__ == "__main__":
    main()
