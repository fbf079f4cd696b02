"""The built Python guest in the real sandbox, over the fake host."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from pie_core.errors import GuestError, PieError, ProgramError
from pie_core.guests import python_guest
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from tests.sdk.component_host import State, fake_interfaces
from tests.sdk.fake_host import CUE, World, turn

pytestmark = pytest.mark.slow

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def started() -> State:
    """What the program of this test prints."""
    return State()


@pytest.fixture
def run(cache: Path, started: State) -> Run:
    """Runs a program's source in a fresh guest and gives its return value."""

    async def in_sandbox(files: list[tuple[str, str]], text: str) -> str | None:
        runtime = Runtime(fake_interfaces(), cache)
        try:
            program = await Program.load(runtime, python_guest())
            guest = program.start(started)
            await guest.call("load", files, "main.py")
            result: str | None = await guest.call("run", text)
            return result
        finally:
            runtime.close()

    def call(source: str, given: Any = None, **others: str) -> Any:
        files = [("main.py", dedent(source)), *((f"{name}.py", text) for name, text in others.items())]
        result = asyncio.run(in_sandbox(files, json.dumps(given)))
        return None if result is None else json.loads(result)

    return call


def test_a_program_generates_and_streams(run: Run, started: State, world: World) -> None:
    result = run(
        """
        from inferlet import Context, Model, Sampler

        async def main(input):
            model = Model.load()
            ctx = Context(model).system("Be brief.").user(input["prompt"])
            twin = ctx.fork()
            async for piece in ctx.generate(Sampler.argmax(), max_tokens=12).stream():
                print(piece, end="", flush=True)
            stepped = []
            async for step in twin.generate(Sampler.argmax(), max_tokens=12):
                stepped += (await step.execute()).tokens
            return model.tokenizer().decode(stepped)
        """,
        {"prompt": "hello"},
    )
    assert started.printed == result != ""
    assert len(started.chunks) > 1  # each piece came at once
    assert world.calls["next"] > 1
    assert world.calls["step"] > 1


def test_tasks_of_one_guest_overlap(run: Run, world: World) -> None:
    result = run(
        """
        import asyncio
        from inferlet import Context, Model, Sampler

        async def answer(model, name):
            ctx = Context(model).user(name)
            tokens = []
            async for step in ctx.generate(Sampler.argmax(), max_tokens=6, stop=[]):
                tokens += (await step.execute()).tokens
            return tokens

        async def main():
            model = Model.load()
            tokens = await asyncio.gather(*(answer(model, str(n)) for n in range(5)))
            return [len(each) for each in tokens]
        """
    )
    assert result == [6] * 5
    assert world.most_at_once == 5


def test_probes_cross_the_boundary(run: Run) -> None:
    result = run(
        """
        import math
        from inferlet import Context, Distribution, Entropy, Hidden, Logits, Logprob, Logprobs, Model, Sampler
        from inferlet.forward import floats

        async def main():
            forward = Context(Model.load()).forward().input([1, 2])
            token = forward.sample([1], Sampler.argmax())
            raw, top = forward.probe(1, Logits()), forward.probe(1, Distribution(1.0, 3))
            one, two = forward.probe(1, Logprob(97)), forward.probe(1, Logprobs([97, 98]))
            entropy, hidden = forward.probe(1, Entropy()), forward.probe(0, Hidden())
            output = await forward.execute()
            values = floats(output.logits(raw))
            return [
                output.token(token) == values.index(max(values)) == output.distribution(top)[0][0],
                output.logprobs(one) == output.logprobs(two)[:1],
                0 < output.entropy(entropy) < math.log(len(values)),
                output.hidden(hidden),
            ]
        """
    )
    assert result == [True, True, True, [1.0, 0.5]]


def test_snapshots_sessions_and_decoders_cross_the_boundary(run: Run, world: World) -> None:
    world.inbox += [(5_000_000, "hi"), (6_000_000, None)]
    result = run(
        """
        from inferlet import Context, Model, chat, runtime, session
        from inferlet.errors import NotFound

        async def main():
            model = Model.load()
            Context(model).user("kept").save("name")
            opened = Context.take(model, "name").cue()
            try:
                Context.open(model, "name")
            except NotFound as error:
                missing = error.code
            session.send({"first": await session.receive()})
            event = chat.Decoder(model).feed(model.tokenizer().encode("text"))
            return [opened.buffer(), missing, await session.receive(), event.text, runtime.username()]
        """
    )
    assert result == [[*turn("user", "kept"), CUE], "not-found", None, "text", "somebody"]
    assert world.outbox == ['{"first": "hi"}']


def test_the_older_api_runs(run: Run) -> None:
    assert run(
        """
        from inferlet.legacy import Sampler, get_auto_model, stop_condition

        async def main():
            model = get_auto_model()
            ctx = model.create_context()
            ctx.fill_user("hello")
            stop = stop_condition.max_len(9).or_(stop_condition.ends_with_any(model.eos_tokens()))
            return await ctx.generate(Sampler.top_p(0.6, 0.95), stop)
        """
    )


def test_a_failure_carries_the_programs_own_traceback(run: Run) -> None:
    with pytest.raises(GuestError) as caught:
        run(
            "import part\n\nasync def main():\n    part.fail()", part="def fail():\n    raise KeyError('x')\n"
        )
    assert str(caught.value).splitlines() == [
        "Traceback (most recent call last):",
        '  File "main.py", line 4, in main',
        "    part.fail()",
        "    ~~~~~~~~~^^",
        '  File "part.py", line 2, in fail',
        "    raise KeyError('x')",
        "KeyError: 'x'",
    ]


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("def main(:", ProgramError, 'File "main.py", line 1'),
        ("import numpy", GuestError, "No module named 'numpy'"),
        ("def f(): f()\ndef main(): f()", GuestError, "RecursionError"),
        ("def main(): return [0] * (1 << 29)", GuestError, "MemoryError"),
        ("import asyncio\nasync def main(): await asyncio.Event().wait()", GuestError, r"main.py:2 in main"),
        ("from inferlet import Model\ndef main(): Model.load('other')", PieError, "no model named 'other'"),
        ("def main(): return object()", GuestError, "a object;"),
    ],
)
def test_failures_reach_the_one_who_runs_it(run: Run, source: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run(source)


def test_a_broad_standard_library_is_there(run: Run) -> None:
    result = run(
        """
        import argparse, csv, datetime, decimal, difflib, email.message, fractions, gzip, hashlib, heapq, html.parser
        import http.client, io, ipaddress, logging, pathlib, pprint, queue, secrets, shelve, sqlite3, statistics
        import tempfile, textwrap, threading, tomllib, unittest.mock, urllib.request, uuid, xml.etree.ElementTree
        import zipfile, zoneinfo

        def main():
            database = sqlite3.connect(":memory:")
            return [
                database.execute("select 1 + 1").fetchone()[0],
                hashlib.sha256(b"").hexdigest()[:8],
                gzip.decompress(gzip.compress(b"again")).decode(),
                "straße".encode("idna").decode(),
                str(decimal.Decimal("0.1") * 3),
            ]
        """
    )
    assert result == [2, "e3b0c442", "again", "strasse", "0.3"]


def test_two_guests_draw_different_random_numbers(run: Run) -> None:
    source = "import random, uuid\ndef main(): return [random.random(), str(uuid.uuid4())]"
    first, second = run(source), run(source)
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_asyncio_run_works_in_a_main_that_is_not_async(run: Run) -> None:
    assert run("import asyncio\ndef main(): return asyncio.run(asyncio.sleep(0.01, 'slept'))") == "slept"


def test_the_guests_own_asyncio_works_on_the_loop(run: Run, started: State, world: World) -> None:
    result = run(
        """
        import asyncio

        async def numbers(count):
            try:
                for number in range(count):
                    await asyncio.sleep(1)
                    yield number
            finally:
                print("closed", flush=True)

        async def main():
            seen, queue, event = [], asyncio.Queue(1), asyncio.Event()

            async def produce():
                async for number in numbers(100):
                    await queue.put(number)
                    if number == 3:
                        break
                event.set()

            async def consume():
                while not (event.is_set() and queue.empty()):
                    seen.append(await asyncio.wait_for(queue.get(), 10))

            async with asyncio.TaskGroup() as group:
                group.create_task(produce())
                group.create_task(consume())
            try:
                async with asyncio.timeout(0.5):
                    await asyncio.shield(asyncio.sleep(5))
            except TimeoutError:
                seen.append("timeout")
            first, rest = await asyncio.wait(
                [asyncio.create_task(asyncio.sleep(n, n)) for n in (2, 1)], return_when=asyncio.FIRST_COMPLETED
            )
            return [seen, [task.result() for task in first], len(rest)]
        """
    )
    assert result == [[0, 1, 2, 3, "timeout"], [1], 1]
    assert (started.printed, started.errors) == ("closed\n", "")
    assert world.now == 5_500_000_000


def test_errors_and_partial_lines_are_printed(run: Run, started: State) -> None:
    run("import sys\ndef main():\n  print('no newline', end='')\n  print('careful', file=sys.stderr)")
    assert (started.printed, started.errors) == ("no newline", "careful\n")
