"""Qwen3, mixture of experts: 30B-A3B, 235B-A22B, Coder.

Reference: `Qwen3MoeForCausalLM` of transformers. Unusual: Qwen3's attention, normed heads and all, before many small
experts and none that is shared; a softmax over all of them chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.dense import DenseConfig, DenseDecoder, read_dense
from pie_plugins.models.layers.experts import read_softmax_experts
from pie_plugins.models.layers.transformers_reference import causal_logits


class Qwen3Moe(DenseDecoder):
    def read(self, keys: ConfigKeys) -> DenseConfig:
        keys.only("use_sliding_window", False)
        keys.ignore("sliding_window")  # only read where use_sliding_window is set
        keys.ignore("router_aux_loss_coef", "output_router_logits")  # training
        keys.only_all("layer_types", "full_attention")
        bias = keys.flag("attention_bias", False)
        dense = read_dense(keys, qkv_bias=bias, output_bias=bias, qk_norm=True)
        return replace(dense, experts=read_softmax_experts(keys, dense.num_hidden_layers))


DECLARATION = ArchitectureDeclaration(
    name="qwen3_moe",
    summary="Qwen3, mixture of experts: 30B-A3B, 235B-A22B, Coder",
    model_types=("qwen3_moe",),
    load=Qwen3Moe,
    gguf_architectures=("qwen3moe",),
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
