"""`pie build`, `install`, `list` and `uninstall`, and how `pie run` holds its input to a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pie_core.cli import app
from pie_core.cli.arguments import program_input


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def pie(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_new_program_is_built_installed_listed_and_uninstalled() -> None:
    assert pie("new", "mine").exit_code == 0
    built = pie("build", "mine")
    assert built.stdout == "mine-0.1.0.inferlet\n"
    assert "blake3" in built.stderr
    installed = pie("install", "mine-0.1.0.inferlet")
    assert installed.stdout == "pie run mine\n"
    assert pie("install", "mine").exit_code == 0  # the same content
    (row,) = pie("list").stdout.splitlines()
    assert row.startswith("mine@0.1.0")
    assert row.endswith("Asks the model something and streams its answer")
    assert pie("uninstall", "mine@0.1.0").stdout == "uninstalled mine@0.1.0\n"
    assert pie("list").stdout == ""


def test_other_content_under_the_same_version_is_refused_unless_asked_for() -> None:
    pie("new", "mine")
    pie("install", "mine")
    Path("mine/main.py").write_text("changed = 1\n")
    refused = pie("install", "mine")
    assert (refused.exit_code, "other content" in refused.stderr) == (1, True)
    assert pie("install", "mine", "--overwrite").exit_code == 0


def test_what_cannot_be_built_or_installed_is_said(home: Path) -> None:
    Path("bare").mkdir()
    Path("bare/main.py").write_text("")
    Path("text.inferlet").write_text("text")
    for words, problem in (
        (["build", "bare"], "has no Pie.toml"),
        (["install", "none"], "no such file or folder"),
        (["install", "text.inferlet"], "expected a .inferlet file"),
        (["uninstall", "none"], "unknown installed program"),
        (["uninstall", "none@x"], "MAJOR.MINOR.PATCH"),
    ):
        done = pie(*words)
        assert (done.exit_code, problem in done.stderr) == (1, True), done.stderr
    pie("new", "mine")
    pie("install", "mine")
    (home / "programs/records/mine/0.1.0.json").write_text("{")
    listed = pie("list")
    assert listed.exit_code == 1
    assert listed.stdout.startswith("!! mine@0.1.0")


def test_input_that_the_manifest_refuses_never_loads_a_model() -> None:
    for words, problem in (
        (["text-completion"], "the parameter `prompt` is missing"),
        (["text-completion", "--", "--promt", "x"], "did you mean `prompt`"),
        (
            ["text-completion", "--", "--prompt", "x", "--max-tokens", "many"],
            'a whole number, but found "many"',
        ),
        (["text-completion", "--", "Hello"], 'the arguments ["Hello"] without a name'),
    ):
        done = pie("run", *words)
        assert (done.exit_code, problem in done.stderr) == (2, True), done.stderr


def test_arguments_are_taken_for_what_the_manifest_says_they_are() -> None:
    types = {"code": "string", "names": "list", "count": "int", "flag": "string"}
    words = ["--code", "007", "--names", "a", "--count=3", "--other", "1.5", "--flag"]
    found = program_input('{"code": 1, "more": 2}', words, types)
    assert found == {"code": "007", "names": ["a"], "count": 3, "other": 1.5, "flag": True, "more": 2}
    assert program_input(None, ["--names", "a", "--names", "b"], types) == {"names": ["a", "b"]}
