"""Guests suspend, spin, fail and end without touching one another."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import pytest

from pie_core.errors import (
    Cancelled,
    DeadlineExceeded,
    GuestError,
    GuestTrap,
    LimitExceeded,
    NotFound,
    OutOfPages,
    PieError,
)
from pie_core.sandbox.guest import Guest
from pie_core.sandbox.hosting import Interface, Pending
from pie_core.sandbox.limits import Limits
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from tests.core.sandbox.scenarios import State, call, drive, interfaces
from tests.core.sandbox.wat_guests import ERROR_TEXT, RETURN_ERROR, RETURN_INPUT, run, wat_guest

HOUR = 3600 * 10**9
WAIT = '(import "host" "wait" (func $wait (param i32 i32 i32 i64 i32)))'
TIMER = '(import "host" "timer" (func $timer (param i64) (result i32)))'
SLEEP = "(call $wait (i32.const 0) (i32.const 0) (i32.const 1) (i64.const {ns}) (i32.const 100))"
SPIN = "(loop $for_ever (br $for_ever))"


def sleeper(nanoseconds: int) -> bytes:
    return wat_guest(run(SLEEP.format(ns=nanoseconds), RETURN_INPUT), ["poll/wait"], WAIT)


def echo() -> bytes:
    return wat_guest(run("", RETURN_INPUT))


def spinner() -> bytes:
    return wat_guest(run(SPIN, "unreachable"))


def test_a_guest_returns_what_it_was_given() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, echo())
        text = "Straße " + "x" * 100_000
        assert program.world == "inferlet"
        assert await call(program, text) == text

    drive(scenario)


def test_the_error_of_a_guest_is_raised_as_its_class() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, wat_guest(run("", RETURN_ERROR) + ERROR_TEXT))
        state = State()
        async with program.start(state) as guest:
            for _ in range(2):  # an error is an answer: the guest lives on
                with pytest.raises(GuestError, match="it broke"):
                    await guest.call("run", "")
            assert state.closed == 0
        assert state.closed == 1

    drive(scenario)


def test_a_sleeping_guest_holds_nobody_back() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, sleeper(HOUR))
        quick = await Program.load(runtime, sleeper(10**6))
        sleeping = program.start(State())
        task = asyncio.ensure_future(sleeping.call("run", ""))
        assert await asyncio.gather(*(call(quick, str(i)) for i in range(20))) == [str(i) for i in range(20)]
        sleeping.cancel(Cancelled("enough"))
        with pytest.raises(Cancelled, match="enough"):
            await task

    drive(scenario)


def test_a_spinning_guest_holds_neither_guests_nor_the_loop_back() -> None:
    async def scenario(runtime: Runtime) -> None:
        spinning = [(await Program.load(runtime, spinner())).start(State()) for _ in range(2)]
        tasks = [asyncio.ensure_future(guest.call("run", "")) for guest in spinning]
        quick = await Program.load(runtime, sleeper(10**6))
        for text in ("a", "b", "c"):
            assert await call(quick, text) == text
        assert not any(task.done() for task in tasks)
        for guest in spinning:
            guest.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, Cancelled)

    drive(scenario)


def test_a_spinning_guest_ends_at_its_deadline() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, spinner())
        with pytest.raises(DeadlineExceeded, match=r"cpu_seconds_per_resume is 0\.05"):
            await call(program, cpu_seconds_per_resume=0.05)

    drive(scenario)


def test_a_program_that_spins_while_it_starts_ends_at_its_deadline() -> None:
    starting = f"(func $start {SPIN}) (start $start)"

    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(DeadlineExceeded):
            await call(
                await Program.load(runtime, wat_guest(run("") + starting)), cpu_seconds_per_resume=0.05
            )

    drive(scenario)


def test_a_guest_that_spins_again_after_a_long_pause_still_ends_at_its_deadline() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(
            runtime, wat_guest(run(SLEEP.format(ns=250_000_000) + SPIN, "unreachable"), ["poll/wait"], WAIT)
        )
        with pytest.raises(DeadlineExceeded):  # the epoch thread rested meanwhile
            await call(program, cpu_seconds_per_resume=0.05)

    drive(scenario)


def test_cpu_time_counts_anew_after_each_suspension() -> None:
    count_down = "(loop $w (br_if $w (local.tee $i (i32.sub (local.get $i) (i32.const 1)))))"
    work = "(local.set $i (i32.const 30000000))" + count_down
    turns = "".join(work + SLEEP.format(ns=1000) for _ in range(12))

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(
            runtime, wat_guest(run(turns, RETURN_INPUT, "(local $i i32)"), ["poll/wait"], WAIT)
        )
        begin = time.thread_time()
        assert await call(program, "done") == "done"
        whole = time.thread_time() - begin
        assert await call(program, "done", cpu_seconds_per_resume=whole / 2) == "done"

    drive(scenario)


def test_a_guest_ends_at_its_wall_time_though_it_only_waits() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, sleeper(HOUR))
        with pytest.raises(DeadlineExceeded, match="wall_seconds"):
            await call(program, wall_seconds=0.05)

    drive(scenario)


def test_cancelling_the_awaiting_task_cancels_the_guest() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, sleeper(HOUR))
        state = State()
        task = asyncio.ensure_future(program.start(state).call("run", ""))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert state.closed == 1

    drive(scenario)


def test_an_ended_guest_refuses_to_be_called_and_says_why_it_ended() -> None:
    async def scenario(runtime: Runtime) -> None:
        guest = (await Program.load(runtime, echo())).start(State())
        guest.cancel(Cancelled("the user left"))
        guest.cancel(Cancelled("too late to matter"))
        with pytest.raises(GuestError, match="the user left"):
            await guest.call("run", "")

    drive(scenario)


def test_two_calls_at_once_are_refused() -> None:
    async def scenario(runtime: Runtime) -> None:
        async with (await Program.load(runtime, sleeper(10**7))).start(State()) as guest:
            first = asyncio.ensure_future(guest.call("run", "one"))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="one at a time"):
                await guest.call("run", "two")
            assert await first == "one"
            assert await guest.call("run", "three") == "three"

    drive(scenario)


@pytest.mark.parametrize(
    ("body", "limits", "says"),
    [
        ("unreachable", {}, "it aborted"),
        ("(drop (i32.load (i32.const 0x7fffffff)))", {}, "outside its memory"),
        ("(drop (i32.div_u (i32.const 1) (i32.const 0)))", {}, "divide by zero"),
        ("(drop (call $again (i32.const 0)))", {}, "call stack of 1024 KiB is exhausted"),
        (
            "(loop $more (br_if $more (i32.ne (i32.const -1) (memory.grow (i32.const 16))))) unreachable",
            {"memory_bytes": 16 << 20},
            "limits.memory_bytes is 16 MiB",
        ),
    ],
)
def test_a_trap_ends_only_its_guest_and_is_explained(body: str, limits: dict[str, Any], says: str) -> None:
    deeper = "(call $again (i32.add (local.get 0) (i32.const 1)))"
    recursion = f"(func $again (param i32) (result i32) (i32.add {deeper} (i32.const 1)))"

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, wat_guest(recursion + run(body)))
        bystander = asyncio.ensure_future(call(await Program.load(runtime, sleeper(10**7)), "unharmed"))
        state = State("culprit")
        with pytest.raises(GuestTrap, match=says) as raised:
            await call(program, state=state, **limits)
        assert "culprit" in str(raised.value)
        assert state.closed == 1
        assert await bystander == "unharmed"

    drive(scenario)


def test_a_guest_that_does_not_fit_its_memory_limit_does_not_start() -> None:
    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(GuestTrap, match="needs more memory to start"):
            await call(await Program.load(runtime, echo()), memory_bytes=1000)

    drive(scenario)


@pytest.mark.parametrize(("status", "clean"), [("0", True), ("1", False)])
def test_exit_ends_a_guest_cleanly_only_with_status_zero(status: str, clean: bool) -> None:
    wasm = wat_guest(
        run(f"(call $exit (i32.const {status}))", "unreachable"),
        core_imports='(import "host" "exit" (func $exit (param i32)))',
        extra='(import "wasi:cli/exit@0.2.6" (instance $exit (export "exit" (func (param "status" (result))))))'
        '(core func $do_exit (canon lower (func $exit "exit")))',
        extra_host='(export "exit" (func $do_exit))',
    )

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, wasm)
        if clean:
            assert await call(program) is None
        else:
            with pytest.raises(GuestTrap, match="exited with status 1"):
                await call(program)

    drive(scenario)


def test_waiting_for_nothing_ends_the_guest_instead_of_hanging_it() -> None:
    body = "(call $wait (i32.const 0) (i32.const 0) (i32.const 0) (i64.const 0) (i32.const 100))"

    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(GuestTrap, match="would never return"):
            await call(await Program.load(runtime, wat_guest(run(body), ["poll/wait"], WAIT)))

    drive(scenario)


def test_a_dropped_handle_traps_only_the_guest_that_uses_it() -> None:
    body = """(local.set $t (call $timer (i64.const 1))) (call $drop (local.get $t))
      (i32.store (i32.const 64) (local.get $t))
      (call $wait (i32.const 64) (i32.const 1) (i32.const 0) (i64.const 0) (i32.const 100))"""
    imports = WAIT + TIMER + '(import "host" "drop pollable" (func $drop (param i32)))'
    wasm = wat_guest(
        run(body, locals_="(local $t i32)"), ["poll/wait", "poll/timer"], imports, drops=["poll/pollable"]
    )

    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(GuestTrap, match="unknown handle index"):
            await call(await Program.load(runtime, wasm))

    drive(scenario)


def test_more_handles_than_the_limit_end_the_guest() -> None:
    body = "(loop $more (drop (call $timer (i64.const 3600000000000))) (br $more))"

    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(LimitExceeded, match="holds 50 handles"):
            await call(
                await Program.load(runtime, wat_guest(run(body), ["poll/timer"], TIMER)), max_handles=50
            )

    drive(scenario)


# --- a model whose every behaviour the test decides ---

MODEL_CALLS = ["model/[static]model.load", "model/[method]model.describe"]
LOAD = '(import "host" "[static]model.load" (func $load (param i32 i32 i32)))'
DESCRIBE = '(import "host" "[method]model.describe" (func $describe (param i32 i32)))'
# Gives back what load gave: its error, or the model's description.
LOAD_AND_DESCRIBE = """(call $load (local.get $ptr) (local.get $len) (i32.const 200))
  (if (i32.load8_u (i32.const 200)) (then
    (i32.store8 (i32.const 16) (i32.const 1))
    (memory.copy (i32.const 20) (i32.const 204) (i32.const 16))
    (return (i32.const 16))))
  (call $describe (i32.load (i32.const 204)) (i32.const 24))
  (i32.store8 (i32.const 16) (i32.const 0)) (i32.store8 (i32.const 20) (i32.const 1))"""


def model_guest() -> bytes:
    return wat_guest(run(LOAD_AND_DESCRIBE, "(i32.const 16)"), MODEL_CALLS, LOAD + DESCRIBE)


class Model:
    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Models:
    """`load` answers with whatever the test puts into `pending` or `error`."""

    def __init__(self) -> None:
        self.interface = Interface("model")
        self.interface.resource("model", Model)
        self.interface.function("model.load", suspends=True)(self.load)
        self.interface.function("model.describe")(lambda guest, model: f"model {model.name}")
        self.error: BaseException | None = None
        self.pending: Pending[Model] | None = None
        self.made: list[Model] = []
        self.asked = asyncio.Event()

    def load(self, guest: State, name: str) -> Pending[Model] | Model:
        self.asked.set()
        if self.error is not None:
            raise self.error
        if self.pending is not None:
            return self.pending
        self.made.append(Model(name))
        return self.made[-1]


def test_a_host_function_may_answer_at_once_or_later() -> None:
    models = Models()

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, model_guest())
        assert await call(program, "tiny") == "model tiny"
        models.pending = Pending()
        models.asked.clear()
        task = asyncio.ensure_future(call(program, "later"))
        await models.asked.wait()
        await asyncio.sleep(0.02)
        assert not task.done()
        models.pending.resolve(Model("large"))
        assert await task == "model large"

    drive(scenario, models.interface)


def test_objects_that_a_guest_holds_are_closed_with_it() -> None:
    models = Models()

    async def scenario(runtime: Runtime) -> None:
        await call(await Program.load(runtime, model_guest()), "tiny")
        assert [model.closed for model in models.made] == [1]

    drive(scenario, models.interface)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (NotFound("no model nano; there is tiny"), NotFound, "no model nano; there is tiny"),
        (OutOfPages("none left"), OutOfPages, "none left"),
        (ZeroDivisionError("a bug of ours"), PieError, "^ZeroDivisionError in model.load; the server's log"),
    ],
)
def test_an_error_of_the_host_is_the_result_of_the_call(
    later: bool, error: Exception, kind: type[Exception], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models()
    if later:
        models.pending = Pending.failed(error)
    else:
        models.error = error

    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(kind, match=says):
            await call(await Program.load(runtime, model_guest()), "nano")

    drive(scenario, models.interface)
    assert ("a bug of ours" in caplog.text) == isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize("later", [False, True])
def test_a_value_that_is_none_of_the_functions_type_is_a_fault_of_the_host(
    later: bool, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models()
    models.interface.functions.pop("model.describe")
    models.interface.function("model.describe", suspends=later)(
        lambda guest, model: Pending.of(3) if later else 3
    )

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, model_guest())
        with pytest.raises(PieError, match=r"AttributeError in model\.describe; the server's log"):
            await call(program, "tiny")

    drive(scenario, models.interface)
    assert "'int' object has no attribute 'encode'" in caplog.text


def test_a_result_for_a_guest_that_is_gone_is_dropped() -> None:
    models = Models()
    told: list[str] = []
    models.pending = Pending(lambda: told.append("abandoned"))

    async def scenario(runtime: Runtime) -> None:
        guest = (await Program.load(runtime, model_guest())).start(State())
        task = asyncio.ensure_future(guest.call("run", "tiny"))
        await models.asked.wait()
        await asyncio.sleep(0)  # the host's answer is taken up
        guest.cancel()
        assert told == ["abandoned"]
        assert models.pending is not None
        models.pending.resolve(Model("nobody's"))
        with pytest.raises(Cancelled):
            await task

    drive(scenario, models.interface)


def test_a_guest_can_be_ended_from_inside_its_own_host_call() -> None:
    models = Models()

    async def scenario(runtime: Runtime) -> None:
        def load(state: State, name: str) -> Model:
            guest.cancel(Cancelled("from within"))
            return Model(name)

        models.interface.functions.pop("model.load")
        models.interface.function("model.load")(load)
        guest = (await Program.load(runtime, model_guest())).start(State())
        with pytest.raises(Cancelled, match="from within"):
            await guest.call("run", "tiny")

    drive(scenario, models.interface)


def test_a_keyboard_interrupt_in_a_host_function_reaches_the_loop_and_not_wasmtime() -> None:
    models = Models()
    models.error = KeyboardInterrupt()
    state = State()

    async def scenario(runtime: Runtime) -> None:
        await call(await Program.load(runtime, model_guest()), "tiny", state)

    with pytest.raises(KeyboardInterrupt):
        drive(scenario, models.interface)
    assert state.closed == 1


def test_hundreds_of_guests_leave_nothing_behind() -> None:
    models = Models()
    states = [State(str(index)) for index in range(300)]

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, model_guest())
        answers = await asyncio.gather(*(call(program, state.name, state) for state in states))
        assert answers == [f"model {state.name}" for state in states]

    drive(scenario, models.interface)
    assert all(state.closed == 1 for state in states)
    assert all(model.closed == 1 for model in models.made)


def test_ended_guests_are_freed_without_the_garbage_collector() -> None:
    """It would look at all that lives, again and again, for the sake of programs that come and go."""
    models = Models()
    here: list[int] = []

    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, model_guest())
        gc.collect()
        gc.disable()
        here.append(_count(Guest))
        await asyncio.gather(*(call(program, str(index), State(str(index))) for index in range(20)))
        await asyncio.sleep(0)
        here.append(_count(Guest))

    try:
        drive(scenario, models.interface)
    finally:
        gc.enable()
    before, after = here
    assert after <= before, "more than other tests have left"


def _count(kind: type) -> int:
    return sum(type(each) is kind for each in gc.get_objects())


def test_a_runtime_that_closes_ends_its_guests() -> None:
    async def scenario() -> None:
        runtime = Runtime(interfaces())
        state = State()
        program = await Program.load(runtime, spinner())
        task = asyncio.ensure_future(program.start(state, Limits()).call("run", ""))
        await asyncio.sleep(0.02)
        runtime.close()
        with pytest.raises(Cancelled):
            await task
        with pytest.raises(
            RuntimeError, match="a guest of 'the program' was started in a runtime that is closed"
        ):
            program.start(State())
        assert state.closed == 1

    asyncio.run(scenario())
