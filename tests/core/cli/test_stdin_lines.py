"""Standard input is read line by line without blocking the loop, from whatever it is."""

from __future__ import annotations

import asyncio
import os
import pty

import pytest

from pie_core.cli.stdin_lines import StdinLines
from pie_core.errors import LimitExceeded


def test_a_pipe_is_read_only_when_a_line_is_wanted_and_the_loop_goes_on() -> None:
    async def talk() -> list[object]:
        reading, writing = os.pipe()
        lines = StdinLines(reading, 100)
        wanted = asyncio.ensure_future(lines.next_line())
        for _ in range(3):
            await asyncio.sleep(0)
        seen: list[object] = [wanted.done()]
        os.write(writing, b"fir")
        await asyncio.sleep(0.01)
        os.write(writing, b"st\nsecond\nthi")
        seen += [await wanted, await lines.next_line()]
        os.close(writing)
        seen += [await lines.next_line(), await lines.next_line(), await lines.next_line()]
        os.close(reading)
        return seen

    assert asyncio.run(talk()) == [False, "first", "second", "thi", None, None]


def test_a_cancelled_wait_loses_nothing() -> None:
    async def talk() -> str | None:
        reading, writing = os.pipe()
        lines = StdinLines(reading, 100)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(lines.next_line(), 0.01)
        os.write(writing, b"late\n")
        try:
            return await lines.next_line()
        finally:
            os.close(reading)
            os.close(writing)

    assert asyncio.run(talk()) == "late"


def test_a_terminal_delivers_lines_and_stays_in_blocking_mode() -> None:
    async def talk() -> tuple[str | None, bool, str | None]:
        master, slave = pty.openpty()
        lines = StdinLines(slave, 100)
        os.write(master, "tÿped\n".encode())
        first = await lines.next_line()
        blocking = os.get_blocking(slave)
        os.write(master, b"\x04")
        last = await lines.next_line()
        os.close(master)
        os.close(slave)
        return first, blocking, last

    assert asyncio.run(talk()) == ("tÿped", True, None)


@pytest.mark.parametrize("text", [b"x" * 11 + b"\n", b"x" * 200])
def test_a_line_beyond_the_limit_is_refused(text: bytes) -> None:
    async def talk() -> None:
        reading, writing = os.pipe()
        os.write(writing, b"0123456789\n" + text)
        os.close(writing)
        lines = StdinLines(reading, 10)
        assert await lines.next_line() == "0123456789"
        try:
            with pytest.raises(LimitExceeded, match="longer than 10 bytes"):
                await lines.next_line()
        finally:
            os.close(reading)

    asyncio.run(talk())


def test_without_a_descriptor_there_are_no_lines() -> None:
    assert asyncio.run(StdinLines(None, 10).next_line()) is None
