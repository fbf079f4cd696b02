"""What is no program of ours is refused before it runs, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import wasmtime

from pie_core.errors import ProgramError, ProgramTooLarge
from pie_core.sandbox.compilation import CompileLimits
from pie_core.sandbox.linker import compatible
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from tests.core.sandbox.scenarios import State, call, drive, interfaces
from tests.core.sandbox.test_guest import TIMER, echo
from tests.core.sandbox.wat_guests import RETURN_INPUT, run, wat_guest

CORE_MODULE = bytes(wasmtime.wat2wasm('(module (func (export "run")))'))
NOTHING = bytes(wasmtime.wat2wasm("(component)"))
OTHER_RUN = bytes(
    wasmtime.wat2wasm(
        """(component
          (core module $m (func (export "run") (param i32) (result i32) (local.get 0)))
          (core instance $i (instantiate $m))
          (func (export "run") (param "input" u32) (result u32) (canon lift (core func $i "run"))))"""
    )
)


def import_of(name: str, function: str) -> bytes:
    return wat_guest(run("", RETURN_INPUT), extra=f'(import "{name}" (instance (export {function})))')


@pytest.mark.parametrize(
    ("wasm", "says"),
    [
        (b"", "is not WebAssembly"),
        (b"print('hello')", "is not WebAssembly: it begins with b'prin'"),
        (CORE_MODULE, "is a core module; a component is expected"),
        (b"\0asm\x0e\0\2\0" + bytes(8), "no WebAssembly component that is known here"),
        (b"\0asm\x0d\0\1\0" + b"\xff" * 40, "is not a component that can be compiled"),
        (echo()[:-30], "is not a component that can be compiled"),
        (NOTHING, "of another world: it does not export 'run'.*exports no function"),
        (
            OTHER_RUN,
            r"exports 'run' as func\(input: u32\) -> u32; the world inferlet has func\(input: string\)",
        ),
        (
            import_of("inferlet:api/weather@1.0.0", '"forecast" (func)'),
            r"inferlet:api/weather@1\.0\.0, unknown here; known: .*inferlet:api/forward",
        ),
        (
            import_of("inferlet:api/poll@1.3.0", '"sleep-until" (func)'),
            r"inferlet:api/poll@1\.3\.0\.sleep-until, which version 1\.0\.0 here does not have; it has .*wait",
        ),
        (
            import_of("inferlet:api/poll@2.0.0", '"now-ns" (func (result u64))'),
            r"this host has version 1\.0\.0",
        ),
        (
            import_of("inferlet:api/poll@1.0.0", '"now-ns" (func (result u32))'),
            r"now-ns as func\(\) -> u32; this host has func\(\) -> u64",
        ),
        (
            import_of("inferlet:api/poll@1.0.0", '"thing" (type (sub resource))'),
            r"imports the resource inferlet:api/poll@1\.0\.0\.thing; .* has pollable",
        ),
        (
            import_of("wasi:http/types@0.2.6", '"x" (func)'),
            r"wasi:http/types@0\.2\.6, which this host does not offer",
        ),
        (
            import_of("wasi:random/random@0.3.0", '"get-random-u64" (func (result u64))'),
            r"has version 0\.2\.0",
        ),
        (wat_guest(run(""), extra='(import "log" (func))'), "'log' outside any interface"),
    ],
)
def test_what_does_not_fit_is_refused(wasm: bytes, says: str) -> None:
    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(ProgramError, match=says) as raised:
            await Program.load(runtime, wasm, "guest.wasm")
        assert str(raised.value).startswith("guest.wasm")

    drive(scenario)


def test_a_function_without_an_implementation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(runtime: Runtime) -> None:
        wasm = wat_guest(run(""), ["poll/timer"], TIMER)
        monkeypatch.delitem(interfaces()[-1].functions, "timer", raising=False)
        for interface in runtime.linker._hosts.values():
            monkeypatch.delitem(interface.functions, "timer", raising=False)
        with pytest.raises(
            ProgramError, match=r"poll@1\.0\.0\.timer, which this build of pie does not implement"
        ):
            await Program.load(runtime, wasm)

    drive(scenario)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(ProgramError, match=r"missing\.wasm cannot be read: No such file"):
            await Program.load(runtime, tmp_path / "missing.wasm")

    drive(scenario)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (CompileLimits(wasm_bytes=100), "at most 100 are accepted"),
        (CompileLimits(seconds=0.001), "was not compiled within"),
        (CompileLimits(memory_bytes=64 << 20), "broke the compiler, which may use 64 MiB of memory"),
    ],
)
def test_a_program_beyond_the_limits_of_compilation_is_too_large(
    limits: CompileLimits, says: str, tmp_path: Path
) -> None:
    terms = (f"(local.set $x (i32.mul (local.get $x) (i32.const {n})))" for n in range(100_000))
    bomb = wat_guest(run("".join(terms), locals_="(local $x i32)"))

    async def scenario(runtime: Runtime) -> None:
        with pytest.raises(ProgramTooLarge, match=says):
            await Program.load(runtime, bomb)

    drive(scenario, cache=tmp_path, compile_limits=limits)


def test_compiling_reports_progress(tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []

    async def scenario(runtime: Runtime) -> None:
        await Program.load(
            runtime, echo(), "guest.wasm", lambda what, seconds: reports.append((what, seconds))
        )

    drive(scenario, cache=tmp_path)
    assert reports[0][0] == "compiling guest.wasm"


def test_programs_of_earlier_and_later_versions_of_the_interface_link() -> None:
    async def scenario(runtime: Runtime) -> None:
        program = await Program.load(runtime, wat_guest(run("", RETURN_INPUT), version="1.0.7"))
        assert await call(program, "still fine") == "still fine"
        with pytest.raises(ProgramError, match="no export 'load'; the world inferlet has run"):
            await program.start(State()).call("load", [], "")
        for guest in list(runtime.guests):
            guest.close()

    drive(scenario)


@pytest.mark.parametrize(
    ("wanted", "offered", "fits"),
    [
        ("1.0.0", "1.4.2", True),
        ("1.9.0", "1.4.2", True),
        ("2.0.0", "1.4.2", False),
        ("0.2.3", "0.2.12", True),
        ("0.2.12", "0.2.0", True),
        ("0.3.0", "0.2.12", False),
        ("0.3.0-rc-2025", "0.2.0", False),
    ],
)
def test_versions_fit_by_semantic_versioning(wanted: str, offered: str, fits: bool) -> None:
    assert compatible(wanted, offered) == fits
