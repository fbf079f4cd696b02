"""What an engine in a process of its own costs for each step, and how soon its loss is known and made good.

    python -m benchmarks.processes [--quick] [--json FILE]

Rounds: so many contexts, each going on as soon as all have their tokens, on the dummy driver with steps of no time that
computes next to nothing, so that what is left is the host's. `passes` are one message for each context, `steps` one for
all of them. The same rounds go over a port of this process and over one to another process, in turns. A figure is
processor time of all threads, the median of several; `added` is what both processes take together beyond what one
takes. Losses: from the signal to the last `engine-lost`, and until the model is loaded again, in wall time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pie_core.contracts.driver import DriverRequest, Progress
from pie_core.engine.engine import Engine
from pie_core.engine.local_port import LocalPort
from pie_core.engine.messages import (
    Command,
    CreateContext,
    DropContext,
    Event,
    Forward,
    Generate,
    ReadStatus,
    Sample,
    SamplerSpec,
    Steps,
    ended_by,
    opened_by,
)
from pie_core.engine.options import EngineOptions
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant
from pie_core.plugins import load_plugins
from pie_core.processes.messages import LoadModel
from pie_core.processes.remote_port import RemotePort

Port = LocalPort | RemotePort

_DUMMY: dict[str, Any] = {"vocab_size": 1000, "interpret": False}
_GREEDY = (Sample(0, SamplerSpec()),)
_ENGINE = EngineOptions(speculation_depth=0)  # what runs ahead would hide the way there and back


def ignore_progress(_: Progress) -> None:
    """Nobody watches."""


def local_port() -> LocalPort:
    registry = load_plugins()
    dummy = registry.driver("dummy")
    request = DriverRequest(None, "cpu", dummy.options(**_DUMMY), registry.architectures, registry.media)
    return LocalPort(Engine(dummy.load(request), _ENGINE, "dummy"))


async def remote_port() -> RemotePort:
    asked = LoadModel("dummy", "dummy", None, "cpu", _DUMMY, _ENGINE, logging.CRITICAL)
    return await RemotePort.start(asked, ignore_progress)


class Rounds:
    """Contexts on one port that go on in step."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._numbers = itertools.count(1)
        self._done = asyncio.Event()
        self._left: set[RequestId] = set()
        self._go_on: Callable[[], None]
        self._rounds = 0
        port.listen(self._hear)

    async def ask(self, times: int) -> None:
        """Asks for a status: there and back without a step."""
        await self._repeat(times, lambda: self._send(ReadStatus(self._number())))

    async def passes(self, contexts: Sequence[ContextId], times: int) -> None:
        """A message for each context and round."""

        def again() -> None:
            for context in contexts:
                self._send(Forward(self._number(), context, (1,), samples=_GREEDY))

        await self._repeat(times, again)

    async def steps(self, contexts: Sequence[ContextId], times: int) -> None:
        """One message for each round; the contexts have had passes before."""
        await self._repeat(
            times,
            lambda: self._send(
                Steps([self._number() for _ in contexts], list(contexts), [1] * len(contexts))
            ),
        )

    def open(self, contexts: int) -> list[ContextId]:
        opened = [ContextId(next(self._numbers)) for _ in range(contexts)]
        for context in opened:
            self._port.send(CreateContext(context, ProcessId("benchmark"), Tenant("t"), 7))
        return opened

    def drop(self, contexts: Sequence[ContextId]) -> None:
        for context in contexts:
            self._port.send(DropContext(context))

    def generate_without_end(self, contexts: int) -> None:
        self._rounds, self._go_on = 1, lambda: None
        for context in self.open(contexts):
            self._send(Generate(self._number(), context, (1,), SamplerSpec(), (), 0))

    async def all_ended(self) -> None:
        await self._done.wait()
        self._done.clear()

    async def _repeat(self, times: int, go_on: Callable[[], None]) -> None:
        self._rounds, self._go_on = times, go_on
        go_on()
        await self.all_ended()

    def _number(self) -> RequestId:
        return RequestId(next(self._numbers))

    def _send(self, command: Command) -> None:
        self._left.update(opened_by((command,)))
        self._port.send(command)

    def _hear(self, events: Sequence[Event]) -> None:
        self._left.difference_update(ended_by(events))
        if self._left:
            return
        self._rounds -= 1
        if self._rounds:
            self._go_on()
        else:
            self._done.set()


@dataclass(frozen=True, slots=True)
class Spent:
    """Microseconds of processor time for each round."""

    ours: float
    engine: float  # of its process, if it has one

    @property
    def both(self) -> float:
        return self.ours + self.engine


async def spent(port: Port, rounds: int, work: Callable[[], Awaitable[None]]) -> Spent:
    pid = port.pid if isinstance(port, RemotePort) else None
    ours, engine = time.process_time_ns(), _spent_by(pid)
    await work()
    return Spent((time.process_time_ns() - ours) / rounds / 1000, (_spent_by(pid) - engine) / rounds / 1000)


def _spent_by(pid: int | None) -> int:
    """Nanoseconds on a processor, of all threads of a process."""
    if pid is None:
        return 0
    return sum(
        int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()
    )


async def measured(quick: bool) -> dict[str, Any]:
    return {"steps": await _steps(quick), "losses": await _losses(quick)}


async def _steps(quick: bool) -> list[dict[str, Any]]:
    rounds, repeats = (30, 3) if quick else (100, 7)
    ports: tuple[Port, Port] = (local_port(), await remote_port())
    sides = [(port, Rounds(port)) for port in ports]
    try:
        asked = [
            [await spent(port, rounds, lambda it=it: it.ask(rounds)) for port, it in sides]  # type: ignore[misc]
            for _ in range(repeats)
        ]
        rows = [_row("status", 0, asked)]
        for contexts in (1, 8) if quick else (1, 8, 64, 256):
            for what in ("passes", "steps"):
                pairs = [
                    [await _round(*side, what, contexts, rounds) for side in sides] for _ in range(repeats)
                ]
                rows.append(_row(what, contexts, pairs))
        return rows
    finally:
        for port in ports:
            await port.close()


async def _round(port: Port, it: Rounds, what: str, contexts: int, rounds: int) -> Spent:
    opened = it.open(contexts)
    await it.passes(opened, 1)
    go_on = it.passes if what == "passes" else it.steps
    found = await spent(port, rounds, lambda: go_on(opened, rounds))
    it.drop(opened)
    return found


def _row(what: str, contexts: int, pairs: Sequence[Sequence[Spent]]) -> dict[str, Any]:
    here = statistics.median(local.both for local, _ in pairs)
    added = statistics.median(remote.both - local.both for local, remote in pairs)
    return {
        "what": what,
        "contexts": contexts,
        "here_us": round(here, 1),
        "front_us": round(statistics.median(remote.ours for _, remote in pairs), 1),
        "engine_us": round(statistics.median(remote.engine for _, remote in pairs), 1),
        "added_us": round(added, 1),
        "added_us_per_context": round(added / max(contexts, 1), 2),
    }


async def _losses(quick: bool) -> list[dict[str, Any]]:
    log = logging.getLogger("pie_core.processes")
    level = log.level
    log.setLevel(logging.CRITICAL)  # each loss would be told
    try:
        return [await _loss(end, 1 if quick else 5) for end in (signal.SIGKILL, signal.SIGSTOP)]
    finally:
        log.setLevel(level)


async def _loss(end: signal.Signals, times: int) -> dict[str, Any]:
    known, back = [], []
    for _ in range(times):
        port = await remote_port()
        try:
            rounds = Rounds(port)
            rounds.generate_without_end(64)
            await asyncio.sleep(0.1)
            assert port.pid is not None
            begin = time.perf_counter()
            os.kill(port.pid, end)
            await rounds.all_ended()
            known.append(time.perf_counter() - begin)
            while not port.is_ready:  # noqa: ASYNC110 - another process brings it about
                await asyncio.sleep(0.005)
            back.append(time.perf_counter() - begin)
        finally:
            await port.close()
    return {"signal": end.name, "known_ms": _ms(max(known)), "ready_again_ms": _ms(max(back))}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a minute's work in seconds, with rougher figures"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    chosen = parser.parse_args(arguments)
    found = asyncio.run(measured(chosen.quick))
    columns = ("here_us", "front_us", "engine_us", "added_us", "added_us_per_context")
    heads = ("here µs", "front µs", "engine µs", "added µs", "a context")
    print(f"{'a round of':<10} {'contexts':>8}" + "".join(f" {head:>10}" for head in heads))
    for row in found["steps"]:
        print(f"{row['what']:<10} {row['contexts']:>8}" + "".join(f" {row[name]:>10}" for name in columns))
    for row in found["losses"]:
        print(
            f"{row['signal']}: known after {row['known_ms']} ms, ready again after {row['ready_again_ms']} ms"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
