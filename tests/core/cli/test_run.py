"""`pie run` from the outside: what appears where, the exit codes, standard input and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("scripted_run.py")

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the command is given: a program, and a configuration that needs no weights."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/main.py").write_text("async def main(input): ...\n")
    (tmp_path / "pie.yaml").write_text("models: [{name: m, driver: {type: dummy}}]\n")
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "run", "mine", "-c", "pie.yaml", *arguments]


@pytest.fixture
def run(folder: Path) -> Run:
    def started(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        options.setdefault("stdin", subprocess.DEVNULL)
        if "input" in options:
            del options["stdin"]
        return subprocess.run(command(*arguments), cwd=folder, capture_output=True, timeout=60, **options)

    return started


def test_output_streams_and_the_return_value_comes_last(run: Run) -> None:
    done = run("--", "--act", "stream", "--value", "the end")
    assert done.stdout == "Paris é\nprinted".encode() + b"\xff\nthe end\n"
    assert done.stderr == b"loading (0 MiB)\ncomplaint\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('"two\\nlines\\n"', "two\nlines\n"),
        ("null", ""),
        ("3", "3\n"),
        ('{"a": ["é", true, null]}', '{"a": ["é", true, null]}\n'),
        ('""', ""),
        ("[]", "[]\n"),
    ],
)
def test_quiet_prints_the_return_value_only(run: Run, value: str, shown: str) -> None:
    done = run("--quiet", "--input", json.dumps({"act": "stream", "value": json.loads(value)}))
    assert done.stdout.decode() == shown
    assert done.stderr == b"complaint\n"


def test_input_and_arguments_are_merged(run: Run) -> None:
    given = '{"act": "inputs_back", "a": 1, "max_tokens": 2}'
    done = run("--input", given, "--", "--max-tokens=5", "-t", "0.5", "text", "--flag")
    assert json.loads(done.stdout) == {
        "a": 1,
        "max_tokens": 5,
        "t": 0.5,
        "_positional": ["text"],
        "flag": True,
    } or (
        json.loads(done.stdout) == {"a": 1, "max_tokens": 5, "t": 0.5, "flag": True, "_positional": ["text"]}
    )


def test_lines_of_a_pipe_and_of_a_file_reach_the_program(run: Run, folder: Path) -> None:
    lines = "one\r\n\ntwo é\nlast"
    assert json.loads(run("--", "--act", "echo", input=lines.encode()).stdout) == ["one", "", "two é", "last"]
    (folder / "lines.txt").write_text(lines, newline="")
    with (folder / "lines.txt").open("rb") as stream:
        assert json.loads(run("--", "--act", "echo", stdin=stream).stdout) == ["one", "", "two é", "last"]


def test_no_standard_input_is_the_end_of_messages(run: Run, folder: Path) -> None:
    assert run("--", "--act", "echo").stdout == b"[]\n"
    closed = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" <&-', *command("--", "--act", "echo")],
        cwd=folder,
        capture_output=True,
        timeout=60,
    )
    assert (closed.stdout, closed.returncode) == (b"[]\n", 0)


def test_a_line_beyond_the_limit_is_an_error(run: Run, folder: Path) -> None:
    (folder / "pie.yaml").write_text(
        "server: {max_message_bytes: 10}\nmodels: [{name: m, driver: {type: dummy}}]\n"
    )
    done = run("--", "--act", "echo", input=b"x" * 100_000)
    assert done.returncode == 1
    assert b"longer than 10 bytes (server.max_message_bytes)" in done.stderr


def test_a_program_that_fails_shows_its_own_error_and_ends_with_1(run: Run) -> None:
    done = run("--", "--act", "fail")
    assert done.returncode == 1
    assert done.stdout == b"half a line\n"
    assert done.stderr.splitlines()[-1] == b"ValueError: no"
    assert b'Traceback (most recent call last):\n  File "main.py", line 3' in done.stderr
    assert b"pie_core" not in done.stderr


def test_files_land_beside_the_command_under_free_names(run: Run, folder: Path) -> None:
    (folder / "mine-1.bin").write_bytes(b"mine")
    done = run("--", "--act", "send_file")
    assert [(folder / f"mine-{n}.bin").read_bytes() for n in (1, 2, 3)] == [b"mine", b"one", b"two"]
    assert done.stderr.decode().splitlines() == [
        "mine sent a file: mine-2.bin",
        "mine sent a file: mine-3.bin",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--input", "{"], "--input is not JSON"),
        (["--input", "[1]"], "--input must be a JSON object"),
        (["--input", "@none.json"], "--input @none.json cannot be read"),
        (["-c", "none.yaml"], "none.yaml: no such file"),
        (["--unknown"], "No such option"),
    ],
)
def test_wrong_usage_ends_with_2(run: Run, arguments: list[str], problem: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert problem in done.stderr.decode()
    assert done.stdout == b""


def test_an_unknown_program_driver_or_option_ends_with_2_and_names_the_nearest(
    run: Run, folder: Path
) -> None:
    unknown = subprocess.run(
        [sys.executable, str(SCRIPT), "run", "nothing-like-this"], cwd=folder, capture_output=True, timeout=60
    )
    assert unknown.returncode == 2
    assert b"nothing-like-this" in unknown.stderr
    (folder / "pie.yaml").write_text(
        "models:\n- name: m\n  driver:\n    type: dumy\n    options:\n      zz: 1\n"
    )
    done = run("--", "--act", "echo")
    assert done.returncode == 2
    assert "pie.yaml:4: models[0].driver.type: unknown driver 'dumy'" in done.stderr.decode()
    assert "did you mean 'dummy'?" in done.stderr.decode()
    (folder / "pie.yaml").write_text(
        "models:\n- name: m\n  driver:\n    type: dummy\n    options:\n      zz: 1\n"
    )
    assert (
        "pie.yaml:6: models[0].driver.options.zz: unknown key" in run("--", "--act", "echo").stderr.decode()
    )


def waiting(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"waiting\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_the_program_cleanly(folder: Path, number: signal.Signals, code: int) -> None:
    process = waiting(folder, "--", "--act", "wait")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, b"cleaned up\n")


def test_a_program_that_will_not_be_cancelled_ends_at_the_third_ctrl_c(folder: Path) -> None:
    process = waiting(folder, "--", "--act", "wait", "--cleanup", "600")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_ctrl_c_while_starting_ends_with_130_and_no_traceback(folder: Path) -> None:
    (folder / "models").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_START, *command()[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"starting\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"")


_SLOW_START = """
import sys, time, types
import pie_core.models
def slow(*arguments):
    print("starting", flush=True)
    time.sleep(600)
pie_core.models.with_paths = slow
sys.modules["pie_core.app"] = types.SimpleNamespace(run_program=None)
sys.argv[:1] = []
from pie_core.cli import main
main()
"""


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        command("--", "--act", "flood"),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
