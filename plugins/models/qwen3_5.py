"""Qwen3.5 and 3.6, the language model: dense, and with experts.

Reference: `Qwen3_5ForCausalLM` and `Qwen3_5MoeForCausalLM` of transformers. Unusual:

- three layers of four are Gated DeltaNet, which keeps a state instead of keys and values;
- attention is gated, rotates a quarter of each head, and its positions have three axes, interleaved;
- norms multiply by 1 + weight, except the one inside Gated DeltaNet;
- next to the routed experts there is a shared one, gated for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.architecture import CacheLayout, PagedLayout, StateLayout
from pie_plugins.models.layers.axes_rope_settings import read_axes_rope
from pie_plugins.models.layers.composite import text_part
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.delta_shape import add_gated_delta, read_gated_delta
from pie_plugins.models.layers.experts import (
    add_feed_forward_beside_one,
    add_gated_mlp,
    read_softmax_experts_beside_one,
)
from pie_plugins.models.layers.qwen3_5_config import FULL, LINEAR, Qwen35Config
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.layers.weight_rows import (
    HEAD_NORMS,
    PRE_NORMS,
    add_attention,
    add_ends,
    add_norms,
)
from pie_plugins.models.weight_table import WeightTable

if TYPE_CHECKING:
    from pie_plugins.models.layers.decoder import Decoder
    from pie_plugins.models.layers.parameters import Parameters


SECTIONS, ROTARY_FACTOR = (11, 11, 10), 0.25  # where the configuration does not say


def read_qwen3_5(outer: ConfigKeys, has_experts: bool) -> Qwen35Config:
    text = text_part(outer)
    keys = text.keys
    _read_settled(keys)
    layers = keys.integer("num_hidden_layers")
    config = keys.into(
        Qwen35Config,
        prefix=text.prefix,
        intermediate_size=0 if has_experts else keys.integer("intermediate_size"),
        tie_word_embeddings=text.is_tied,
        rope=read_axes_rope(keys, keys.integer("head_dim"), SECTIONS, ROTARY_FACTOR),
        layer_types=_layer_types(keys, layers),
        delta=read_gated_delta(keys),
        experts=read_softmax_experts_beside_one(keys, layers) if has_experts else None,
    )
    keys.finish()
    return config


def _read_settled(keys: ConfigKeys) -> None:
    """Keys that all checkpoints set alike, and what other parts of the checkpoint are described by."""
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("attn_output_gate", True)
    keys.only("output_gate_type", "swish")
    keys.only("mamba_ssm_dtype", "float32")
    keys.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    keys.ignore("router_aux_loss_coef", "output_router_logits")  # training


def _layer_types(keys: ConfigKeys, layers: int) -> tuple[str, ...]:
    interval, kinds = keys.integer("full_attention_interval", 4), keys.texts("layer_types")
    if kinds is None:
        kinds = tuple(LINEAR if (layer + 1) % interval else FULL for layer in range(layers))
    if len(kinds) != layers or set(kinds) != {FULL, LINEAR}:
        raise keys.error(f"layer_types is {kinds}, expected {layers} of {FULL} and {LINEAR}, both of them")
    return kinds


class Qwen35:
    """An `Architecture`."""

    def config(self, values: Mapping[str, Any], origin: str) -> Qwen35Config:
        return read_qwen3_5(ConfigKeys(values, origin), has_experts=False)

    def cache_layouts(self, config: Qwen35Config) -> tuple[CacheLayout, ...]:
        full, linear = config.layer_types.count(FULL), config.layer_types.count(LINEAR)
        return (
            PagedLayout("kv", full, config.num_key_value_heads, config.head_dim),
            StateLayout("delta", linear, config.delta.state()),
        )

    def weights(self, config: Qwen35Config) -> WeightTable:
        table, hidden, stem = WeightTable(), config.hidden_size, config.prefix
        add_ends(table, config, f"{stem}.embed_tokens", f"{stem}.norm", keep_float32=True)
        for layer, kind in enumerate(config.layer_types):
            ours, hf = f"layers.{layer}", f"{stem}.layers.{layer}"
            if kind == LINEAR:
                add_gated_delta(table, config.delta, hidden, ours, f"{hf}.linear_attn")
            else:
                add_attention(table, config, ours, f"{hf}.self_attn", "projection", query_parts=2)
                add_norms(table, HEAD_NORMS, config.head_dim, ours, f"{hf}.self_attn", keep_float32=True)
            if config.experts is None:
                add_gated_mlp(table, config.intermediate_size, hidden, ours, f"{hf}.mlp")
            else:
                add_feed_forward_beside_one(table, config.experts, hidden, ours, f"{hf}.mlp")
            add_norms(table, PRE_NORMS, hidden, ours, hf, keep_float32=True)
        table.leave("mtp.*", "model.visual.*")
        return table

    def build(self, config: Qwen35Config, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.qwen3_5_build import build_qwen3_5 as build  # torch: not before

        return build(config, parameters)


class Qwen35Moe(Qwen35):
    def config(self, values: Mapping[str, Any], origin: str) -> Qwen35Config:
        return read_qwen3_5(ConfigKeys(values, origin), has_experts=True)


DENSE = ArchitectureDeclaration(
    name="qwen3_5",
    summary="Qwen3.5 and 3.6, dense: the language model",
    model_types=("qwen3_5", "qwen3_5_text"),
    load=Qwen35,
    reference=causal_logits,
)
EXPERTS = ArchitectureDeclaration(
    name="qwen3_5_moe",
    summary="Qwen3.5 and 3.6, mixture of experts: the language model",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    load=Qwen35Moe,
    reference=causal_logits,
)
DECLARATIONS = (DENSE, EXPERTS)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return DECLARATIONS
