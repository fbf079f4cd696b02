"""Qwen3-VL, the language model: dense, and with experts.

Reference: `Qwen3VLForConditionalGeneration` and `Qwen3VLMoeForConditionalGeneration` of transformers. Unusual: Qwen3's
layers, whose positions have three axes, interleaved. On the hub, experts are stacked and transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.axes_rope_settings import read_axes_rope
from pie_plugins.models.layers.composite import text_part
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.dense import DenseConfig, DenseDecoder, read_dense
from pie_plugins.models.layers.experts import read_softmax_experts
from pie_plugins.models.layers.transformers_reference import multimodal_logits
from pie_plugins.models.weight_table import WeightTable

HEAD_DIM, SECTIONS = 128, (24, 20, 20)  # where the configuration does not say


class Qwen3VL(DenseDecoder):
    def read(self, keys: ConfigKeys) -> DenseConfig:
        text = text_part(keys)
        dense = self.read_text(text.keys)
        text.keys.finish()
        return replace(dense, prefix=text.prefix, tie_word_embeddings=text.is_tied)

    def read_text(self, keys: ConfigKeys) -> DenseConfig:
        bias = keys.flag("attention_bias", False)
        rope = read_axes_rope(keys, keys.integer("head_dim", HEAD_DIM), SECTIONS)
        return read_dense(keys, head_dim=HEAD_DIM, qkv_bias=bias, output_bias=bias, qk_norm=True, rope=rope)

    def weights(self, config: DenseConfig) -> WeightTable:
        table = super().weights(config)
        table.leave("model.visual.*")
        return table


class Qwen3VLMoe(Qwen3VL):
    def read_text(self, keys: ConfigKeys) -> DenseConfig:
        keys.only("norm_topk_prob", True)
        keys.ignore("router_aux_loss_coef", "output_router_logits")  # training
        dense = super().read_text(keys)
        return replace(dense, experts=read_softmax_experts(keys, dense.num_hidden_layers, is_stacked=True))


DENSE = ArchitectureDeclaration(
    name="qwen3_vl",
    summary="Qwen3-VL, dense: the language model",
    model_types=("qwen3_vl",),
    load=Qwen3VL,
    gguf_architectures=("qwen3vl",),
    reference=multimodal_logits,
)
EXPERTS = ArchitectureDeclaration(
    name="qwen3_vl_moe",
    summary="Qwen3-VL, mixture of experts: the language model",
    model_types=("qwen3_vl_moe",),
    load=Qwen3VLMoe,
    gguf_architectures=("qwen3vlmoe",),
    reference=multimodal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return (DENSE, EXPERTS)
