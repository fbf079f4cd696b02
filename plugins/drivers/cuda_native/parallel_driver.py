"""A driver over several ranks: what it is told, the other ranks are told first, and all of them do it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Event, Thread, Timer
from time import sleep
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.driver import CacheSpace, DriverCapabilities
from pie_core.contracts.forward import ForwardBatch, ForwardResult
from pie_core.errors import EngineLost, ForwardError, LoadError
from pie_core.ids import Ticket
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.framing import read_call, write_call
from pie_plugins.drivers.cuda_native.parallel import give_up_sums, leave, leave_at_once

WORKER = "pie_plugins.drivers.cuda_native.worker"
LEAVE_S = 10.0  # how long a worker may take to end by itself
NOTICED_S = 0.2  # after a sum that failed, until the end of the rank that it was for is known
LOOK_S = 20e-6  # between two looks at a step that somebody waits for


class Worker:
    """One other rank, in a process of its own."""

    def __init__(self, rank: int, setup: dict[str, Any]) -> None:
        self.rank = rank
        command = [sys.executable, "-m", WORKER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with suppress(BrokenPipeError):  # it ended at once, which its answer will say
            self.tell("load", setup)

    def tell(self, name: str, *arguments: Any) -> None:
        """Raises OSError once the rank has ended."""
        write_call(_pipe(self._process.stdin), name, *arguments)

    def wait_until_loaded(self) -> None:
        """Raises LoadError."""
        try:
            self.answer()
        except EngineLost as error:
            raise LoadError(f"{error}; it had not loaded its part of the model") from error

    def answer(self) -> Any:
        """What the last call that has an answer gave. LoadError if it could not load, EngineLost if it has ended."""
        found = read_call(_pipe(self._process.stdout))
        if found is None:
            code = self._process.wait()
            raise EngineLost(
                f"driver cuda_native: rank {self.rank} ended with exit code {code}; see its output"
            )
        name, (value,) = found
        if name == "failed":
            raise LoadError(f"driver cuda_native: rank {self.rank}: {value}")
        return value

    def has_ended(self, within_s: float = 0.0) -> bool:
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def let_end(self) -> None:
        """It is told nothing more, so it closes its driver and leaves the others."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # what it was told last never reached it
                _pipe(pipe).close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self.let_end()
        if not self.has_ended(LEAVE_S):
            self.kill()


@contextmanager
def watched(workers: Sequence[Worker]) -> Iterator[None]:
    """While this rank loads, its sums do not wait for a rank that has ended."""
    is_over = Event()

    def watch() -> None:
        while not is_over.wait(NOTICED_S):
            if any(worker.has_ended() for worker in workers):
                give_up_sums()
                return

    Thread(target=watch, name="pie-ranks", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


class ParallelDriver(CudaNativeDriver):
    """Rank 0. Where one rank does not do what another does, sums wait for ever; so the first step that fails as a whole
    is the last, and from then on the device is treated as one that has faulted."""

    def __init__(self, own: CudaNativeDriver, workers: Sequence[Worker]) -> None:
        super().__init__(_whole(own.capabilities, len(workers) + 1), *own.parts())
        self._workers = workers

    def submit(self, batch: ForwardBatch) -> Ticket:
        self._check_open()
        self._tell("submit", batch)
        return super().submit(batch)

    def is_done(self, ticket: Ticket) -> bool:
        return super().is_done(ticket) or self.is_lost or self._waits_for_nobody()

    def collect(self, ticket: Ticket) -> ForwardResult:
        is_open = ticket in self._open
        while not super().is_done(ticket) and not self.is_lost:
            if self._waits_for_nobody():
                raise self._part(f"step {ticket} needs", None)
            sleep(LOOK_S)
        try:
            return super().collect(ticket)
        except ForwardError as error:
            if not is_open:
                raise
            if self._waits_for_nobody(NOTICED_S):
                raise self._part(f"step {ticket} needs", error) from error
            self._lose(f"step {ticket} failed on one rank and left the others behind", error)
            raise

    def _waits_for_nobody(self, within_s: float = 0.0) -> bool:
        """A rank has ended, so sums of steps that are queued never end."""
        return any(worker.has_ended(within_s) for worker in self._workers)

    def _part(self, what: str, error: Exception | None) -> EngineLost:
        gone = ", ".join(str(worker.rank) for worker in self._workers if worker.has_ended())
        return self._lose(f"rank {gone} has ended, which {what}", error)

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._cache(group).check_pages([*sources, *targets])
        self._tell("copy_pages", group, list(sources), list(targets))
        super().copy_pages(group, sources, targets)

    def swap_out(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        self._swappable(group, pages, host_pages)
        self._tell("swap_out", group, list(pages), list(host_pages))
        super().swap_out(group, pages, host_pages)

    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        self._swappable(group, pages, host_pages)
        self._tell("swap_in", group, list(host_pages), list(pages))
        super().swap_in(group, host_pages, pages)

    def export_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        """Every rank's part of a page side by side, in the order of the ranks."""
        self._cache(group).check_pages(pages)
        self._tell("export_pages", group, list(pages))
        own = super().export_pages(group, pages)
        return np.concatenate([own, *(worker.answer() for worker in self._workers)], axis=1)

    def import_pages(self, group: int, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        cache = self._cache(group)
        cache.check_pages(pages)
        own, *others = np.split(content, len(self._workers) + 1, axis=1)
        cache.check_content(pages, own)
        for worker, part in zip(self._workers, others, strict=True):
            self._tell_one(worker, "import_pages", group, list(pages), np.ascontiguousarray(part))
        super().import_pages(group, pages, own)

    def close(self) -> None:
        super().close()
        workers, self._workers = self._workers, ()
        for worker in workers:
            worker.let_end()
        with _ending(workers):
            (leave_at_once if self.is_lost else leave)()

    def _tell(self, name: str, *arguments: Any) -> None:
        for worker in self._workers:
            self._tell_one(worker, name, *arguments)

    def _tell_one(self, worker: Worker, name: str, *arguments: Any) -> None:
        self._check_not_lost()
        try:
            worker.tell(name, *arguments)
        except OSError as error:
            raise self._lose(f"rank {worker.rank} has ended", error) from error


@contextmanager
def _ending(workers: Sequence[Worker]) -> Iterator[None]:
    """They have ended behind it, whatever happens inside. Ranks leave each other together: NCCL waits inside for one
    that does not, until that one is killed."""

    def kill() -> None:
        for worker in workers:
            worker.kill()

    late = Timer(LEAVE_S, kill)
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
        for worker in workers:
            worker.end()


def _whole(capabilities: DriverCapabilities, size: int) -> DriverCapabilities:
    """One rank's cache as that of all."""
    spaces: list[CacheSpace] = []
    for space in capabilities.cache:
        spaces.append(replace(space, group=replace(space.group, unit_bytes=space.group.unit_bytes * size)))
    return replace(capabilities, cache=tuple(spaces))


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
