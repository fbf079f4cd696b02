"""`pie model logits`, `check` and `plan` on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from pie_core.cli import app
from pie_core.testing.any_architecture import write_checkpoint
from pie_plugins.models.llama import DECLARATION
from tests.plugins.models.reference import tiny


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny", DECLARATION, tiny("llama"))
    return tmp_path / "tiny"


def pie(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["model", *map(str, arguments)])


def test_logits_and_the_continuation_are_written(checkpoint: Path, tmp_path: Path) -> None:
    prompt, out = tmp_path / "prompt.json", tmp_path / "out.safetensors"
    prompt.write_text("[5, 9, 60, 2]")
    assert pie("logits", checkpoint, "--tokens", prompt, "--greedy", 3, "--out", out).exit_code == 0
    written = load_file(out)
    assert written["logits"].shape == (4, 320)
    assert written["logits"].dtype == np.dtype("float32")
    assert written["tokens"].shape == (3,)
    assert written["tokens"][0] == written["logits"][-1].argmax()


@pytest.mark.parametrize("content", ["{}", "[]", '["a"]', "[1", "[true]", "[[1, 2]]"])
def test_a_file_that_holds_no_tokens_is_refused(checkpoint: Path, tmp_path: Path, content: str) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(content)
    refused = pie("logits", checkpoint, "--tokens", prompt, "--out", tmp_path / "out.safetensors")
    assert refused.exit_code == 2
    assert str(prompt) in refused.stderr


def test_a_checkpoint_equals_its_reference(checkpoint: Path) -> None:
    checked = pie("check", checkpoint)
    assert checked.exit_code == 0, checked.stderr
    assert "12 tokens equal" in checked.stdout


def test_a_model_that_computes_something_else_fails_the_check(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pie_plugins.models.layers import norm

    plain = norm.RMSNorm.__call__
    monkeypatch.setattr(norm.RMSNorm, "__call__", lambda *given: plain(*given) * 1.01)
    checked = pie("check", checkpoint)
    assert checked.exit_code == 1
    assert "apart" in checked.stdout


def test_a_plan_needs_the_configuration_alone(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    told = pie("plan", checkpoint).stdout
    assert "architecture   llama" in told
    assert "8 x H200" in told
