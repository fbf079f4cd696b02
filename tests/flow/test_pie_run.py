"""`pie run` as users meet it: what it prints where, its exit codes, Ctrl-C, and damaged files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DUMMY = "models:\n  - name: dummy\n    driver: {type: dummy}\n"

GREETING = """
import sys
from inferlet import session

async def main(input):
    print("printed")
    session.send("sent\\n")
    print("aside", file=sys.stderr)
    return {"name": input.get("name")}
"""

BUSY = """
from inferlet import Context, Model, Sampler, runtime

async def main(input):
    print("ready", flush=True)
    while True:
        ctx = Context(Model.load(runtime.models()[0]))
        ctx.append([40, 41, 42])
        await ctx.generate(Sampler.argmax(), max_tokens=50, auto_flush=False).collect_tokens()
"""

SPINNING = "async def main(input):\n    print('ready', flush=True)\n    while True: pass\n"


@pytest.fixture
def home(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A PIE_HOME with the dummy configured, and compiled guests kept between test runs."""
    cache = Path(request.config.cache.mkdir("aot"))
    (tmp_path / "config.yaml").write_text(f"{DUMMY}runtime: {{program_cache: '{cache}', cpu_s: 60}}\n")
    return tmp_path


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pie_core", "run", *arguments],
        env={**os.environ, "PIE_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pie_run(home: Path, source: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    (home / "program.py").write_text(source)
    running = start(home, str(home / "program.py"), *arguments)
    stdout, stderr = running.communicate(timeout=120)
    return running.returncode, stdout, stderr


def test_it_streams_what_the_program_says_and_prints_its_value_last(home: Path) -> None:
    code, stdout, stderr = pie_run(home, GREETING, "--", "--name", "pie")
    assert (code, stdout) == (0, 'printed\nsent\n{"name": "pie"}\n')
    assert "aside" in stderr


def test_quiet_prints_the_value_only(home: Path) -> None:
    code, stdout, _ = pie_run(home, GREETING, "--quiet", "--input", json.dumps({"name": 7}))
    assert (code, stdout) == (0, '{"name": 7}\n')


def test_a_failing_program_exits_1_with_its_traceback_on_stderr(home: Path) -> None:
    code, stdout, stderr = pie_run(
        home, "async def main(input):\n    raise ValueError('broken on purpose')\n"
    )
    assert (code, stdout) == (1, "")
    assert "broken on purpose" in stderr
    assert "line 2" in stderr


def test_an_unknown_program_exits_2_and_suggests_one(home: Path) -> None:
    running = start(home, "text-completoin")
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "text-completion" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", [BUSY, SPINNING], ids=["generating", "spinning"])
def test_ctrl_c_ends_it_at_any_moment_twenty_times_in_a_row(home: Path, source: str) -> None:
    (home / "program.py").write_text(source)
    for round_ in range(20):
        running = start(home, str(home / "program.py"))
        if round_ % 2:
            assert running.stdout is not None
            running.stdout.readline()  # the program runs
            time.sleep(0.013 * round_)
        else:
            time.sleep(0.4 + 0.06 * round_)  # anywhere from the first imports on
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
        assert running.returncode == 130, stderr
        assert "Traceback" not in stderr


def test_a_cache_folder_that_cannot_be_written_only_costs_time(home: Path) -> None:
    (home / "file").write_text("in the way")
    config = f"{DUMMY}runtime: {{program_cache: '{home}/file/below'}}\n"
    (home / "config.yaml").write_text(config)
    code, stdout, stderr = pie_run(home, "async def main(input):\n    return 5\n")
    assert (code, stdout) == (0, "5\n")
    assert "cache" in stderr


@pytest.mark.parametrize("content", [b"GGUF" + bytes(60), b"", b"not a model at all" * 100])
def test_a_damaged_gguf_file_is_refused_by_name(home: Path, content: bytes) -> None:
    pytest.importorskip("torch")
    (home / "broken.gguf").write_bytes(content)
    (home / "config.yaml").write_text(f"models:\n  - {{name: broken, path: '{home}/broken.gguf'}}\n")
    code, _, stderr = pie_run(home, GREETING)
    assert code in (1, 2)
    assert "broken.gguf" in stderr
    assert "Traceback" not in stderr
