"""`pie serve` as a process: how it starts, what it says, and how it ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pie_core.client import Client
from pie_core.errors import Cancelled

pytestmark = pytest.mark.slow

CONFIG = """
models: [{name: dummy, driver: {type: dummy}}]
server: {drain_s: DRAIN}
auth: {enabled: false}
runtime: {program_cache: 'CACHE'}
"""


class Served:
    """A running `pie serve`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.url = ""

    async def line(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().rstrip()

    async def line_with(self, words: str) -> str:
        """The next line that has these words; others, such as progress, may come before."""
        while (line := await self.line()) and words not in line:
            pass
        return line

    async def start(self) -> None:
        """Returns once it is ready."""
        assert await self.line_with("authentication is off")
        self.url = (await self.line_with("pie listens at http")).removeprefix("pie listens at http")
        assert await self.line_with("ready: dummy")

    def client(self) -> Client:
        return Client(f"ws{self.url}", username="alice", reconnect=False)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def end(self) -> tuple[int, str]:
        """The exit code, and what it said."""
        said, _ = await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode, said.decode()


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    cache = Path(request.config.cache.mkdir("aot"))
    for drain, name in (("30", "pie.yaml"), ("0.05", "hasty.yaml")):
        (tmp_path / name).write_text(CONFIG.replace("CACHE", str(cache)).replace("DRAIN", drain))
    return tmp_path


@asynccontextmanager
async def serving(folder: Path, *arguments: str, config: str = "pie.yaml") -> AsyncIterator[Served]:
    command = [sys.executable, "-m", "pie_core", "serve", "-c", config, "--port", "0", *arguments]
    environment = {**os.environ, "PIE_HOME": str(folder / "home")}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Served(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_a_signal_lets_programs_end_and_exits_0(folder: Path) -> None:
    async def scenario() -> None:
        async with serving(folder) as served:
            await served.start()
            async with served.client() as client:
                process = await client.launch("chat")
                served.signal(signal.SIGTERM)
                assert await served.line_with("stopping: 1 programs may run for 30 s more")
                await process.close_input()
                assert await process.result() is None
            code, said = await served.end()
            assert (code, said.splitlines()[-1]) == (0, "stopped")

    asyncio.run(scenario())


@pytest.mark.parametrize("config", ["pie.yaml", "hasty.yaml"])
def test_programs_that_do_not_end_are_ended_after_a_while_or_at_a_second_signal(
    folder: Path, config: str
) -> None:
    async def scenario() -> None:
        async with serving(folder, config=config) as served:
            await served.start()
            async with served.client() as client:
                process = await client.launch("chat")
                served.signal(signal.SIGINT)
                assert await served.line_with("stopping")
                if config == "pie.yaml":
                    served.signal(signal.SIGINT)
                with pytest.raises(
                    Cancelled, match="at once" if config == "pie.yaml" else r"server\.drain_s"
                ):
                    await process.result()
            code, said = await served.end()
            assert (code, said.splitlines()[-1]) == (0, "stopped")

    asyncio.run(scenario())


def test_a_port_in_use_is_named_and_a_server_that_was_killed_leaves_it_free(folder: Path) -> None:
    async def scenario() -> None:
        async with serving(folder) as first:
            await first.start()
            port = first.url.rpartition(":")[2]
            async with serving(folder, "--port", port) as second:
                code, said = await second.end()
                assert (code, f"port {port} of 127.0.0.1 is in use" in said) == (2, True)
            async with first.client() as client:
                await client.launch("chat")
                first.signal(signal.SIGKILL)
                assert (await first.end())[0] == -signal.SIGKILL
        async with serving(folder, "--port", port) as third:
            await third.start()
            async with third.client() as client:
                assert await client.processes() == []
            third.signal(signal.SIGTERM)
            assert (await third.end())[0] == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--host", "0.0.0.0"), 2, "without authentication a server listens on a loopback address"),
        (("--host", "no.such.host.invalid"), 2, "loopback"),
        (("-c", "missing.yaml"), 2, "no such file"),
        (("-c", "unloadable.yaml"), 1, "does not exist"),
        (("-c", "open.yaml"), 2, "chmod 600"),
    ],
)
def test_what_cannot_be_served_is_said(
    folder: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    (folder / "unloadable.yaml").write_text(
        "models: [{name: m, path: nowhere.gguf}]\nauth: {enabled: false}\n"
    )
    (folder / "open.yaml").write_text(
        "models: [{name: d, driver: {type: dummy}}]\nauth: {file: open-keys.yaml}\n"
    )
    (folder / "open-keys.yaml").write_text("users: {}\n")
    (folder / "open-keys.yaml").chmod(0o644)

    async def scenario() -> None:
        async with serving(folder, *arguments) as served:
            found, said = await served.end()
            assert found == code
            assert re.search(says, said)

    asyncio.run(scenario())
