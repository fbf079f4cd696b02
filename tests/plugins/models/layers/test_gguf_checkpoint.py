"""GGUF files: their tensors equal the gguf library's, and they compute what the Hugging Face directory computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pie_core.errors import LoadError
from pie_core.testing.any_architecture import logits, weight_table, write_checkpoint
from pie_core.testing.batches import Stepper
from pie_plugins.models.layers.gguf_checkpoint import GgufCheckpoint
from tests.plugins.models.reference import ARCHITECTURES, portable, tiny, tiny_moe
from tests.plugins.models.test_qwen3_vl import AXES

PROMPT = list(range(5, 25))
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def pairs_from_halves(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """How llama.cpp's converter orders the rows of q and k."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    folder: Path,
    name: str,
    config: dict[str, Any],
    kind: str = "F32",
    architecture: str = "",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """The checkpoint of `folder` as a GGUF file, its matrices stored as `kind`."""
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_token_list([f"token {place}" for place in range(1000)])  # long arrays are stepped over
    for key, value in (extra or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(f"{name}.{key}", value)  # type: ignore[operator]
    weights = load_file(folder / "model.safetensors")
    for source in weight_table(ARCHITECTURES[architecture or name], config).sources():
        if ".experts." not in source.hf:
            values = weights[source.hf]
            if source.gguf_heads:
                values = pairs_from_halves(values, source.gguf_heads)
            add_tensor(writer, source.gguf, values, kind)
    for layer in range(config["num_hidden_layers"]) if "num_experts" in config else ():
        hf, count = f"model.layers.{layer}.mlp", config["num_experts"]
        for stored, values in expert_tensors(weights, hf, f"blk.{layer}", count).items():
            add_tensor(writer, stored, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray[Any, Any], kind: str) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values)
    else:
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)


@pytest.mark.parametrize("kind", TYPES)
def test_every_tensor_equals_what_the_gguf_library_reads(tmp_path: Path, kind: str) -> None:
    config = tiny("llama")
    write_checkpoint(tmp_path, ARCHITECTURES["llama"], config)
    path = write_gguf(tmp_path, "llama", config, kind)
    checkpoint = GgufCheckpoint(path)
    tensors = gguf.GGUFReader(path).tensors
    assert {each.name for each in tensors} == set(checkpoint.tensors)
    for each in tensors:
        expected = gguf.dequantize(each.data, each.tensor_type)
        seen = checkpoint.read(each.name)
        assert tuple(seen.shape) == tuple(reversed(each.shape.tolist()))
        assert np.array_equal(seen.to(torch.float32).numpy(), expected.reshape(seen.shape))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_a_gguf_file_computes_what_the_directory_computes(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    config = tiny(name, **changes)
    write_checkpoint(tmp_path, ARCHITECTURES[name], config)
    path = write_gguf(tmp_path, name, config)
    expected = logits(Stepper(portable(tmp_path)), [PROMPT])
    assert np.array_equal(logits(Stepper(portable(path)), [PROMPT]), expected)


MOE = {**tiny_moe(), "head_dim": 32}
VL = {**tiny("qwen3_vl"), "rope_scaling": AXES, "rope_theta": 5e6}
VL_MOE = {**VL, **tiny_moe(), "model_type": "qwen3_vl_moe"}
# Names of architectures here and in GGUF files.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", tiny("llama")),
    "qwen3": ("qwen3", tiny("qwen3")),
    "qwen3moe": ("qwen3_moe", MOE),
    "qwen3vl": ("qwen3_vl", VL),
    "qwen3vlmoe": ("qwen3_vl_moe", VL_MOE),
}


def write_family(folder: Path, kind: str, quantized: str = "F32") -> Path:
    """As `write_gguf`, with experts as one tensor a projection, and what llama.cpp's converter says of these."""
    name, config = FAMILIES[kind]
    extra: dict[str, Any] = {}
    if "num_experts" in config:
        extra = {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    if "mrope_section" in config.get("rope_scaling", {}):
        extra |= {"rope.dimension_sections": [*config["rope_scaling"]["mrope_section"], 0]}
        extra |= {"n_deepstack_layers": 3}
    return write_gguf(folder, kind, config, quantized, architecture=name, extra=extra)


def expert_tensors(weights: Mapping[str, Any], hf: str, blk: str, count: int) -> dict[str, Any]:
    """All experts of a layer, in the names and shapes of GGUF files."""
    if f"{hf}.experts.gate_up_proj" in weights:  # stacked, and turned, on the hub
        gate_up = weights[f"{hf}.experts.gate_up_proj"].swapaxes(1, 2)
        gate, up = np.split(gate_up, 2, axis=1)
        down = weights[f"{hf}.experts.down_proj"].swapaxes(1, 2)
    else:
        gate, up, down = (
            np.stack([weights[f"{hf}.experts.{each}.{name}_proj.weight"] for each in range(count)])
            for name in ("gate", "up", "down")
        )
    return {f"{blk}.ffn_{n}_exps.weight": v for n, v in (("gate", gate), ("up", up), ("down", down))}


@pytest.mark.parametrize("kind", ["qwen3moe", "qwen3vl", "qwen3vlmoe"])
def test_experts_and_axes_compute_what_the_directory_computes(tmp_path: Path, kind: str) -> None:
    name, config = FAMILIES[kind]
    write_checkpoint(tmp_path, ARCHITECTURES[name], config)
    expected = logits(Stepper(portable(tmp_path)), [PROMPT])
    assert np.array_equal(logits(Stepper(portable(write_family(tmp_path, kind))), [PROMPT]), expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_tensors_have_the_names_of_the_gguf_library(kind: str) -> None:
    name, config = FAMILIES[kind]
    table = weight_table(ARCHITECTURES[name], config)
    entries = [way for entry in table.entries for way in (entry, *entry.others)]
    ours = {source.gguf for entry in entries for source in entry.sources if source.gguf != source.hf}
    ours |= {source.gguf for entry in entries for source in entry.sources if "_exps" in source.gguf}
    arch = next(each for each, stored in gguf.MODEL_ARCH_NAMES.items() if stored == kind)
    theirs = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    blocks = range(config["num_hidden_layers"])
    named = {f"{each.format(bid=block)}.weight" for each in theirs for block in blocks}
    assert ours <= named
    assert kind == "llama" or ours == named - {"rope_freqs.weight"}  # llama's list has experts too


@pytest.mark.parametrize(
    "kind", ["gemma4", "deepseek2", "nemotron_h_moe", "kimi-linear", "qwen35", "glm-dsa"]
)
def test_families_that_are_read_from_folders_alone_say_so(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    words = rf"reads '{kind}' from a GGUF file; those that can be read are llama, qwen3, qwen3moe, qwen3vl, qwen3vlmoe"
    with pytest.raises(LoadError, match=words):
        portable(path)


def test_rope_divisors_stand_for_llama3_scaling(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny("llama", rope_scaling={**scaling, "original_max_position_embeddings": 64})
    write_checkpoint(tmp_path, ARCHITECTURES["llama"], config)
    expected = logits(Stepper(portable(tmp_path)), [PROMPT])
    plain = logits(Stepper(portable(write_gguf(tmp_path, "llama", config))), [PROMPT])
    assert np.abs(plain - expected).max() > 0.01 * expected.std()
    path = with_divisors(tmp_path, config)
    scaled = logits(Stepper(portable(path)), [PROMPT])
    assert np.abs(scaled - expected).max() < 1e-5 * expected.std()


def with_divisors(folder: Path, config: dict[str, Any]) -> Path:
    from pie_plugins.models.layers.rope import build_rope
    from pie_plugins.models.layers.rope_settings import RopeSettings

    settings = ARCHITECTURES["llama"].load().config(config, "test").rope
    plain = build_rope(config["head_dim"], RopeSettings(settings.theta, None)).frequencies
    divisors = (plain / build_rope(config["head_dim"], settings).frequencies).numpy()
    original = gguf.GGUFWriter.write_header_to_file

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            self.add_tensor("rope_freqs.weight", divisors)
            original(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        return write_gguf(folder, "llama", config, "F32")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    config = tiny("llama")
    write_checkpoint(tmp_path, ARCHITECTURES["llama"], config)
    return write_gguf(tmp_path, "llama", config, "Q8_0")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def not_gguf(path: Path) -> None:
    path.write_bytes(b"GGML" + path.read_bytes()[4:])


def future(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4] = 9
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40] + b"\xff" * 400 + path.read_bytes()[440:])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "cut short.*fetch"),
        (cut_header, "fetch"),
        (not_gguf, "not a GGUF file"),
        (future, "version 9"),
        (empty, "cannot be read"),
        (noise, "fetch"),
    ],
)
def test_damage_is_named(file: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(file)
    with pytest.raises(LoadError, match=f"(?s){file.name}.*{words}"):
        portable(file)


def test_an_unknown_key_of_the_architecture_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny("llama")
    write_checkpoint(tmp_path, ARCHITECTURES["llama"], config)
    path = write_gguf(tmp_path, "llama", config, extra={"swirl": True})
    with pytest.raises(LoadError, match="swirl=True"):
        portable(path)


def test_an_architecture_that_nobody_reads_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "rwkv")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LoadError, match=r"'rwkv'.*llama, .*qwen3"):
        portable(path)


def test_config_json_beside_it_is_not_needed(file: Path) -> None:
    (file.parent / "config.json").write_text(json.dumps({}))
    portable(file).close()
