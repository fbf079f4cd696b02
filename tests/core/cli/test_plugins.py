"""`pie plugins`: what is installed, what is wrong with it, and beginnings that keep their contract at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pie_core import plugins as registry_module
from pie_core.cli import app
from pie_core.cli.plugins import Kind, write_plugin
from pie_core.plugins import BrokenPlugin, inspect_plugins
from tests.rules.source_tree import ROOT


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pie(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plugins", *arguments])


def test_the_list_tells_of_each_where_it_is_from_and_what_it_gives() -> None:
    done = pie("list")
    assert done.exit_code == 0
    (row,) = [row for row in done.stdout.splitlines() if row.startswith("dummy ")]
    assert re.fullmatch(r"dummy +driver dummy +pie-core \S+ +API 1 +\d+\.\d ms", row)


def test_the_doctor_ends_well_where_nothing_is_wrong() -> None:
    done = pie("doctor")
    assert done.exit_code == 0
    assert "ok  dummy" in done.stdout


def test_the_doctor_and_the_list_name_what_is_broken_and_who_are_at_odds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unsound = inspect_plugins()
    unsound.broken.append(BrokenPlugin("odd", "pie-odd", "ValueError: no", "1.2", "pie_odd"))
    unsound.conflicts.append("driver 'x' is claimed by both a and b")
    monkeypatch.setattr(registry_module, "inspect_plugins", lambda: unsound)
    examined = pie("doctor")
    assert examined.exit_code == 1
    assert "!!  odd              broken (pie-odd 1.2, pie_odd): ValueError: no" in examined.stdout
    assert "!!  conflict         driver 'x' is claimed by both a and b" in examined.stdout
    listed = pie("list")
    assert listed.exit_code == 0
    assert "!! odd (pie-odd 1.2) is broken: ValueError: no" in listed.stdout


@pytest.mark.parametrize(
    ("name", "problem"),
    [("Mine", "cannot name"), ("core", "pie_core is already installed"), ("taken", "taken exists")],
)
def test_a_new_plugin_needs_a_name_of_its_own(name: str, problem: str) -> None:
    Path("taken").mkdir()
    done = pie("new", "driver", name)
    assert (done.exit_code, problem in done.stderr) == (2, True)


def test_a_new_plugin_is_a_package_with_an_entry_point(tmp_path: Path) -> None:
    done = pie("new", "media", "my-eye")
    assert done.stdout == "pip install -e './my-eye[test]' && pytest my-eye\n"
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "my-eye/README.md",
        "my-eye/pie_my_eye/__init__.py",
        "my-eye/pie_my_eye/frontend.py",
        "my-eye/pyproject.toml",
        "my-eye/tests/test_frontend.py",
    ]
    texts = {name: Path(name).read_text() for name in files}
    assert 'my-eye = "pie_my_eye"' in texts["my-eye/pyproject.toml"]
    assert not [name for name, text in texts.items() if "@" in text.replace("@hookimpl", "")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_a_new_plugin_passes_its_suite_at_once_and_reads_like_ours(kind: Kind, tmp_path: Path) -> None:
    write_plugin(kind, "my-first", tmp_path / "my-first")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in (
        ["ruff", "check", "--config", str(ROOT / "pyproject.toml"), "."],
        ["ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), "."],
        ["pytest", "-q", "-p", "no:cacheprovider"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path / "my-first",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
