"""pie in three lines, in this process: synchronously, awaited, inside a running loop, to a clean end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pie_core import AsyncPie, Pie
from pie_core.errors import (
    Cancelled,
    ConfigError,
    GuestError,
    InvalidRequest,
    NotFound,
    PieError,
    ProgramError,
    Unavailable,
)
from pie_core.offline import Event

GREEDY = {"temperature": 0, "max_tokens": 24}

ECHO = """
import sys
from inferlet import session

async def main(input):
    print("printed", input["n"])
    print("aside", file=sys.stderr)
    session.send("sent")
    session.send_file(b"\\0file")
    return {"n": input["n"] + 1}
"""

ASKING = """
from inferlet import session

async def main(input):
    heard = []
    while (message := await session.receive()) is not None:
        session.send(message.upper())
        heard.append(message)
    return heard
"""

FOREVER = """
import asyncio

async def main(input):
    await asyncio.sleep(3600)
"""


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    folder = Path(request.config.cache.mkdir("aot"))
    models = [
        {"name": "first", "driver": {"type": "dummy"}},
        {"name": "other", "driver": {"type": "dummy", "options": {"step_ms": 5}}},
    ]
    return {"models": models, "runtime": {"program_cache": folder}}


@pytest.fixture(scope="module")
def pie(config: dict[str, Any]) -> Iterator[Pie]:
    with Pie(config) as pie:
        yield pie


def test_a_prompt_is_answered_whole_and_in_pieces(pie: Pie) -> None:
    whole = pie.generate("Name a river.", **GREEDY)
    pieces = list(pie.stream("Name a river.", **GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == whole
    assert whole


def test_a_conversation_is_its_turns(pie: Pie) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "More"},
    ]
    assert pie.generate(turns, **GREEDY) != pie.generate(turns[1:], **GREEDY)
    assert pie.generate(turns[1:], system="Be brief.", **GREEDY) == pie.generate(turns, **GREEDY)
    with pytest.raises(ValueError, match="a turn has a role"):
        pie.generate([{"role": "robot", "content": ""}])


def test_a_program_has_the_priority_that_it_was_launched_with(pie: Pie) -> None:
    source = "from inferlet import runtime\n\ndef main(input):\n    return [runtime.priority(), input]\n"
    assert pie.launch(source, 4, priority=1).result() == [4, {"priority": 1}]
    assert pie.run(source) == [0, {}]


def test_a_program_launches_others(pie: Pie) -> None:
    returned = pie.run("launch-callee", prompt="Hi", max_tokens=8)
    assert pie.run("launch-caller", prompts=["Hi"] * 3, max_tokens=8) == [returned] * 3
    asks_too_much = (
        "from inferlet import launch\n"
        "async def main(input):\n    return await launch('launch-callee', {'n': 1})\n"
    )
    with pytest.raises(InvalidRequest, match=r"`prompt` is missing.*unknown parameter `n`"):
        pie.run(asks_too_much)


def test_a_program_runs_from_its_text_and_its_events_come_in_order(pie: Pie) -> None:
    run = pie.launch(ECHO, n=1)
    events = list(run)
    assert events == [
        Event("stdout", "printed 1\n"),
        Event("stderr", "aside\n"),
        Event("message", "sent"),
        Event("file", b"\0file"),
    ]
    assert "".join(event.text for event in events) == "printed 1\nsent"
    assert run.result() == run.result() == {"n": 2}
    assert list(run) == []


def test_a_program_runs_by_its_name_and_by_its_path(pie: Pie, tmp_path: Path) -> None:
    printed = "".join(event.text for event in pie.launch("text-completion", prompt="Hi", **GREEDY))
    assert printed.endswith("\n")
    (tmp_path / "echo.py").write_text(ECHO)
    assert pie.run(tmp_path / "echo.py", n=4) == {"n": 5}


def test_a_program_is_talked_to(pie: Pie) -> None:
    run = pie.launch(ASKING)
    answers = iter(run)
    for message in ("one", "two"):
        run.send(message)
        assert next(answers).data == message.upper()
    run.close_input()
    assert run.result() == ["one", "two"]


def test_what_goes_wrong_is_raised_where_it_is_asked_for(pie: Pie, tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="KeyError"):
        pie.run(ECHO)
    with pytest.raises(InvalidRequest, match="did you mean `prompt`"):
        pie.launch("text-completion", promt="x")
    with pytest.raises(ProgramError, match="did you mean 'chat'"):
        pie.launch("chatt")
    with pytest.raises(NotFound, match="nowhere"):
        pie.generate("x", model="nowhere")
    with pytest.raises(ConfigError, match="did you mean `models`"):
        Pie({"model": []})
    with pytest.raises(ConfigError, match="no such file"):
        Pie(tmp_path / "none.yaml")


def test_breaking_off_a_stream_ends_its_program(pie: Pie) -> None:
    stream = pie.stream("Go on for long", model="other", temperature=0, max_tokens=5000)  # 610 tokens, 3 s
    assert next(stream)
    (running,) = pie._thread._running
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    assert running.task.cancelled()
    assert not pie._thread._running


def test_a_cancelled_program_says_so(pie: Pie) -> None:
    run = pie.launch(FOREVER)
    run.cancel()
    with pytest.raises(Cancelled, match="the program 'the source text' was cancelled"):
        run.result()
    run.cancel()


def test_models_are_chosen_by_name(pie: Pie) -> None:
    assert pie.models == ["first", "other"]
    assert pie.generate("x", model="other", **GREEDY) == pie.generate(
        "x", **GREEDY
    )  # the same pretended model


def test_it_works_inside_a_running_loop(pie: Pie) -> None:
    async def cell() -> str:
        return pie.generate("Name a river.", **GREEDY)  # as in a notebook, whose loop stands still meanwhile

    assert asyncio.run(cell()) == pie.generate("Name a river.", **GREEDY)


def test_the_awaited_pie_does_the_same_beside_other_work(config: dict[str, Any], pie: Pie) -> None:
    async def main() -> tuple[list[str], Any, list[Event], list[str]]:
        async with AsyncPie(config) as other:
            answers = await asyncio.gather(*(other.generate(prompt, **GREEDY) for prompt in ("a", "b", "c")))
            run = await other.launch(ECHO, n=1)
            events = [event async for event in run]
            talk = await other.launch(ASKING)
            await talk.send("one")
            await talk.close_input()
            assert await talk.result() == ["one"]
            stopped = await other.launch(FOREVER)
            await stopped.cancel()
            pieces = [piece async for piece in other.stream("a", **GREEDY)]
            assert other.models == ["first", "other"]
            return answers, await run.result(), events, pieces

    answers, value, events, pieces = asyncio.run(main())
    assert answers == [pie.generate(prompt, **GREEDY) for prompt in ("a", "b", "c")]
    assert "".join(pieces) == answers[0]
    assert (value, len(events)) == ({"n": 2}, 4)


def test_many_threads_share_one(pie: Pie) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: results.append(pie.run(ECHO, n=n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result["n"] for result in results) == list(range(1, 9))


def left_since(before: set[threading.Thread]) -> list[str]:
    """Threads that go on; one that has told its result may need a moment to end."""
    new = set(threading.enumerate()) - before
    for thread in new:
        thread.join(5)
    return [thread.name for thread in new if thread.is_alive()]


def test_closing_ends_what_runs_and_leaves_no_thread(config: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    pie = Pie(config)
    run = pie.launch(FOREVER)
    pie.close()
    pie.close()
    with pytest.raises(Unavailable, match="is closed"):
        pie.generate("x")
    with pytest.raises(Unavailable):
        run.result()
    assert left_since(before) == []


def test_an_awaited_pie_that_was_not_entered_says_so() -> None:
    async def main() -> None:
        with pytest.raises(Unavailable, match="async with"):
            await AsyncPie().generate("x")

    asyncio.run(main())


def test_a_failed_start_leaves_no_thread(config: dict[str, Any]) -> None:
    before = set(threading.enumerate())
    broken = {**config, "models": [{"name": "m", "driver": {"type": "dummy", "options": {"page_size": 0}}}]}
    with pytest.raises(PieError, match="page_size"):
        Pie(broken)
    assert left_since(before) == []


def script(config: dict[str, Any], body: str) -> list[str]:
    """A Python program that makes a Pie and goes on with the body."""
    settings = {**config, "runtime": {"program_cache": str(config["runtime"]["program_cache"])}}
    return [
        sys.executable,
        "-c",
        f"from pie_core import Pie\npie = Pie({settings!r})\n{textwrap.dedent(body)}",
    ]


def test_three_lines_are_a_program_that_ends_well_without_closing(
    config: dict[str, Any], tmp_path: Path
) -> None:
    run = subprocess.run(
        script(config, "print(pie.generate('Name a river.', temperature=0, max_tokens=5))"),
        env={**os.environ, "PIE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip()


def test_ctrl_c_ends_what_is_waited_for_and_the_rest_goes_on(config: dict[str, Any]) -> None:
    body = f"""
        run = pie.launch({FOREVER!r})
        print("waiting", flush=True)
        try:
            run.result()
        except KeyboardInterrupt:
            print(pie.run({ECHO!r}, n=1))
    """
    with subprocess.Popen(
        script(config, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "waiting\n"
        time.sleep(0.2)  # until it does wait: a moment too early would only end it by a traceback
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout, stderr) == (0, "{'n': 2}\n", "")


def test_naming_it_costs_nothing_before_it_is_used() -> None:
    code = "import sys, pie_core; print('pie_core.offline' in sys.modules, 'wasmtime' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"
