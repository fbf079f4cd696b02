"""Qwen3, dense: 0.6B to 32B.

Reference: `Qwen3ForCausalLM` of transformers. Unusual: every query and key head is normed before it is rotated, and
head_dim is 128 whatever hidden_size says.
"""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.dense import DenseConfig, DenseDecoder, read_dense
from pie_plugins.models.layers.transformers_reference import causal_logits


class Qwen3(DenseDecoder):
    def read(self, keys: ConfigKeys) -> DenseConfig:
        keys.only("use_sliding_window", False)
        keys.ignore("sliding_window")  # only read where use_sliding_window is set
        keys.only_all("layer_types", "full_attention")
        bias = keys.flag("attention_bias", False)
        return read_dense(keys, head_dim=128, qkv_bias=bias, output_bias=bias, qk_norm=True)


DECLARATION = ArchitectureDeclaration(
    name="qwen3",
    summary="Qwen3, dense models from 0.6B to 32B",
    model_types=("qwen3",),
    gguf_architectures=("qwen3",),
    load=Qwen3,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
