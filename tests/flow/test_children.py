"""Programs that launch programs, where there is no server: found by name, run like others, counted, and bounded."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pie_core.errors import LimitExceeded
from pie_core.program_store import ProgramStore
from pie_core.programs import find_program
from tests.flow.conftest import DUMMY, Pie, StartPie

Install = Callable[..., None]
OnPie = Callable[[Callable[[Pie], Any]], Any]

PRELUDE = """
import asyncio
from inferlet import Child, errors, launch, runtime, session

async def outcome(child):
    try:
        return await child
    except errors.InferletError as error:
        return error.code
"""

ECHO = """
from inferlet import runtime

def main(input):
    return {"input": input, "user": runtime.username(), "pid": runtime.instance_id(), "priority": runtime.priority()}
"""

FOREVER = """
import asyncio

async def main(input):
    await asyncio.sleep(3600)
"""

FAILS = """
def main(input):
    raise ValueError("no good")
"""

NESTS = """
from inferlet import errors, launch

async def main(input):
    if input["left"] == 0:
        return []
    try:
        child = launch("nests", {"left": input["left"] - 1})
    except errors.LimitExceeded as error:
        return [error.message]
    return [input["left"], *await child]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes source text a program that others find by name; `more` is the rest of its manifest."""
    monkeypatch.setenv("PIE_HOME", str(tmp_path / "home"))

    def add(name: str, source: str, more: str = "") -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "Pie.toml").write_text(f'[package]\nname = "{name}"\nversion = "1.0.0"\n{more}')
        (folder / "main.py").write_text(textwrap.dedent(source))
        ProgramStore().add(folder)

    return add


def test_a_child_gets_its_input_and_runs_for_the_same_user(on_pie: OnPie, install: Install) -> None:
    install("echo", ECHO)
    source = (
        PRELUDE
        + """
async def main(input):
    child = launch("echo", {"big": "ü" * 100_000, "n": 1})
    by_version = runtime.launch("echo@1.0.0", '{"n": 2}')
    value = await child
    assert value["pid"] == child.pid != runtime.instance_id()
    assert await child.wait() == value
    return value["input"]["big"] == "ü" * 100_000, value["user"], value["priority"], (await by_version)["input"]
"""
    )

    async def scenario(pie: Pie) -> None:
        state = pie.app.new_process("carol", pie.state().client, priority=2)
        assert await pie.run(source, state) == [True, "carol", 2, {"n": 2}]

    on_pie(scenario)


def test_what_ends_a_child_is_told_to_whoever_awaits_it(on_pie: OnPie, install: Install) -> None:
    install("forever", FOREVER)
    install("fails", FAILS)
    install("nothing", "def main():\n    pass\n")
    install("picky", ECHO, '[parameters]\nn = { type = "int" }\n')
    source = (
        PRELUDE
        + """
async def main(input):
    cancelled = launch("forever")
    cancelled.cancel()
    cancelled.cancel()
    with launch("forever") as left:
        pass
    refusals = []
    for program, given in (("nonesuch", {}), ("./main.py", {}), ("picky", {"n": "a"}), ("echo", "[1]"), ("echo", "{")):
        try:
            launch(program, given)
        except errors.InferletError as error:
            refusals.append(error.code)
    try:
        await launch("fails")
    except errors.InferletError as error:
        assert "no good" in error.message
    outcomes = await asyncio.gather(*map(outcome, (cancelled, launch("fails"), launch("nothing"))))
    return outcomes, refusals, await outcome(left)
"""
    )

    async def scenario(pie: Pie) -> None:
        install("echo", ECHO)
        outcomes, refusals, left = await pie.run(source)
        assert outcomes == ["cancelled", "guest", None]
        assert refusals == ["not-found", "not-found", "invalid-request", "invalid-request", "invalid-request"]
        assert left == "invalid-request"

    on_pie(scenario)


def test_a_child_that_was_let_go_outlives_its_parent_and_ends_with_pie(
    start_pie: StartPie, install: Install
) -> None:
    install("forever", FOREVER)
    source = (
        PRELUDE
        + """
held = []

async def main(input):
    launch("forever").detach()
    launch("forever")
    held.append(launch("forever"))
"""
    )

    async def scenario() -> None:
        async with start_pie() as pie:
            await pie.run(source)
            assert pie.app.live_guests == 3
            running = asyncio.create_task(pie.run(source + "    await asyncio.sleep(3600)\n"))
            await pie.until(lambda _: pie.app.live_guests == 7)
            running.cancel()
            await asyncio.wait([running])
            assert pie.app.live_guests == 6
        assert pie.app.runtime.live_guests == 0

    asyncio.run(scenario())


def test_children_are_counted_while_they_run_by_program_and_by_tenant(
    start_pie: StartPie, install: Install
) -> None:
    install("forever", FOREVER)
    install("three", MANY, "[capabilities]\nchildren = 3\n")
    install("none", MANY)
    limits = ", children_per_program: 4, children_per_tenant: 6"

    async def scenario() -> None:
        async with start_pie(DUMMY, runtime=limits) as pie:
            for name, count, option in (
                ("three", 3, "children under [capabilities] in the Pie.toml of three@1.0.0"),
                ("none", 0, "children under [capabilities]"),
            ):
                started, message, again = await pie.app.run(find_program(name), {}, pie.state())
                assert (started, again) == (count, min(count, 1))
                assert f"it may run {count} at a time" in message
                assert option in message
            started, message, again = await pie.run(MANY)
            assert (started, again) == (4, 1)
            assert "runtime.children_per_program" in message
            await pie.check_nothing_is_left()
            first = asyncio.create_task(pie.run(MANY, stay=True))
            await pie.until(lambda _: pie.app.live_guests == 5)
            started, message, _ = await pie.run(MANY)
            assert started == 2
            assert "6 programs that programs of 'alice' launched" in message
            assert "runtime.children_per_tenant" in message
            assert (await pie.run(MANY, pie.state(user="bob")))[0] == 4
            first.cancel()

    asyncio.run(scenario())


MANY = (
    PRELUDE
    + """
async def main(input):
    children, message = [], ""
    while not message:
        try:
            children.append(launch("forever"))
        except errors.LimitExceeded as error:
            message = error.message
    started, again = len(children), 0
    if children:
        children[0].cancel()
        await outcome(children[0])
        children.append(launch("forever"))
        again = 1
    if input.get("stay"):
        await asyncio.sleep(3600)
    for child in children:
        child.cancel()
        await outcome(child)
    return started, message, again
"""
)


def test_launches_nest_so_deep_and_no_deeper(start_pie: StartPie, install: Install) -> None:
    install("nests", NESTS, "[capabilities]\nchildren = 1\n")

    async def scenario() -> None:
        async with start_pie(DUMMY, runtime=", children_depth: 5") as pie:
            assert await pie.app.run(find_program("nests"), {"left": 5}, pie.state()) == [5, 4, 3, 2, 1]
            *numbers, message = await pie.app.run(find_program("nests"), {"left": 7}, pie.state())
            assert numbers == [7, 6, 5, 4, 3]
            assert "stands 5 launches deep" in message
            await pie.check_nothing_is_left()

    asyncio.run(scenario())


def test_a_child_has_at_most_the_limits_of_its_parent(on_pie: OnPie, install: Install) -> None:
    install("large", ECHO, "[capabilities.limits]\nmemory_mb = 200\n")
    install("hungry", "def main(input):\n    return len(bytearray(150 << 20))\n")
    install("parent", CHILDREN_OF_LITTLE, "[capabilities]\nchildren = 2\nlimits = { memory_mb = 100 }\n")

    async def scenario(pie: Pie) -> None:
        outcomes = await pie.app.run(find_program("parent"), {}, pie.state())
        assert outcomes[0] == "limit-exceeded"
        assert outcomes[1] in ("guest", "guest-trap")  # MemoryError, or the sandbox's own word for it
        assert await pie.app.run(find_program("large"), {}, pie.state())

    on_pie(scenario)


CHILDREN_OF_LITTLE = (
    PRELUDE
    + """
async def main(input):
    outcomes = []
    for name in ("large", "hungry"):
        try:
            outcomes.append(await outcome(launch(name)))
        except errors.InferletError as error:
            outcomes.append(error.code)
    return outcomes
"""
)


def test_a_manifest_may_not_ask_for_more_children_than_there_may_be(
    start_pie: StartPie, install: Install
) -> None:
    install("many", ECHO, "[capabilities]\nchildren = 5\n")

    async def scenario() -> None:
        async with start_pie(DUMMY, runtime=", children_per_program: 4") as pie:
            with pytest.raises(LimitExceeded, match=r"children.*5.*runtime\.children_per_program"):
                await pie.app.run(find_program("many"), {}, pie.state())

    asyncio.run(scenario())


def test_many_children_share_the_batches_of_one_engine(start_pie: StartPie, install: Install) -> None:
    slow = """
models:
  - name: dummy
    driver: {type: dummy, options: {step_ms: 20}}
"""
    source = PRELUDE + (
        "async def main(input):\n"
        '    given = {"prompt": "hi", "max_tokens": 20}\n'
        '    return await asyncio.gather(*(launch("launch-callee", given) for _ in range(input["n"])))\n'
    )

    async def scenario() -> None:
        async with start_pie(slow) as pie:
            (alone,) = await pie.run(source, n=1)
            before = (await pie.status()).steps
            assert await pie.run(source, n=20) == [alone] * 20
            assert (await pie.status()).steps - before < 10 * 20  # apart, they would take twice as many
            await pie.check_nothing_is_left()

    asyncio.run(scenario())
