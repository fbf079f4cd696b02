"""A GGUF file: its metadata under the names of config.json, its tensors dequantized by the gguf library."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.errors import LoadError
from pie_plugins.models.layers.checkpoint import StoredTensor
from pie_plugins.models.layers.gguf_header import GgufTensor, read_gguf_header
from pie_plugins.models.weight_table import Format

# general.architecture is the prefix of the left names.
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_norm": "norm_topk_prob",
}
# What files of an architecture do not say, because all its checkpoints are alike.
_EXPERTS = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
IMPLIED: Mapping[str, Mapping[str, Any]] = {"qwen3moe": _EXPERTS, "qwen3vlmoe": _EXPERTS}
TOWERS = {"n_deepstack_layers"}  # keys about what stands in a file of its own
# Not read: they repeat others.
REPEATED = {
    "attention.value_length",
    "rope.dimension_count",
    "rope.dimension_sections",
    "rope.scaling.type",
    "rope.scaling.factor",
}
PLAIN: dict[int, Any] = {
    int(gguf.GGMLQuantizationType.F32): np.float32,
    int(gguf.GGMLQuantizationType.F16): np.float16,
    int(gguf.GGMLQuantizationType.F64): np.float64,
}


class GgufCheckpoint:
    """The file stays memory-mapped until `close`."""

    form: Format = "gguf"

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise LoadError(f"{path}: cannot be read: {error}") from error
        with memoryview(self._data) as view:
            self._header = read_gguf_header(view, path)

    @property
    def kind(self) -> str:
        kind = self._header.metadata.get("general.architecture")
        if not isinstance(kind, str):
            raise LoadError(f"{self._path}: the GGUF header has no general.architecture")
        return kind

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {
            name: StoredTensor(each.shape, self._num_bytes(name, each))
            for name, each in self._header.tensors.items()
        }

    @cached_property
    def config(self) -> Mapping[str, Any]:
        prefix = f"{self.kind}."
        own = {
            key.removeprefix(prefix): value
            for key, value in self._header.metadata.items()
            if key.startswith(prefix)
        }
        read = {KEYS.get(key, key): value for key, value in own.items() if key not in REPEATED | TOWERS}
        config = dict(IMPLIED.get(self.kind, {})) | read
        config |= {"tie_word_embeddings": "output.weight" not in self._header.tensors}
        config["rope_scaling"] = self._rope_scaling(own)
        if embedding := self._header.tensors.get("token_embd.weight"):
            config.setdefault("vocab_size", embedding.shape[0])
        self._check_rotary(own, config)
        return config

    def expect(self, names: Sequence[str]) -> None:
        """The file is memory-mapped: there is nothing to begin with."""

    def read(self, name: str) -> Tensor:
        stored = self._header.tensors[name]
        num_bytes = self._num_bytes(name, stored)
        raw = np.frombuffer(self._data, np.uint8, num_bytes, stored.offset)
        if stored.type_id == int(gguf.GGMLQuantizationType.BF16):
            return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(stored.shape)
        return torch.from_numpy(self._values(raw, stored))

    def close(self) -> None:
        self._header.tensors.clear()

    def _values(self, raw: NDArray[np.uint8], stored: GgufTensor) -> NDArray[Any]:
        if stored.type_id in PLAIN:
            plain: NDArray[Any] = raw.view(PLAIN[stored.type_id]).reshape(stored.shape)
            return plain.astype(np.float32) if plain.dtype == np.float64 else plain.copy()
        rows = raw.reshape(*stored.shape[:-1], -1)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType(stored.type_id))
        return np.asarray(values, np.float32).reshape(stored.shape)

    def _num_bytes(self, name: str, stored: GgufTensor) -> int:
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(stored.type_id)]
        except (ValueError, KeyError) as error:
            raise LoadError(f"{self._path}: tensor {name!r} has the unknown type {stored.type_id}") from error
        items = int(np.prod(stored.shape, dtype=object))
        num_bytes = items // block * block_bytes
        if items % block or stored.offset + num_bytes > len(self._data):
            raise LoadError(
                f"{self._path}: tensor {name!r} {stored.shape} needs {num_bytes} bytes at offset {stored.offset}, but"
                f" the file has {len(self._data)}: it is damaged or cut short; fetch it again"
            )
        return num_bytes

    def _rope_scaling(self, own: Mapping[str, Any]) -> dict[str, Any] | None:
        """llama3 scaling is stored as a tensor of divisors, linear scaling as a factor."""
        if "rope_freqs.weight" in self._header.tensors:
            divisors = self.read("rope_freqs.weight").tolist()
            return {"rope_type": "divisors", "divisors": divisors}
        if "rope.dimension_sections" in own:  # of three axes; the fourth number is none
            return {"rope_type": "default", "mrope_section": own["rope.dimension_sections"][:3]}
        kind = own.get("rope.scaling.type", "none")
        if kind == "none":
            return None
        return {"rope_type": kind, "factor": own.get("rope.scaling.factor")}

    def _check_rotary(self, own: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        head_dim = config.get("head_dim")
        head_dim = head_dim or config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1)
        for key in ("rope.dimension_count", "attention.value_length"):
            if own.get(key, head_dim) != head_dim:
                raise LoadError(f"{self._path}: {key} is {own[key]}; implemented is head_dim ({head_dim})")
