"""Suspending calls of handles and numbers, as Python serves them and as the optional piece in C notes them down."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.host_calls import HANDLE_CALLS, HANDLE_IMPORTS, HANDLES, LOCALS, loop
from pie_core.errors import Cancelled, GuestTrap, OutOfPages, ProgramError
from pie_core.sandbox import quick_calls
from pie_core.sandbox.fibers import FiberError
from pie_core.sandbox.guest import Guest
from pie_core.sandbox.hosting import Interface, Pending
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.program import Program
from pie_core.sandbox.quick_calls import masks_of
from pie_core.sandbox.runtime import Runtime
from pie_core.sandbox.selftest import try_quick_calls
from pie_core.sandbox.signatures import our_interfaces
from tests.core.sandbox.scenarios import Scenario, State, drive
from tests.core.sandbox.test_guest import SPIN
from tests.core.sandbox.wat_guests import run, wat_guest

STEP_IMPORT = '(import "host" "step" (func $step (param i32 i32 i32 i32)))'
STEP = """(call $step (local.get $context) (local.get $token) (local.get $sampler) (i32.const 120))
      (local.set $token (i32.load (i32.const 124)))"""
TRAP_IF_REFUSED = "(if (i32.load8_u (i32.const 120)) (then unreachable))"


@pytest.fixture(params=["Python", "C"])
def library(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    if request.param == "Python":
        return None
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    monkeypatch.setenv("PIE_HOME", str(tmp_path))
    return quick_calls.build()


class Thing:
    """A model, a context or a sampler."""


class Host:
    """What `step` does is the test's; it keeps with what it was called."""

    def __init__(self, answer: Callable[[Any, int], Pending[int] | int]) -> None:
        self.seen: list[tuple[object, int, object]] = []
        self.answer = answer

    def step(self, guest: State, context: Thing, token: int, sampler: Thing) -> Pending[int] | int:
        self.seen.append((context, token, sampler))
        return self.answer(guest, token)

    def interfaces(self) -> list[Interface]:
        model, context, forward = (Interface(name) for name in ("model", "context", "forward"))
        for interface, resource in ((model, "model"), (context, "context"), (forward, "sampler")):
            interface.resource(resource, Thing)
        model.function("model.load")(lambda guest, name: Thing())
        context.function("context.create")(lambda guest, model: Thing())
        forward.function("[constructor]sampler")(lambda guest: Thing())
        forward.function("step", suspends=True)(self.step)
        return [model, context, forward]


def stepping(count: int, after: str = TRAP_IF_REFUSED, between: str = "") -> bytes:
    return wat_guest(
        run(HANDLES + loop(count, STEP + after + between), locals_=LOCALS),
        [*HANDLE_CALLS, "forward/step"],
        HANDLE_IMPORTS + STEP_IMPORT,
    )


def with_host(host: Host, library: Path | None, scenario: Scenario) -> Any:
    return drive(scenario, *host.interfaces(), quick_calls=library)


def resolve(batch: list[tuple[Pending[int], int]]) -> None:
    for pending, token in batch:
        pending.resolve(token + 1)


def after_a_while(guest: State, token: int) -> Pending[int]:
    pending: Pending[int] = Pending()
    asyncio.get_running_loop().call_soon(pending.resolve, token + 1)
    return pending


def test_a_guest_gets_what_it_waited_for_and_its_handles_are_the_same_things(library: Path | None) -> None:
    host = Host(after_a_while)

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, stepping(50))
        async with program.start(State()) as guest:
            await guest.call("run", "")

    with_host(host, library, scenario)
    assert [token for _, token, _ in host.seen] == list(range(50))
    assert len({id(context) for context, _, _ in host.seen}) == 1
    assert len({id(sampler) for _, _, sampler in host.seen}) == 1
    assert host.seen[0][0] is not host.seen[0][2]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_known_at_once_does_not_have_to_be_waited_for(library: Path | None, wrapped: bool) -> None:
    host = Host(lambda guest, token: Pending.of(token + 2) if wrapped else token + 2)

    async def scenario(runtime: Runtime) -> None:
        async with (await Program.load(runtime, stepping(20))).start(State()) as guest:
            await guest.call("run", "")

    with_host(host, library, scenario)
    assert [token for _, token, _ in host.seen] == list(range(0, 40, 2))


def test_guests_side_by_side_get_their_own_answers(library: Path | None) -> None:
    waiting: list[tuple[Pending[int], int]] = []

    def gather(guest: State, token: int) -> Pending[int]:
        pending: Pending[int] = Pending()
        waiting.append((pending, token))
        if len(waiting) == 8:
            batch = waiting.copy()
            waiting.clear()
            asyncio.get_running_loop().call_soon(resolve, batch)
        return pending

    host = Host(gather)

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, stepping(30))
        guests = [program.start(State(f"{place}")) for place in range(8)]
        await asyncio.gather(*(guest.call("run", "") for guest in guests))
        for guest in guests:
            guest.close()

    with_host(host, library, scenario)
    by_context: dict[int, list[int]] = {}
    for context, token, _ in host.seen:
        by_context.setdefault(id(context), []).append(token)
    assert list(by_context.values()) == [list(range(30))] * 8


@pytest.mark.parametrize("at_once", [True, False])
def test_a_refusal_reaches_the_guest_as_its_error(library: Path | None, at_once: bool) -> None:
    def refuse(guest: State, token: int) -> Pending[int]:
        if at_once:
            raise OutOfPages("no room")
        pending: Pending[int] = Pending()
        asyncio.get_running_loop().call_soon(pending.fail, OutOfPages("no room"))
        return pending

    host = Host(refuse)
    copy_error = """(if (i32.eqz (i32.load8_u (i32.const 120))) (then unreachable))
      (i32.store8 (i32.const 16) (i32.const 1))
      (memory.copy (i32.const 20) (i32.const 124) (i32.const 16))
      (return (i32.const 16))"""

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, stepping(1, after=copy_error))
        async with program.start(State()) as guest:
            with pytest.raises(OutOfPages, match="no room"):
                await guest.call("run", "")

    with_host(host, library, scenario)


def test_a_host_function_that_breaks_is_the_servers_fault_and_no_guests_end(
    library: Path | None, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(guest: State, token: int) -> int:
        raise ZeroDivisionError

    host = Host(broken)

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(
            runtime, stepping(3, after="(if (i32.eqz (i32.load8_u (i32.const 120))) (then unreachable))")
        )
        async with program.start(State()) as guest:
            await guest.call("run", "")

    with_host(host, library, scenario)
    assert len(host.seen) == 3
    assert "ZeroDivisionError" in caplog.text


def test_a_number_that_does_not_fit_is_refused(library: Path | None) -> None:
    host = Host(lambda guest, token: 1 << 40)

    async def scenario(runtime: Runtime) -> None:
        async with (await Program.load(runtime, stepping(1))).start(State()) as guest:
            with pytest.raises(GuestTrap):
                await guest.call("run", "")

    with_host(host, library, scenario)


def test_a_guest_is_ended_while_it_waits_and_what_comes_later_is_nobodys(library: Path | None) -> None:
    pendings: list[Pending[int]] = []
    asked = asyncio.Event()

    def never(guest: State, token: int) -> Pending[int]:
        pendings.append(Pending())
        asked.set()
        return pendings[-1]

    host = Host(never)

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, stepping(1))
        guest = program.start(State())
        task = asyncio.ensure_future(guest.call("run", ""))
        await asyncio.wait_for(asked.wait(), 10)
        guest.cancel(Cancelled("enough"))
        with pytest.raises(Cancelled, match="enough"):
            await task
        assert pendings[0].abandoned
        pendings[0].resolve(1)

    with_host(host, library, scenario)


def test_a_guest_can_be_ended_by_its_own_host_function(library: Path | None) -> None:
    guests: list[Guest] = []

    def end(guest: State, token: int) -> Pending[int]:
        guests[0].cancel(Cancelled("by itself"))
        return Pending()

    host = Host(end)

    async def scenario(runtime: Runtime) -> None:
        guests.append((await Program.load(runtime, stepping(5))).start(State()))
        with pytest.raises(Cancelled, match="by itself"):
            await guests[0].call("run", "")

    with_host(host, library, scenario)
    assert len(host.seen) == 1


def test_a_guest_that_spins_behind_its_calls_is_interrupted_and_others_go_on(library: Path | None) -> None:
    host = Host(after_a_while)

    async def scenario(runtime: Runtime) -> None:
        spinning = await Program.load(runtime, stepping(1, between=SPIN))
        stepper = await Program.load(runtime, stepping(200))
        endless = spinning.start(State(), Limits(cpu_seconds_per_resume=60.0))
        task = asyncio.ensure_future(endless.call("run", ""))
        async with stepper.start(State()) as guest:
            await asyncio.wait_for(guest.call("run", ""), 30)
        endless.cancel(Cancelled("enough"))
        with pytest.raises(Cancelled):
            await task

    with_host(host, library, scenario)


def test_which_functions_can_be_noted_down() -> None:
    forward = our_interfaces()["inferlet:api/forward"].functions
    assert masks_of(forward["step"]) == [0, 0xFFFFFFFF, 0]
    assert masks_of(forward["[method]pending-pass.tokens"]) == [0]
    assert masks_of(forward["[method]forward-pass.input"]) is None, "a list"
    assert masks_of(our_interfaces()["inferlet:api/poll"].functions["wait"]) is None, (
        "it cannot tell of an error"
    )


def test_without_a_compiler_the_piece_in_c_is_told_to_be_optional(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIE_HOME", str(tmp_path))
    with pytest.raises(ProgramError, match="pie works without"):
        quick_calls.build("no-such-compiler")
    assert not quick_calls.library_path().exists()


def test_a_server_builds_it_once_and_does_without_where_it_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PIE_HOME", str(tmp_path))
    quick_calls.built_library.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert quick_calls.build_if_possible("no-such-compiler") is None
        assert "no C compiler 'no-such-compiler'" in caplog.text
        if shutil.which("cc") is None:
            pytest.skip("no C compiler here")
        built = quick_calls.build_if_possible()
        assert built == quick_calls.library_path() == quick_calls.built_library()
        assert quick_calls.build_if_possible("no-such-compiler") == built, "it is there already"
        assert [each.name for each in built.parent.iterdir()] == [built.name]
    finally:
        quick_calls.built_library.cache_clear()


def test_a_library_that_misbehaves_is_found_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    broken = tmp_path / "broken.c"
    source = quick_calls.SOURCE.read_text()
    assert "held & mask" in source
    broken.write_text(source.replace("held & mask", "held & (mask << 8)"))
    monkeypatch.setenv("PIE_HOME", str(tmp_path))
    monkeypatch.setattr(quick_calls, "SOURCE", broken)
    with pytest.raises(FiberError, match="saw another argument"):
        try_quick_calls(quick_calls.build())
