"""The page about writing inferlets shows lines of programs that run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from inferlet_guest.program import Program

from tests.sdk.fake_host import World, turn

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "docs" / "examples" / "tour.py"
PAGE = ROOT / "docs" / "write-an-inferlet.md"
TESTED = [TOUR, *ROOT.glob("inferlets/*/main.py")]
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    world.inbox.append((10**12, "too late"))
    program = Program([("tour.py", TOUR.read_text())], "tour.py")
    program.load()
    report = json.loads(program.run('{"question": "Why?"}') or "")
    del sys.modules["tour"]
    assert report["answer"]
    assert all([*report["conversation"], report["in_time"]])
    assert report["likely"] in (97, 98)
    assert len(report["best"]) > 1
    assert report["pages"] == [1, 1]
    assert report["remembered"] == len(turn("system", "A long text that every run needs."))
    assert (report["reply"], report["refused"]) == (None, "invalid-request")
    assert world.outbox == ["Are you there?"]
    assert report["sure"]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.strip().splitlines()[0])
def test_a_snippet_is_part_of_a_tested_program(snippet: str) -> None:
    assert any(snippet in path.read_text() for path in TESTED)
