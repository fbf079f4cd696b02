"""Hugging Face directories: one file or several, and what is wrong with a damaged one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pie_core.contracts.driver import DriverRequest, Progress
from pie_core.errors import LoadError
from pie_core.testing.any_architecture import logits, write_checkpoint
from pie_core.testing.batches import Stepper
from pie_plugins.drivers.portable import pie_drivers
from pie_plugins.drivers.portable.options import PortableOptions
from pie_plugins.models.llama import DECLARATION
from tests.plugins.models.reference import ARCHITECTURES, portable, tiny

INDEX = "model.safetensors.index.json"
PROMPT = list(range(5, 25))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, DECLARATION, tiny("llama"))
    return tmp_path


def shard(folder: Path, parts: int) -> None:
    """Spreads the tensors over several files, as large checkpoints come."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    owners: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = {name: weights[name] for name in sorted(weights)[part::parts]}
        save_file(chosen, folder / file)
        owners |= dict.fromkeys(chosen, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owners}))


def test_shards_give_what_one_file_gives_and_stray_files_are_left_alone(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"something else")
    expected = logits(Stepper(portable(folder)), [PROMPT])
    shard(folder, 3)
    assert np.array_equal(logits(Stepper(portable(folder)), [PROMPT]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_types_are_converted(folder: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({name: tensor.float() for name, tensor in weights.items()}, folder / "model.safetensors")
    expected = logits(Stepper(portable(folder)), [PROMPT])
    save_file(weights, folder / "model.safetensors")
    assert np.array_equal(logits(Stepper(portable(folder)), [PROMPT]), expected)


def test_bfloat16_is_near_float32(folder: Path) -> None:
    exact = logits(Stepper(portable(folder)), [PROMPT])
    rounded = logits(Stepper(portable(folder, dtype="bfloat16")), [PROMPT])
    assert 0 < np.sqrt(((rounded - exact) ** 2).mean()) < 0.05 * exact.std()


def test_progress_reaches_its_total(folder: Path) -> None:
    seen: list[Progress] = []
    request = DriverRequest(folder, "cpu", PortableOptions(kv_memory_mb=1), ARCHITECTURES, {}, seen.append)
    pie_drivers()[0].load(request).close()
    assert seen[-1].done == seen[-1].total > 0
    assert [each.done for each in seen] == sorted(each.done for each in seen)


def test_the_revision_follows_the_content(folder: Path) -> None:
    first = portable(folder).capabilities.weights_revision
    assert portable(folder).capabilities.weights_revision == first
    write_checkpoint(folder, DECLARATION, tiny("llama"), seed=1)
    assert portable(folder).capabilities.weights_revision != first


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scribble(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int32)
    save_file(weights, folder / "model.safetensors")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    shard(folder, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_outside(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def unclear(folder: Path) -> None:
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def json_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def other_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny("mamba")))


def odd_heads(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny("llama", num_key_value_heads=3)))


def wrong_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny("llama", hidden_size="64")))


def unknown_rope(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(tiny("llama", rope_scaling={"rope_type": "spiral"})))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "model.safetensors.*fetch it again"),
        (scribble, "model.safetensors.*fetch it again"),
        (empty, "model.safetensors.*fetch it again"),
        (integers, "model.norm.weight.*I32"),
        (no_weights, "no .safetensors file"),
        (lost_shard, "model-00002-of-00002.safetensors"),
        (unclear, r"2 .safetensors files and neither.*one\.safetensors"),
        (index_outside, "not a file of this directory"),
        (broken_json, "config.json.*JSON"),
        (json_list, "config.json.*list"),
        (other_model, "'mamba'.*llama, .*qwen3"),
        (odd_heads, "num_attention_heads is 4.*num_key_value_heads"),
        (wrong_type, "hidden_size is '64', expected int"),
        (unknown_rope, "rope_type is 'spiral'.*llama3"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    with pytest.raises(LoadError, match=f"(?s){words}"):
        portable(folder)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nowhere.*no such checkpoint"):
        portable(tmp_path / "nowhere")


def test_pages_that_do_not_fit_into_kv_memory_are_refused(folder: Path) -> None:
    with pytest.raises(LoadError, match="kv_memory_mb"):
        portable(folder, kv_memory_mb=1, kv_page_size=100_000)
