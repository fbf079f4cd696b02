"""What the docs say about the code is what the code is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules.source_tree import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
QUOTED_PATH = re.compile(
    r"`((?:pie_core|plugins|sdk|inferlets|tests|docs|scripts|benchmarks|\.ci)/[\w./-]*)`"
)
SHELL_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def shell_commands(page: Path) -> list[list[str]]:
    """The commands in the page's shell blocks, without comments and continuation lines."""
    blocks = SHELL_BLOCK.findall(page.read_text())
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_the_generated_parts_say_what_the_code_says() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.stdout}{run.stderr}\nscripts/docs brings them up to date"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_leads_somewhere(page: Path) -> None:
    local = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_path_that_is_named_exists(page: Path) -> None:
    assert not [path for path in QUOTED_PATH.findall(page.read_text()) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_script_that_is_called_can_be_run(page: Path) -> None:
    scripts = {words[0] for words in shell_commands(page) if words[0].startswith(("scripts/", ".ci/"))}
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_pie_command_that_is_called_exists(page: Path) -> None:
    subcommands = {words[1] for words in shell_commands(page) if words[0] == "pie" and len(words) > 1}
    for name in subcommands:
        run = subprocess.run(
            [sys.executable, "-m", "pie_core", name, "--help"], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr


def test_the_readme_shows_the_two_commands_and_ci_runs_them() -> None:
    shown = [words[0] for words in shell_commands(ROOT / "README.md")]
    called = (ROOT / ".ci/run").read_text().split()
    for command in ("scripts/run", "scripts/test"):
        assert command in shown
        assert command in called
