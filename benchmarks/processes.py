"""What an engine in a process of its own costs for each step, and how soon its loss is known and made good.

    python -m benchmarks.processes [--quick] [--json FILE]

Rounds: so many contexts, each asking for its next pass as soon as it has the last one's token, on the dummy driver with
steps of no time, so that what is left is the host's. The same rounds go over a port of this process and over one to
another process, in turns; a figure is the median of several. Losses: from the signal to the last `engine-lost`, and
until the model is loaded again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pie_core.contracts.driver import DriverRequest, Progress
from pie_core.engine.engine import Engine
from pie_core.engine.local_port import LocalPort
from pie_core.engine.messages import (
    Answer,
    CreateContext,
    DropContext,
    Event,
    Forward,
    Generate,
    ReadStatus,
    Sample,
    SamplerSpec,
)
from pie_core.engine.options import EngineOptions
from pie_core.host_api.engine_client import EngineClient
from pie_core.ids import ContextId, ProcessId, Tenant
from pie_core.plugins import load_plugins
from pie_core.processes.messages import LoadModel
from pie_core.processes.remote_port import RemotePort

Port = LocalPort | RemotePort

_GREEDY = (Sample(0, SamplerSpec()),)
_ENGINE = EngineOptions(speculation_depth=0)  # what runs ahead would hide the way there and back


def ignore_progress(_: Progress) -> None:
    """Nobody watches."""


def local_port() -> LocalPort:
    registry = load_plugins()
    dummy = registry.driver("dummy")
    request = DriverRequest(
        None, "cpu", dummy.options(vocab_size=1000), registry.architectures, registry.media
    )
    return LocalPort(Engine(dummy.load(request), _ENGINE, "dummy"))


async def remote_port() -> RemotePort:
    asked = LoadModel("dummy", "dummy", None, "cpu", {"vocab_size": 1000}, _ENGINE, logging.CRITICAL)
    return await RemotePort.start(asked, ignore_progress)


class Rounds:
    """Contexts on one port that go on in step."""

    def __init__(self, port: Port) -> None:
        self._client = EngineClient(port)
        self._done = asyncio.Event()
        self._left = 0

    async def ask(self, times: int) -> float:
        """Microseconds of asking for a status: there and back without a step."""
        begin = time.perf_counter()
        for _ in range(times):
            self._left = 1
            self._done.clear()
            self._client.request(lambda request: ReadStatus(request=request), self._end)
            await self._done.wait()
        return (time.perf_counter() - begin) / times * 1e6

    async def step(self, contexts: int, rounds: int) -> float:
        """Microseconds a round of passes."""
        opened = [self._open() for _ in range(contexts)]
        self._left = contexts
        self._done.clear()
        begin = time.perf_counter()
        for context in opened:
            self._forward(context, rounds)
        await self._done.wait()
        elapsed = time.perf_counter() - begin
        for context in opened:
            self._client.send(DropContext(context))
        return elapsed / rounds * 1e6

    def generate_without_end(self, contexts: int) -> None:
        self._left = contexts
        self._done.clear()
        for _ in range(contexts):
            context = self._open()
            self._client.stream(
                lambda request, context=context: Generate(request, context, (1,), SamplerSpec(), (), 0),  # type: ignore[misc]
                self,
            )

    async def all_ended(self) -> None:
        await self._done.wait()

    def _open(self) -> ContextId:
        context = self._client.new_context_id()
        self._client.send(CreateContext(context, ProcessId("benchmark"), Tenant("t"), 7))
        return context

    def _forward(self, context: ContextId, rounds: int) -> None:
        def again(event: Event) -> None:
            if rounds > 1:
                self._forward(context, rounds - 1)
            else:
                self._end(event)

        self._client.request(lambda request: Forward(request, context, (1,), samples=_GREEDY), again)

    def drew(self, token: int, length: int) -> None:
        """A generation goes on."""

    def hear(self, event: Answer) -> None:
        """What else there is of a generation."""
        if getattr(event, "finish", "failed") is not None:
            self._end(event)

    def _end(self, _: Event) -> None:
        self._left -= 1
        if not self._left:
            self._done.set()


async def measured(quick: bool) -> dict[str, Any]:
    return {"steps": await _steps(quick), "losses": await _losses(quick)}


async def _steps(quick: bool) -> list[dict[str, Any]]:
    rounds, repeats = (30, 3) if quick else (100, 5)
    ports: list[Port] = [local_port(), await remote_port()]
    here, there = (Rounds(port) for port in ports)
    try:
        rows = [
            _row("status", 0, [(await here.ask(rounds), await there.ask(rounds)) for _ in range(repeats)])
        ]
        for contexts in (1, 8) if quick else (1, 8, 64, 256):
            pairs = [
                (await here.step(contexts, rounds), await there.step(contexts, rounds))
                for _ in range(repeats)
            ]
            rows.append(_row("passes", contexts, pairs))
        return rows
    finally:
        for port in ports:
            await port.close()


def _row(what: str, contexts: int, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    local, remote = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "what": what,
        "contexts": contexts,
        "local_us": round(local, 1),
        "remote_us": round(remote, 1),
        "added_us": round(remote - local, 1),
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
    print(f"{'a round of':<10} {'contexts':>8} {'here µs':>9} {'there µs':>9} {'added µs':>9}")
    for row in found["steps"]:
        print(
            f"{row['what']:<10} {row['contexts']:>8} {row['local_us']:>9} {row['remote_us']:>9} {row['added_us']:>9}"
        )
    for row in found["losses"]:
        print(
            f"{row['signal']}: known after {row['known_ms']} ms, ready again after {row['ready_again_ms']} ms"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
