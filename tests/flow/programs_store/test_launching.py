"""A program's manifest is enforced where it is launched, whoever launches it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pie_core.errors import GuestError, InvalidRequest, LimitExceeded, Unsupported
from pie_core.program_store import ProgramStore
from pie_core.programs import find_program
from tests.core.sandbox.wat_guests import RETURN_INPUT, run, wat_guest
from tests.flow.conftest import Pie

MANIFEST = '[package]\nname = "asked"\nversion = "0.1.0"\n'
PARAMETERS = '[parameters]\nname = { type = "string" }\ntimes = { type = "int", default = 2 }\n'
ECHO = "async def main(input):\n    return input\n"
GREEDY = "async def main(input):\n    return len(bytearray(64 << 20))\n"

OnPie = Callable[[Callable[[Pie], Coroutine[Any, Any, Any]]], Any]


def installed(tmp_path: Path, more: str, source: str = ECHO) -> ProgramStore:
    folder = tmp_path / "asked"
    folder.mkdir()
    (folder / "Pie.toml").write_text(MANIFEST + more)
    (folder / "main.py").write_text(source)
    store = ProgramStore(tmp_path / "store")
    store.add(folder)
    return store


def test_an_installed_program_runs_with_its_defaults(on_pie: OnPie, tmp_path: Path) -> None:
    store = installed(tmp_path, PARAMETERS)

    async def scenario(pie: Pie) -> Any:
        return await pie.app.run(find_program("asked", store), {"name": "pie"}, pie.state())

    assert on_pie(scenario) == {"name": "pie", "times": 2}


@pytest.mark.parametrize(
    ("more", "given", "error", "problem"),
    [
        (PARAMETERS, {"name": 1}, InvalidRequest, "`name`: expected text, but found 1"),
        (PARAMETERS, {"nam": "a"}, InvalidRequest, "did you mean `name`"),
        ('kind = "http"\n', {}, Unsupported, "of kind 'http'"),
        ('[capabilities]\nnetwork = ["a"]\n', {}, Unsupported, "network: a"),
        ("[capabilities.limits]\nmemory_mb = 100000\n", {}, LimitExceeded, r"runtime\.memory_mb"),
    ],
)
def test_a_launch_that_the_manifest_forbids_starts_nothing(
    on_pie: OnPie, tmp_path: Path, more: str, given: dict[str, Any], error: type[Exception], problem: str
) -> None:
    store = installed(tmp_path, more)

    async def scenario(pie: Pie) -> None:
        with pytest.raises(error, match=problem):
            await pie.app.run(find_program("asked", store), given, pie.state())

    on_pie(scenario)


@pytest.mark.parametrize(("more", "fits"), [("", True), ("[capabilities.limits]\nmemory_mb = 48\n", False)])
def test_a_program_gets_no_more_memory_than_it_asks_for(
    on_pie: OnPie, tmp_path: Path, more: str, fits: bool
) -> None:
    store = installed(tmp_path, more, GREEDY)

    async def scenario(pie: Pie) -> None:
        running = pie.app.run(find_program("asked", store), {}, pie.state())
        if fits:
            assert await running == 64 << 20
        else:
            with pytest.raises(GuestError, match="MemoryError"):
                await running

    on_pie(scenario)


@pytest.mark.parametrize("as_upload", [False, True])
def test_an_installed_component_runs_with_what_its_manifest_says(
    on_pie: OnPie, tmp_path: Path, as_upload: bool
) -> None:
    component = wat_guest(run("", RETURN_INPUT))
    store = ProgramStore(tmp_path / "store")
    if as_upload:  # bare, with its manifest beside it, as clients of Pie 0.4 send it
        store.add_content(component, MANIFEST + PARAMETERS)
    else:
        folder = tmp_path / "asked"
        folder.mkdir()
        (folder / "Pie.toml").write_text(f'{MANIFEST}entry = "asked.wasm"\n{PARAMETERS}')
        (folder / "asked.wasm").write_bytes(component)
        store.add(folder)

    async def scenario(pie: Pie) -> Any:
        with pytest.raises(InvalidRequest, match="`name` is missing"):
            await pie.app.run(find_program("asked", store), {}, pie.state())
        return await pie.app.run(find_program("asked@0.1.0", store), {"name": "pie"}, pie.state())

    assert on_pie(scenario) == {"name": "pie", "times": 2}
