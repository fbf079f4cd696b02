"""Gemma 4, the language model: E2B and E4B, 31B, and 26B-A4B with experts.

Reference: `Gemma4ForCausalLM` of transformers. Unusual:

- layers with a window and global ones differ in head size, key heads and rotation; global ones rotate a quarter;
- the last layers read the keys and values of the last layer of their kind that writes some (E models);
- in large models the keys of global layers are their values too; values are normed, without a weight;
- every layer takes in a small vector of its own for each token (E models), and ends with a scalar;
- experts, where there are some, run beside the plain MLP, on the same input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.architecture import PagedLayout
from pie_plugins.models.layers.composite import text_part
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.experts import add_gated_mlp, add_scaled_experts
from pie_plugins.models.layers.gemma4_config import Gemma4Config
from pie_plugins.models.layers.per_layer_rows import add_per_layer_embedding, add_per_layer_input
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.layers.weight_rows import add_ends, add_norms
from pie_plugins.models.layers.windowed_layers import add_windowed_attention, read_windowed_layers
from pie_plugins.models.weight_table import WeightTable, hf_source

if TYPE_CHECKING:
    from pie_plugins.models.layers.parameters import Parameters
    from pie_plugins.models.layers.sandwich import SandwichDecoder


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
EXPERT_NORMS = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")


def read_gemma4(outer: ConfigKeys) -> Gemma4Config:
    text = text_part(outer)
    keys = text.keys
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    if not text.is_tied:
        raise keys.error("tie_word_embeddings is false; this architecture is implemented for true")
    keys.only("use_bidirectional_attention", "vision")  # inside images, which come as media spans
    vocab_size = keys.integer("vocab_size")
    per_layer_size = keys.integer("hidden_size_per_layer_input", 0)
    keys.only("vocab_size_per_layer_input", *((vocab_size,) if per_layer_size else (vocab_size, 262144)))
    has_experts = keys.flag("enable_moe_block", False)
    config = keys.into(
        Gemma4Config,
        prefix=text.prefix,
        layers=read_windowed_layers(keys),
        widens_reading_layers=keys.flag("use_double_wide_mlp", False),
        per_layer_size=per_layer_size,
        soft_cap=keys.number("final_logit_softcapping", 0.0) or None,
        num_experts=keys.integer("num_experts") if has_experts else 0,
        experts_per_token=keys.integer("top_k_experts") if has_experts else 0,
        expert_size=keys.integer("moe_intermediate_size") if has_experts else 0,
    )
    if not has_experts:
        keys.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
    keys.finish()
    return config


class Gemma4:
    """An `Architecture`."""

    def config(self, values: Mapping[str, Any], origin: str) -> Gemma4Config:
        return read_gemma4(ConfigKeys(values, origin))

    def cache_layouts(self, config: Gemma4Config) -> tuple[PagedLayout, ...]:
        return config.layers.layouts()

    def weights(self, config: Gemma4Config) -> WeightTable:
        table, stem = WeightTable(), config.prefix
        add_ends(table, config, f"{stem}.embed_tokens", f"{stem}.norm")
        if config.per_layer_size:
            vocab, width = config.vocab_size, len(config.layers) * config.per_layer_size
            add_per_layer_embedding(table, vocab, width, config.hidden_size, config.per_layer_size, stem)
        for layer in range(len(config.layers)):
            ours, hf = f"layers.{layer}", f"{stem}.layers.{layer}"
            attention = f"{hf}.self_attn"
            add_windowed_attention(table, config.layers, layer, config.hidden_size, ours, attention)
            _add_feed_forward(table, config, layer, ours, hf)
            add_norms(table, {name: name for name in NORMS}, config.hidden_size, ours, hf)
            table.take(f"{ours}.scalar", hf_source(f"{hf}.layer_scalar", 1))
            if config.per_layer_size:
                add_per_layer_input(table, config.hidden_size, config.per_layer_size, ours, hf)
        towers = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
        table.leave(*(f"model.{tower}.*" for tower in towers))
        return table

    def build(self, config: Gemma4Config, parameters: Parameters) -> SandwichDecoder:
        from pie_plugins.models.layers.gemma4_build import build_gemma4 as build  # torch: not before

        return build(config, parameters)


def _add_feed_forward(table: WeightTable, config: Gemma4Config, layer: int, ours: str, hf: str) -> None:
    hidden = config.hidden_size
    add_gated_mlp(table, config.mlp_size(layer), hidden, f"{ours}.mlp", f"{hf}.mlp")
    if config.num_experts:
        add_scaled_experts(table, config.num_experts, config.expert_size, hidden, ours, hf)
        add_norms(table, {name: name for name in EXPERT_NORMS}, hidden, ours, hf)


DECLARATION = ArchitectureDeclaration(
    name="gemma4",
    summary="Gemma 4, the language model: E2B, E4B, 31B and 26B-A4B",
    model_types=("gemma4", "gemma4_text"),
    load=Gemma4,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
