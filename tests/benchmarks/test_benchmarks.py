"""Every benchmark runs to its end in its quick form, and its figures are numbers; how large they are is not tested."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import boundary, completion, engine_queue, hf_export, launch, peers
from benchmarks.bare_loop import greedy
from benchmarks.pie_in_process import WatchedApplication, dummy, run_all
from pie_core.testing.any_architecture import write_checkpoint
from tests.plugins.models.layers.test_gguf_checkpoint import write_gguf
from tests.plugins.models.reference import ARCHITECTURES, tiny

Main = Callable[[Sequence[str]], None]

pytestmark = pytest.mark.slow


DUMMY = "models: [{name: dummy, driver: {type: dummy}}]"


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled guests are kept between test runs."""
    monkeypatch.setenv("PIE_HOME", str(request.config.cache.mkdir("benchmarks")))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "dummy.yaml"
    path.write_text(DUMMY, encoding="utf-8")
    return path


def results(main: Main, tmp_path: Path, *arguments: str) -> Any:
    file = tmp_path / "results.json"
    main(["--quick", "--json", str(file), *arguments])
    return json.loads(file.read_text(encoding="utf-8"))


def check_numbers(row: dict[str, Any]) -> None:
    assert row
    assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))


def test_completion_compares_guests_with_the_bare_loop(tmp_path: Path, config: Path) -> None:
    rows = results(completion.main, tmp_path, "--guests", "1", "3", "--config", str(config))
    assert [row["guests"] for row in rows] == [1, 3]
    for row in rows:
        check_numbers(row)


@pytest.mark.parametrize("benchmark", [launch, boundary], ids=["launch", "boundary"])
def test_what_needs_no_model_runs(benchmark: Any, tmp_path: Path) -> None:
    check_numbers(results(benchmark.main, tmp_path))


def test_the_bare_loop_draws_the_tokens_that_guests_draw() -> None:
    prompts = [[5, 6, 7], [8, 9]]

    async def guests_tokens() -> tuple[list[Any], list[list[int]]]:
        app = WatchedApplication(dummy(), lambda _: None)
        async with app:
            given = [{"prompt": prompt, "max_tokens": 12} for prompt in prompts]
            ran = await run_all(app, peers.PROGRAM, given)
            return [returned for returned, _ in ran], greedy(app.driver, prompts, 12)

    by_guests, by_loop = asyncio.run(guests_tokens())
    assert by_guests == by_loop


def test_an_export_holds_the_tensors_of_the_checkpoint_under_their_names(tmp_path: Path) -> None:
    config = tiny("llama")
    write_checkpoint(tmp_path, ARCHITECTURES["llama"], config)
    hf_export.export(write_gguf(tmp_path, "llama", config), tmp_path / "export")
    original, exported = (
        load_file(tmp_path / "model.safetensors"),
        load_file(tmp_path / "export" / "model.safetensors"),
    )
    assert original.keys() == exported.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor.to(torch.bfloat16), exported[name]), name


def test_a_peer_that_does_not_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-peer ended with status 3"):
        peers.Peer("no-such-peer", [sys.executable, "-c", "raise SystemExit(3)"], {})


def test_the_queue_is_measured_with_and_without_prompts_that_begin_alike(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine_queue.main(["--waiting", "40", "--steps", "12"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split() for line in lines] == [
        ["40", "waiting,", alike, "rows", "alike"] for alike in ("0", "500")
    ]
    assert all(float(line.split()[5]) > 0 for line in lines)
