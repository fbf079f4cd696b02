"""The commands around `pie run`: configuration, models, scaffolds, the doctor, and their help."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from pie_core import __version__
from pie_core.cli import app
from pie_core.config import Config, parse_config, read_config


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def pie(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


COMMANDS = [
    [],
    ["run"],
    ["serve"],
    ["auth"],
    ["auth", "add"],
    ["auth", "remove"],
    ["auth", "list"],
    ["new"],
    ["check"],
    ["doctor"],
    ["inferlets"],
    ["build"],
    ["install"],
    ["uninstall"],
    ["list"],
    ["plugins"],
    ["plugins", "list"],
    ["plugins", "doctor"],
    ["plugins", "new"],
    ["model"],
    ["model", "list"],
    ["model", "import"],
    ["model", "fetch"],
    ["model", "logits"],
    ["model", "check"],
    ["model", "plan"],
    ["config"],
    ["config", "init"],
    ["config", "show"],
    ["config", "set"],
    ["config", "schema"],
    ["config", "options"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_help_ends_with_examples_of_its_command(words: list[str]) -> None:
    help_text = pie(*words, "--help").stdout
    examples = help_text.partition("Examples:\n")[2].splitlines()
    assert all(line.startswith("    pie ") for line in examples if line.strip())
    assert any(line.startswith(f"    {' '.join(['pie', *words])}") for line in examples)


def test_help_and_version_load_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['pie', sys.argv[1]]\n"
        "from pie_core.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'wasmtime', 'numpy', 'transformers', 'huggingface_hub', 'pluggy', 'pie_plugins')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    for flag in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", script, flag], capture_output=True, text=True, check=True
        )
        assert done.stderr.strip() == "[]"
        assert done.stdout


def test_the_version_is_printed() -> None:
    assert pie("--version").stdout == f"pie {__version__}\n"


def test_an_unknown_command_ends_with_2() -> None:
    assert pie("rum").exit_code == 2


def test_a_configuration_is_written_changed_and_shown(home: Path) -> None:
    assert pie("config", "init").exit_code == 0
    assert read_config(home / "config.yaml") == Config()
    refused = pie("config", "init")
    assert (refused.exit_code, "exists; `pie config set` changes it" in refused.stderr) == (2, True)
    assert pie("config", "init", "--force").exit_code == 0
    assert pie("config", "set", "runtime.memory_mb", "99").exit_code == 0
    shown = pie("config", "show")
    assert yaml.safe_load(shown.stdout)["runtime"]["memory_mb"] == 99
    assert str(home / "config.yaml") in shown.stderr


def test_what_is_shown_without_a_file_are_the_defaults() -> None:
    shown = pie("config", "show")
    assert "the defaults" in shown.stderr
    assert parse_config(shown.stdout, "shown", Path("/")) == Config()


def test_a_bad_change_ends_with_2_and_names_the_nearest_key() -> None:
    done = pie("config", "set", "runtime.memory", "99")
    assert done.exit_code == 2
    assert "unknown key; did you mean `memory_mb`?" in done.stderr


def test_the_options_of_a_driver_are_listed_as_they_go_into_the_file() -> None:
    shown = pie("config", "options", "dummy").stdout
    assert yaml.safe_load(shown)["vocab_size"] == 0
    assert shown.count("\n# ") == len(yaml.safe_load(shown))
    unknown = pie("config", "options", "dumy")
    assert (unknown.exit_code, "did you mean 'dummy'?" in unknown.stderr) == (2, True)


def test_the_schema_is_json() -> None:
    assert json.loads(pie("config", "schema").stdout)["properties"]["models"]


def test_check_tells_what_would_run_or_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "pie.yaml"
    file.write_text("models: [{name: m, driver: {type: dummy, device: [cpu, x]}}]\n")
    good = pie("check", str(file))
    assert good.exit_code == 0
    assert good.stdout == f"m: needs no checkpoint, driver dummy on cpu, x\n{file} is a good configuration\n"

    file.write_text("models: [{name: m, driver: {type: dummy}}]\nruntime: {memory_mb: 0}\n")
    bad = pie("check", str(file))
    assert bad.exit_code == 2
    assert f"{file}:2: runtime.memory_mb: expected a whole number from 1 to 4096, but found 0" in bad.stderr

    file.write_text("models:\n- name: m\n  driver: {type: no-such-driver}\n")
    assert (
        f"{file}:3: models[0].driver.type: unknown driver 'no-such-driver'" in pie("check", str(file)).stderr
    )


def test_models_are_imported_and_listed(tmp_path: Path) -> None:
    empty = pie("model", "list")
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert "default is not here yet" in empty.stderr
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert pie("model", "import", "tiny.gguf").exit_code == 0
    assert pie("model", "import", "tiny.gguf", "--name", "other", "--link").exit_code == 0
    rows = pie("model", "list").stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["other", "tiny"]
    assert [row.endswith("(link)") for row in rows] == [True, False]
    refused = pie("model", "import", "none.gguf")
    assert (refused.exit_code, "none.gguf does not exist" in refused.stderr) == (1, True)


def test_a_new_program_is_python_that_the_sdk_understands(tmp_path: Path) -> None:
    made = pie("new", "my-first")
    assert made.stdout == "pie run ./my-first\n"
    tree = ast.parse((tmp_path / "my-first/main.py").read_text())
    assert [node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)] == ["main"]
    (imported,) = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    sdk = ast.parse((Path(__file__).parents[3] / "sdk/python/inferlet/__init__.py").read_text())
    (names,) = [
        ast.literal_eval(node.value)
        for node in sdk.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert {alias.name for alias in imported.names} <= set(names)


@pytest.mark.parametrize(
    ("name", "problem"), [("taken", "taken exists"), ("1st", "cannot name a program"), ("a b", "cannot")]
)
def test_a_new_program_never_overwrites_and_has_a_usable_name(
    tmp_path: Path, name: str, problem: str
) -> None:
    (tmp_path / "taken").mkdir()
    done = pie("new", name)
    assert (done.exit_code, problem in done.stderr) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_the_doctor_looks_at_every_part_and_ends_with_1_if_one_is_broken(home: Path) -> None:
    (home).mkdir()
    (home / "config.yaml").write_text("models: [{name: m, driver: {type: dummy}}]\n")
    done = pie("doctor")
    rows = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert {"pie", "python", "home", "config", "sandbox", "guest", "plugin", "torch", "model"} <= set(rows)
    assert (rows["pie"], rows["home"], rows["config"], rows["model"]) == ("ok", "ok", "ok", "--")
    (home / "config.yaml").write_text("models: 3\n")
    broken = pie("doctor")
    assert broken.exit_code == 1
    assert "!!  config     " in broken.stdout
    assert "expected a list" in broken.stdout


def test_the_shipped_programs_are_listed_with_what_they_show() -> None:
    done = pie("inferlets")
    assert done.exit_code == 0
    assert all(len(line.split(maxsplit=1)) == 2 for line in done.stdout.splitlines())


@pytest.mark.parametrize("command", [("new",), ("plugins", "new", "driver")])
def test_a_folder_that_cannot_be_made_is_told(command: tuple[str, ...]) -> None:
    assert pie(*command, "mine").exit_code == 0
    again = pie(*command, "mine")
    assert (again.exit_code, again.stderr) == (2, "error: mine exists; choose another name\n")


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused = pie("new", "file/mine")
    assert (refused.exit_code, refused.stderr) == (2, "error: file/mine cannot be made: Not a directory\n")
