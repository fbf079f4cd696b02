"""The shipped inferlets run natively over the fake host."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inferlet_guest.program import Program, ProgramFailed

from tests.sdk.fake_host import World

FOLDER = Path(__file__).parents[2] / "inferlets"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/main.py"))


@pytest.fixture(autouse=True)
def _leave_no_modules_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    yield
    sys.modules.pop("main", None)


def run(name: str, **given: Any) -> Any:
    program = Program([("main.py", (FOLDER / name / "main.py").read_text())], "main.py")
    program.load()
    result = program.run(json.dumps(given))
    return None if result is None else json.loads(result)


def test_helloworld_knows_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("helloworld") is None
    printed = capsys.readouterr().out
    assert "Hello World!!" in printed
    assert "running in the Pie runtime 1.2.3 for somebody" in printed
    assert "fake, 260 tokens, contexts of 300" in printed


def test_text_completion_streams_and_returns_nothing(
    capsys: pytest.CaptureFixture[str], world: World
) -> None:
    assert run("text-completion", prompt="The capital of France is", temperature=0.0, max_tokens=20) is None
    printed = capsys.readouterr().out
    assert printed.endswith("\n")
    assert printed.strip()
    assert world.calls["step"] == world.calls["execute"] == 0  # the engine ran the loop


def test_raw_completion_continues_the_prompt(capsys: pytest.CaptureFixture[str], world: World) -> None:
    assert run("raw-completion", prompt="abc", max_tokens=10) is None
    printed = capsys.readouterr().out
    assert printed.startswith("abc")
    assert len(printed) > 4
    assert world.calls["cue"] == 0


def test_best_of_n_ranks_answers_of_forks(capsys: pytest.CaptureFixture[str], world: World) -> None:
    best = run("best-of-n", question="q", num_candidates=3, max_tokens=10, temperature=1.0)
    printed = capsys.readouterr().out
    assert printed.count("agreement") == 3
    assert best in printed
    assert world.calls["flush"] == 1
    assert world.calls["fork"] == world.most_at_once == 3


def test_prefix_caching_opens_what_an_earlier_run_saved(
    capsys: pytest.CaptureFixture[str], world: World
) -> None:
    first = run("prefix-caching", document="something long", max_tokens=8)
    assert capsys.readouterr().out.startswith("computed and saved")
    assert world.calls["flush"] == 1
    assert run("prefix-caching", document="something long", max_tokens=8) == first
    assert capsys.readouterr().out.startswith("opened")
    assert world.calls["flush"] == 1
    assert run("prefix-caching", document="something long", max_tokens=8, forget=True) == first
    assert run("prefix-caching", document="another", forget=True)
    assert "nothing to forget" in capsys.readouterr().out


def test_sampler_suite_finds_no_contradiction(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("sampler-suite", prompt="abc")
    printed = capsys.readouterr().out
    assert printed.count("ok: ") == 8
    assert "WRONG" not in printed
    assert result["entropy"] > 0
    assert len(result["top"]) == 8


def test_sampler_suite_fails_on_a_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sdk import fake_host

    monkeypatch.setattr(fake_host.ForwardPass, "probe_entropy", lambda self, row: self.probe_hidden(row))
    monkeypatch.setattr(
        fake_host.ForwardPass,
        "probe_hidden",
        lambda self, row: self.probes.append((row, lambda history: ([], [-1.0]))),
    )
    with pytest.raises(ProgramFailed, match="AssertionError: the entropy"):
        run("sampler-suite")


def test_parallel_generation_runs_side_by_side(capsys: pytest.CaptureFixture[str], world: World) -> None:
    assert run("parallel-generation", max_tokens=10) is None
    printed = capsys.readouterr().out
    assert "Output 1: " in printed
    assert "Output 2: " in printed
    assert world.most_at_once == 2


def test_chat_answers_each_message_and_computes_nothing_twice(
    capsys: pytest.CaptureFixture[str], world: World
) -> None:
    world.inbox += [(0, "hello"), (0, "again"), (0, None)]
    assert run("chat", system="Be kind.", temperature=0.0, max_tokens=8) is None
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    assert world.calls["generate"] == 2
    assert world.calls["fork"] == 0


def test_legacy_completion_returns_the_text() -> None:
    assert run("legacy-completion", prompt="hello", max_tokens=10)


def test_launch_callee_returns_its_answer() -> None:
    assert run("launch-callee", prompt="hello", max_tokens=10)


def test_launch_caller_awaits_all_children_at_once(capsys: pytest.CaptureFixture[str], world: World) -> None:
    assert run("launch-caller", prompts=["a", "b"]) == ["A", "B"]
    assert capsys.readouterr().out == "a A\nb B\n"
    assert world.most_at_once == 2
    (refused,) = run("launch-caller", prompts=["a"], callee="nonesuch")
    assert refused == "(not-found) no program 'nonesuch'"


@pytest.mark.parametrize("name", NAMES)
def test_every_program_says_what_it_shows_and_what_it_takes(name: str) -> None:
    source = (FOLDER / name / "main.py").read_text()
    assert source.startswith('"""')
    introduction = source.split('"""')[1]
    assert "Input:" in introduction
    assert len(source.splitlines()) <= 80, "read in one sitting"
    manifest = tomllib.loads((FOLDER / name / "Pie.toml").read_text())
    assert manifest["package"]["name"] == name
    assert set(manifest["package"]) == {"name", "version", "description"}
    for parameter, about in manifest.get("parameters", {}).items():
        assert parameter in source.split('"""', 2)[2], f"{name} does not use {parameter}"
        assert about["type"] in {"string", "int", "float", "bool", "list"}
        assert parameter in introduction
