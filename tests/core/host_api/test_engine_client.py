"""The worker's end of a port: what goes out when, and who hears the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pie_core.engine.messages import (
    Answer,
    Command,
    EventSink,
    Generate,
    Generated,
    ModelInfo,
    Progress,
    ReadStatus,
    SamplerSpec,
    Status,
    Stepped,
    Steps,
)
from pie_core.host_api.engine_client import EngineClient
from pie_core.ids import ContextId, RequestId
from pie_core.sandbox.pump import Pump, Ticker


class Port:
    """Keeps what is sent until it is told to hurry."""

    info = ModelInfo("m", "none", "none", 10, 10, 1, frozenset())
    is_ready = True

    def __init__(self) -> None:
        self.waiting: list[Command] = []
        self.taken: list[list[Command]] = []
        self._build: Callable[[], Command | None] = lambda: None
        self.sink: EventSink

    def listen(self, sink: EventSink) -> None:
        self.sink = sink

    def send(self, command: Command) -> None:
        self.waiting.append(command)

    def send_last(self, build: Callable[[], Command | None]) -> None:
        self._build = build

    def step_now(self, context: ContextId, token: int) -> None:
        """Nothing is known at once."""

    def hurry(self) -> None:
        last = self._build()
        self.taken.append(self.waiting if last is None else [*self.waiting, last])
        self.waiting = []

    async def close(self) -> None: ...


class Ear:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def hear(self, event: Answer) -> None:
        self.heard.append(event)

    def drew(self, token: int, length: int) -> None:
        self.heard.append((token, length))


class Program:
    """Does something whenever it is resumed."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do

    def resume(self) -> bool:
        self.do()
        return False


def with_pump(scenario: Callable[[Port, EngineClient, Pump], None]) -> None:
    async def main() -> None:
        ticker, port = Ticker(lambda: None), Port()
        pump = Pump(ticker)
        try:
            scenario(port, EngineClient(port, programs=pump), pump)
        finally:
            ticker.stop()

    asyncio.run(main())


def test_what_programs_send_while_they_are_resumed_goes_out_once_when_all_have_had_their_say() -> None:
    def scenario(port: Port, client: EngineClient, pump: Pump) -> None:
        for context in (5, 6):
            pump.wake(Program(lambda context=context: client.step(ContextId(context), 1, Ear())))  # type: ignore[misc]
        pump.wake(Program(lambda: client.request(ReadStatus, lambda event: event)))
        pump.wake(Program(lambda: client.step(ContextId(7), 2, Ear())))
        pump.run()
        (taken,) = port.taken
        assert [type(each) for each in taken] == [Steps, ReadStatus, Steps]
        assert [each.contexts for each in taken if isinstance(each, Steps)] == [[5, 6], [7]]

    with_pump(scenario)


def test_what_is_sent_from_outside_waits_for_the_ports_own_turn() -> None:
    def scenario(port: Port, client: EngineClient, pump: Pump) -> None:
        client.step(ContextId(5), 1, Ear())
        client.request(ReadStatus, lambda event: event)
        assert port.taken == []
        pump.wake(Program(lambda: client.step(ContextId(6), 1, Ear())))
        pump.run()
        assert [len(each) for each in port.taken] == [3]

    with_pump(scenario)


def test_whom_an_answer_wakes_has_asked_for_more_before_the_answer_is_dealt_with() -> None:
    def scenario(port: Port, client: EngineClient, pump: Pump) -> None:
        program = Program(lambda: client.step(ContextId(5), 1, Ear()))
        client.request(ReadStatus, lambda event: pump.wake(program))
        port.sink((_status(RequestId(1)),))
        assert [len(each) for each in port.taken] == [2], "the request, and what its answer brought about"

    with_pump(scenario)


def test_each_hears_its_own_part_of_an_answer_to_many() -> None:
    def scenario(port: Port, client: EngineClient, pump: Pump) -> None:
        turns, stream = [Ear(), Ear()], Ear()
        requests = [client.step(ContextId(place), place, ear) for place, ear in enumerate(turns)]
        generation = client.stream(
            lambda request: Generate(request, ContextId(9), (1,), SamplerSpec(), (), 0), stream
        )
        progress = Progress([generation], [70], [8], [8])
        port.sink((progress, Stepped(requests[::-1], [21, 11], [4, 3], [4, 3]), progress))
        assert [ear.heard for ear in turns] == [[(11, 3)], [(21, 4)]]
        assert stream.heard == [(70, 8), (70, 8)]
        assert client.open_requests == 1
        last = Generated(generation, [71], "stop", 9, 9)
        port.sink((last,))
        assert stream.heard[2:] == [last]
        assert client.open_requests == 0

    with_pump(scenario)


def _status(request: RequestId) -> Status:
    return Status(request, 0, 0, 0, [], [], 0, 0, 0.0)
