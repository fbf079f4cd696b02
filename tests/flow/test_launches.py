"""What is looked for once is not looked for at every launch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pie_core.guests import python_guest
from pie_core.processes import program_runner
from tests.flow.conftest import StartPie


def test_the_sources_of_the_python_guest_are_compared_once(
    start_pie: StartPie, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []

    def counting() -> Path:
        looked.append(python_guest())
        return looked[-1]

    monkeypatch.setattr(program_runner, "python_guest", counting)

    async def main() -> None:
        async with start_pie() as pie:
            for number in range(3):
                assert await pie.run(f"async def main(input):\n    return {number}\n") == number

    asyncio.run(main())
    assert len(looked) == 1
