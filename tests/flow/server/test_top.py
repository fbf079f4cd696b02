"""`pie top` as a process, against a real server: what it shows, and what it says when there is nothing to show."""

from __future__ import annotations

import asyncio
import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from pie_core.cli.top_rates import engine_rates, groups
from pie_core.cli.top_screen import Screen
from pie_core.client import Client
from pie_core.server.credentials import add_api_key
from pie_core.server.status import ServerStatus
from tests.flow.server.conftest import Pie

OnServer = Callable[..., Any]

WAITS = """
    from inferlet import Context, Model, Sampler, session

    async def main(input):
        context = Context(Model.load("first"))
        context.user("Hello " * 20)
        context.cue()
        text = await context.generate(Sampler.argmax(), max_tokens=8).collect_text()
        session.send("generated")
        await session.receive()
        return text
"""


async def top(*arguments: str, columns: int = 80) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    run = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "pie_core", "top", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm"},
    )
    out, err = await run.communicate()
    assert run.returncode is not None
    return run.returncode, out.decode(), err.decode()


async def two_looks(pie: Pie) -> tuple[ServerStatus, ServerStatus]:
    """Before and after three programs have generated and wait."""
    pie.install("waits", WAITS)
    async with pie.client() as client:
        before = await client.status()
        processes = [await client.launch("waits") for _ in range(3)]
        for process in processes:
            assert (await anext(aiter(process))).value == "generated"
        after = await client.status()
        for process in processes:
            await process.signal("go on")
            await process.result()
    return before, after


def shown(
    now: ServerStatus, before: ServerStatus | None, width: int, height: int, each: bool = False
) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(Screen(now, before, "127.0.0.1:8080", each))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_one_look_shows_server_models_and_processes(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("waits", WAITS)
        async with pie.client() as client:
            process = await client.launch("waits")
            assert (await anext(aiter(process))).value == "generated"
            code, out, err = await top(pie.server.url, "--once", "--user", "alice", "--interval", "0.1")
            assert (code, err) == (0, "")
            lines = out.splitlines()
            assert re.match(
                r"pie \S+ at 127\.0\.0\.1:\d+  ready  up \d+:\d\d  2 clients  lag \d+ ms$", lines[0]
            )
            assert "processes 1 running, 1 launched, 0 ended" in lines
            assert any(line.startswith("first  loaded  dummy") for line in lines)
            assert re.search(r"^waits +alice +1 +input +0$", out, re.MULTILINE)
            await process.signal("go on")
            await process.result()

    on_server(scenario)


def test_a_look_as_json_is_the_status_of_the_protocol(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        code, out, err = await top(pie.server.url, "--once", "--json")
        assert (code, err) == (0, "")
        status = msgspec.json.decode(out, type=ServerStatus)
        assert [model.name for model in status.models] == ["first", "second"]

    on_server(scenario)


def test_rates_are_those_between_two_looks(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        before, after = await two_looks(pie)
        now, then = after.models[0].replicas[0].engine, before.models[0].replicas[0].engine
        assert now is not None
        assert then is not None
        rates = engine_rates(now, then, 2.0)
        assert rates.tokens_s == (now.tokens - then.tokens) / 2
        assert rates.batch == pytest.approx((now.passes - then.passes) / (now.steps - then.steps))
        assert rates.first_token.count == 3
        assert engine_rates(now, now, 2.0).steps_s == 0
        replaced = engine_rates(then, now, 2.0)  # counters that fell began anew
        assert replaced.steps_s == then.steps / 2
        (group,) = groups(after, before, each=False)
        assert (group.label, group.username, group.count) == ("waits", "alice", 3)
        assert group.waits_for["input"] == 3
        assert group.tokens_s > 0
        assert len(groups(after, before, each=True)) == 3

    on_server(scenario)


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (120, 50)])
def test_it_fits_the_terminal(on_server: OnServer, width: int, height: int) -> None:
    async def scenario(pie: Pie) -> None:
        before, after = await two_looks(pie)
        many = msgspec.structs.replace(after, processes=after.processes * 20)
        for each in (False, True):
            lines = shown(many, before, width, height, each)
            assert max(map(len, lines)) <= width
            assert len(lines) <= max(height, 20)
        text = "\n".join(shown(after, before, width, height))
        assert "waits" in text
        assert ("CONTEXTS" in text) == (width >= 100)

    on_server(scenario)


def test_it_is_drawn_again_and_again_until_ctrl_c(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = ("-m", "pie_core", "top", pie.server.url, "--interval", "0.1")
        run = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdin=side,
            stdout=side,
            stderr=side,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(side)
        seen = await asyncio.to_thread(_read_until, main, b"\x1b[H", 4)
        run.send_signal(signal.SIGINT)
        rest = await asyncio.to_thread(_read_to_end, main)
        assert await run.wait() == 0
        os.close(main)
        assert b"first" in seen
        assert b"Traceback" not in seen + rest
        assert b"\x1b[?1049l" in rest  # the screen is as it was

    on_server(scenario)


def _read_until(descriptor: int, mark: bytes, times: int) -> bytes:
    seen = b""
    while seen.count(mark) < times:
        seen += os.read(descriptor, 65536)
    return seen


def _read_to_end(descriptor: int) -> bytes:
    seen = b""
    while True:
        try:
            seen += os.read(descriptor, 65536)
        except OSError:  # the other side is closed
            return seen


def test_no_server_is_said_with_what_to_do() -> None:
    code, out, err = asyncio.run(top("http://127.0.0.1:1", "--once"))
    assert (code, out) == (1, "")
    assert re.match(r"error: cannot connect to ws://127.0.0.1:1/: .*; does `pie serve` run there\?\n$", err)


def test_a_server_that_goes_is_said_and_not_waited_for(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        run = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "pie_core", "top", pie.server.url, "--interval", "0.1"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert run.stdout is not None
        assert (await run.stdout.readline()).startswith(b"pie ")
        await pie.server.stop(0)
        _, err = await run.communicate()
        assert run.returncode == 1
        assert b"closed the connection" in err or b"there is no connection" in err

    on_server(scenario)


def test_a_key_that_is_missing_or_wrong_is_said_with_the_option(on_server: OnServer, tmp_path: Path) -> None:
    async def scenario(pie: Pie) -> None:
        key = add_api_key(pie.credentials_file, "olga", "k", ("metrics", "observe"), None)
        (tmp_path / "good").write_text(f"{key}\n")
        (tmp_path / "bad").write_text("nonsense")
        code, _, err = await top(pie.server.url, "--once")
        assert code == 1
        assert "pie top --key FILE" in err
        code, _, err = await top(pie.server.url, "--once", "--key", str(tmp_path / "bad"))
        assert (code, err.count("\n")) == (1, 1)
        code, out, err = await top(
            pie.server.url, "--once", "--key", str(tmp_path / "good"), "--interval", "0.1"
        )
        assert (code, err) == (0, "")
        assert "ready" in out
        async with Client(pie.server.socket_url, api_key=key) as client:
            assert (await client.status()).processes == []

    on_server(scenario, auth="enabled: true")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ftp://x",), "no address of a server"),
        (("--key", "/no/such/file"), "cannot be read"),
        (("--private-key", "/x"), "--private-key /x needs --user"),
        (("--private-key", "/x", "--key", "/y"), "--key /y and --private-key /x are two ways"),
        (("--interval", "0"), "0.1"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], said: str) -> None:
    code, _, err = asyncio.run(top(*arguments))
    assert code == 2
    assert said in err
