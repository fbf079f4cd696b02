"""Histories in processes of their own: seeds go in as lines, outcomes come back as lines.

    in_processes ──seeds──► python -m pie_core.testing.simulate --job ──one JSON line for each history──► in order

A process that dies while it runs a history takes that history along, as a failure of its seed, and is replaced.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import FrameType

import msgspec

SEEDS_OF_A_CHUNK = 20
PATIENCE_S = 30.0  # of processor time, for one history

_COMMAND = (sys.executable, "-m", "pie_core.testing.simulate", "--job")


class Outcome(msgspec.Struct, frozen=True):
    """What became of one history."""

    seed: int
    failure: str | None
    counts: dict[str, int]


# ---- the process that wants them


def in_processes(seeds: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """The outcomes in the order of the seeds, whichever process ran them."""
    chunks = [seeds[first : first + SEEDS_OF_A_CHUNK] for first in range(0, len(seeds), SEEDS_OF_A_CHUNK)]
    idle: SimpleQueue[Job] = SimpleQueue()
    running = [Job() for _ in range(min(max(jobs, 1), len(chunks)))]
    for job in running:
        idle.put(job)
    threads = ThreadPoolExecutor(max(len(running), 1))
    try:
        results = [threads.submit(_run_chunk, chunk, idle) for chunk in chunks]
        for result in results:
            yield from result.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for job in running:
            job.end()


def _run_chunk(seeds: Sequence[int], idle: SimpleQueue[Job]) -> list[Outcome]:
    job = idle.get()
    try:
        return [job.run(seed) for seed in seeds]
    finally:
        idle.put(job)


class Job:
    """One process, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, seed: int) -> Outcome:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(b"%d\n" % seed)
            process.stdin.flush()
        except BrokenPipeError:
            return self._lost(seed)
        line = process.stdout.readline()
        return msgspec.json.decode(line, type=Outcome) if line else self._lost(seed)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def _lost(self, seed: int) -> Outcome:
        assert self._process is not None
        status = self._process.wait()
        self.end()
        return Outcome(seed, f"the process that ran it ended with status {status}", {})


# ---- the process that runs them


def run_as_job(run: Callable[[int], Outcome]) -> None:
    """Reads seeds from standard input until it ends. A history that goes on for ever fails by `TimeoutError`."""
    logging.disable(logging.WARNING)  # faults are what histories are about
    signal.signal(signal.SIGVTALRM, _out_of_patience)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE_S)
        outcome = run(int(line))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
        sys.stdout.buffer.flush()


def _out_of_patience(_: int, frame: FrameType | None) -> None:
    where = "" if frame is None else f", now at {frame.f_code.co_filename}:{frame.f_lineno}"
    raise TimeoutError(f"it has run for {PATIENCE_S:g} s of processor time{where}")
