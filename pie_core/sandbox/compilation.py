"""A component's bytes -> a loaded component: from the cache, or compiled in a limited process of its own."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import wasmtime
from wasmtime.component import Component

from pie_core.errors import ProgramError, ProgramTooLarge
from pie_core.paths import child_environment
from pie_core.sandbox.aot_cache import AotCache, image_key
from pie_core.sandbox.compile import INVALID
from pie_core.sandbox.fibers import EngineOptions

GIB = 1 << 30
MIB = 1 << 20
REPORT_EVERY_S = 1.0

Progress = Callable[[str, float], None]  # (what is going on, seconds so far)


@dataclass(frozen=True, slots=True)
class CompileLimits:
    """What compiling one program may use; memory is address space, more of which is reserved than touched."""

    wasm_bytes: int = 256 * MIB
    memory_bytes: int = 6 * GIB
    seconds: float = 180.0
    threads: int = 4
    at_once: int = 2


class Compiler:
    """Compiles for one engine. Programs of the same content that are asked for at once are compiled once."""

    def __init__(
        self, engine: wasmtime.Engine, options: EngineOptions, cache: AotCache, limits: CompileLimits
    ) -> None:
        self._engine = engine
        self._options = options
        self._cache = cache
        self._limits = limits
        self._locks: dict[str, asyncio.Lock] = {}
        self._turn = asyncio.Semaphore(limits.at_once)

    async def load(self, wasm: bytes, name: str, progress: Progress | None = None) -> Component:
        """Raises ProgramError, and ProgramTooLarge where a limit was hit."""
        _check_header(wasm, name)
        if len(wasm) > self._limits.wasm_bytes:
            raise ProgramTooLarge(
                f"{name} has {len(wasm)} bytes; at most {self._limits.wasm_bytes} are accepted"
            )
        key = await asyncio.to_thread(image_key, wasm, self._options)
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                component = await self._from_cache(key)
                return component or await self._compile(wasm, key, name, progress)
        finally:
            if not lock.locked():
                self._locks.pop(key, None)

    async def _from_cache(self, key: str) -> Component | None:
        image = await asyncio.to_thread(self._cache.find, key)
        if image is None:
            return None
        try:
            return Component.deserialize_file(self._engine, str(image))
        except wasmtime.WasmtimeError:
            self._cache.discard(key)
            return None

    async def _compile(self, wasm: bytes, key: str, name: str, progress: Progress | None) -> Component:
        """The image goes through memory, so that neither a full disk nor a read-only one matters."""
        output = os.memfd_create("pie-image")
        try:
            async with self._turn:
                await self._run(wasm, output, name, progress)
            return await asyncio.to_thread(self._take_in, key, output)
        finally:
            os.close(output)

    def _take_in(self, key: str, output: int) -> Component:
        with mmap.mmap(output, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as image:
            kept = self._cache.store(key, image)
        return Component.deserialize_file(self._engine, str(kept or Path(f"/proc/self/fd/{output}")))

    async def _run(self, wasm: bytes, output: int, name: str, progress: Progress | None) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command(output),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(output,),
            env=self._environment(),
            process_group=0,  # Ctrl-C in the terminal is ours to answer
        )
        reporter = asyncio.create_task(_report(progress, f"compiling {name}"))
        try:
            _, complaint = await asyncio.wait_for(process.communicate(wasm), self._limits.seconds)
        except TimeoutError:
            raise ProgramTooLarge(f"{name} was not compiled within {self._limits.seconds:.0f} s") from None
        finally:
            reporter.cancel()
            await _end(process)
        self._judge(process.returncode, complaint.decode(errors="replace").strip(), name)

    def _command(self, output: int) -> list[str]:
        limits = self._limits
        return [
            sys.executable,
            "-m",
            "pie_core.sandbox.compile",
            f"--options={json.dumps(self._options.as_dict())}",
            f"--output={output}",
            f"--memory-bytes={limits.memory_bytes}",
            f"--cpu-seconds={int(limits.seconds * limits.threads) + 1}",
        ]

    def _environment(self) -> dict[str, str]:
        """Few threads and few heaps: each reserves address space, which is what the limit counts."""
        threads = str(min(self._limits.threads, os.cpu_count() or 1))
        return child_environment(
            {"RAYON_NUM_THREADS": threads, "MALLOC_ARENA_MAX": "2", "PYTHONPATH": _python_path()}
        )

    def _judge(self, status: int | None, complaint: str, name: str) -> None:
        if status == 0:
            return
        if status == INVALID:
            raise ProgramError(f"{name} is not a component that can be compiled: {complaint}")
        limit = f"{self._limits.memory_bytes // MIB} MiB of memory and {self._limits.seconds:.0f} s"
        first = complaint.splitlines()[:1] or ["no message"]
        raise ProgramTooLarge(
            f"{name} broke the compiler, which may use {limit} (exit status {status}: {first[0]})"
        )


def _python_path() -> str:
    """The child finds what this process finds, installed or not."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _check_header(wasm: bytes, name: str) -> None:
    if wasm[:4] != b"\0asm":
        raise ProgramError(f"{name} is not WebAssembly: it begins with {wasm[:4]!r}, expected b'\\x00asm'")
    if wasm[4:8] == b"\x01\0\0\0":
        raise ProgramError(
            f"{name} is a core module; a component is expected. Turn it into one with `wasm-tools component new` "
            "or your language's component tool-chain"
        )
    if wasm[6:8] != b"\x01\0":
        raise ProgramError(
            f"{name} is no WebAssembly component that is known here: its version field is {wasm[4:8]!r}"
        )


async def _report(progress: Progress | None, what: str) -> None:
    start = time.monotonic()
    while progress is not None:
        progress(what, time.monotonic() - start)
        await asyncio.sleep(REPORT_EVERY_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
