"""Programs that go wrong: each gets a clear typed error, nothing leaks, and others beside it go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pie_core.errors import DeadlineExceeded, GuestError, GuestTrap, InvalidRequest, LimitExceeded, PieError
from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import Pie, StartPie

OnPie = Callable[[Callable[[Pie], Any]], Any]

NEIGHBOUR = """
from inferlet import Context, Model, Sampler, runtime
async def main(input):
    ctx = Context(Model.load(runtime.models()[0]))
    ctx.append([40, 41, 42])
    return await ctx.generate(Sampler.argmax(), max_tokens=20, auto_flush=False).collect_tokens()
"""

HEAD = """
from inferlet import Context, Model, Sampler, errors, runtime
model = Model.load(runtime.models()[0])
"""


def indented(body: str) -> str:
    return "".join(f"    {line}\n" for line in body.strip().splitlines())


def run_beside_a_neighbour(on_pie: OnPie, source: str) -> str:
    """The text of the error that `source` ends with, while another program gets its tokens all the same."""

    async def scenario(pie: Pie) -> str:
        expected = await pie.run(NEIGHBOUR)
        bad = asyncio.create_task(pie.run(source))
        await asyncio.sleep(0)
        assert await pie.run(NEIGHBOUR) == expected
        with pytest.raises(PieError) as caught:
            await bad
        return f"{type(caught.value).__name__}: {caught.value}"

    text = on_pie(scenario)
    assert isinstance(text, str)
    return text


def test_a_syntax_error_names_the_line(on_pie: OnPie) -> None:
    error = run_beside_a_neighbour(on_pie, "async def main(input):\n    return (1 +\n")
    assert "SyntaxError" in error
    assert "main.py" in error
    assert "line 2" in error


def test_an_exception_carries_the_programs_own_traceback(on_pie: OnPie) -> None:
    source = "def inner():\n    return {}['absent']\n\nasync def main(input):\n    return inner()\n"
    error = run_beside_a_neighbour(on_pie, source)
    assert 'File "main.py", line 5, in main' in error
    assert 'File "main.py", line 2, in inner' in error
    assert "KeyError: 'absent'" in error


def test_a_program_without_main_is_told_what_is_missing(on_pie: OnPie) -> None:
    error = run_beside_a_neighbour(on_pie, "answer = 42\n")
    assert "main" in error


def test_a_return_value_that_json_cannot_hold_is_named(on_pie: OnPie) -> None:
    error = run_beside_a_neighbour(on_pie, "async def main(input):\n    return {1, 2}\n")
    assert "set" in error


def test_infinite_recursion_ends_in_an_error(on_pie: OnPie) -> None:
    error = run_beside_a_neighbour(
        on_pie, "def f(n):\n    return f(n + 1)\nasync def main(input):\n    f(0)\n"
    )
    assert "RecursionError" in error or "GuestTrap" in error


def test_waiting_for_nothing_is_a_deadlock_and_said(on_pie: OnPie) -> None:
    source = "import asyncio\nasync def main(input):\n    await asyncio.Event().wait()\n"
    assert "deadlock" in run_beside_a_neighbour(on_pie, source).lower()


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("forward = Context(model).forward()\nawait forward.execute()", "invalid-request", "empty input"),
        ("ctx = Context(model); ctx.append([1 << 20]); await ctx.flush()", "invalid-request", "1048576"),
        (
            "f = Context(model).forward(); f.input_at([40], [1 << 30]); await f.execute()",
            "invalid-request",
            "position",
        ),
        (
            "f = Context(model).forward(); f.input([40]); f.sample([1], Sampler.argmax()); await f.execute()",
            "invalid-request",
            "row",
        ),
        ("Context.open(model, 'never-saved')", "not-found", "never-saved"),
        ("Model.load('gpt-17')", "not-found", "gpt-17"),
        ("ctx = Context(model); ctx.release(); ctx.append([40])", "invalid-request", "released"),
        (
            "f = Context(model).forward(); f.input([40]); f.mask([0, 0]); f.sample([0], Sampler.argmax())\n"
            "await f.execute()",
            "invalid-request",
            "mask",
        ),
        (
            "f = Context(model).forward(); f.input([40, 41]); f.attention_mask([[0, 1]]); await f.execute()",
            "invalid-request",
            "mask",
        ),
        (
            "f = Context(model).forward(); f.input([40]); f.sample([0], Sampler.top_p(float('nan')))\n"
            "await f.execute()",
            "invalid-request",
            "temperature",
        ),
        (
            "f = Context(model).forward(); f.input([40]); f.sample([0], Sampler.top_p(0.5, 7.0))\n"
            "await f.execute()",
            "invalid-request",
            "top_p",
        ),
        ("model.tokenizer().decode([1 << 25])", "invalid-request", "33554432"),
    ],
)
def test_a_wrong_request_is_refused_by_code_and_the_program_goes_on(
    on_pie: OnPie, body: str, code: str, words: str
) -> None:
    source = f"""{HEAD}
async def wrong():
{indented(body)}
async def main(input):
    try:
        await wrong()
    except errors.InferletError as error:
        ctx = Context(model)
        ctx.append([40, 41, 42])
        tokens = await ctx.generate(Sampler.argmax(), max_tokens=2, auto_flush=False).collect_tokens()
        return [error.code, str(error), tokens]
"""

    async def scenario(pie: Pie) -> None:
        seen_code, message, tokens = await pie.run(source)
        assert seen_code == code
        assert words in message
        assert len(tokens) == 2

    on_pie(scenario)


def test_an_uncaught_refusal_keeps_its_type_for_the_client(on_pie: OnPie) -> None:
    source = f"{HEAD}\nasync def main(input):\n    await Context(model).forward().execute()\n"

    async def scenario(pie: Pie) -> None:
        with pytest.raises(InvalidRequest, match="empty input"):
            await pie.run(source)

    on_pie(scenario)


LIMITS = ", memory_mb: 128, cpu_s: 0.3, wall_s: 20, output_bytes: 200000"


def run_limited(
    start_pie: StartPie, source: str, kind: type[PieError], client: RecordingClient | None = None
) -> str:
    async def main() -> str:
        async with start_pie(runtime=LIMITS) as pie:
            expected = await pie.run(NEIGHBOUR)
            bad = asyncio.create_task(pie.run(source, pie.state(client)))
            assert await pie.run(NEIGHBOUR) == expected
            with pytest.raises(kind) as caught:
                await bad
            await pie.check_nothing_is_left()
            return str(caught.value)

    return asyncio.run(main())


def test_an_infinite_loop_ends_at_its_cpu_deadline(start_pie: StartPie) -> None:
    run_limited(start_pie, "async def main(input):\n    while True: pass\n", DeadlineExceeded)


def test_a_memory_bomb_hurts_only_itself(start_pie: StartPie) -> None:
    source = "async def main(input):\n    hoard = []\n    while True: hoard.append(bytearray(1 << 20))\n"
    assert "Memory" in run_limited(start_pie, source, GuestError)


def test_endless_output_is_cut_off_at_its_limit(start_pie: StartPie) -> None:
    source = "async def main(input):\n    for _ in range(100): print('x' * (1 << 20))\n"
    client = RecordingClient()
    run_limited(start_pie, source, LimitExceeded, client)
    assert len(client.stdout) <= 200_000


def test_endless_messages_are_cut_off_at_the_same_limit(start_pie: StartPie) -> None:
    source = (
        "from inferlet import session\nasync def main(input):\n    while True: session.send('x' * 10000)\n"
    )
    client = RecordingClient()
    run_limited(start_pie, source, LimitExceeded, client)
    assert sum(map(len, client.messages)) <= 200_000


def test_a_sleeping_program_holds_nobody_up(start_pie: StartPie) -> None:
    source = "import time\nasync def main(input):\n    time.sleep(3600)\n"

    async def main() -> None:
        async with start_pie() as pie:
            sleeping = asyncio.create_task(pie.run(source))
            for _ in range(3):
                assert len(await pie.run(NEIGHBOUR)) == 20
            assert not sleeping.done()
            sleeping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sleeping
            await pie.check_nothing_is_left()

    asyncio.run(main())


def test_a_program_cancelled_in_the_middle_of_a_generation_leaves_nothing(start_pie: StartPie) -> None:
    source = NEIGHBOUR.replace("max_tokens=20", "max_tokens=900")

    async def main() -> None:
        async with start_pie() as pie:
            running = [asyncio.create_task(pie.run(source)) for _ in range(4)]
            await pie.until(lambda status: status.running > 0)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await pie.until(lambda status: status.running == 0)
            await pie.check_nothing_is_left()

    asyncio.run(main())


def test_leaving_by_exit_is_not_a_failure_and_a_trap_is(on_pie: OnPie) -> None:
    async def scenario(pie: Pie) -> None:
        assert await pie.run("import sys\nasync def main(input):\n    sys.exit(0)\n") is None
        with pytest.raises(GuestError, match="3"):
            await pie.run("import sys\nasync def main(input):\n    sys.exit(3)\n")
        with pytest.raises(GuestTrap):
            await pie.run("import os\nasync def main(input):\n    os.abort()\n")

    on_pie(scenario)
