"""Kimi Linear 48B-A3B.

Reference: `KimiLinearForCausalLM` of transformers. Unusual: three layers of four are Kimi Delta Attention, which keeps
a state; the fourth is latent attention that does not know positions. Experts have names of their own on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.architecture import CacheLayout, LatentLayout, StateLayout
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.delta_shape import DeltaShape, add_kimi_delta
from pie_plugins.models.layers.experts import ExpertSettings, GroupRouting, add_experts, add_gated_mlp
from pie_plugins.models.layers.kimi_linear_config import KimiLinearConfig
from pie_plugins.models.layers.latent_decoder import LatentShape, add_latent_attention
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.layers.weight_rows import PRE_NORMS, add_ends, add_norms
from pie_plugins.models.weight_table import WeightTable

if TYPE_CHECKING:
    from pie_plugins.models.layers.decoder import Decoder
    from pie_plugins.models.layers.parameters import Parameters


def read_kimi_linear(keys: ConfigKeys) -> KimiLinearConfig:
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("q_lora_rank", 0)
    keys.only("mla_use_nope", True)
    keys.only("num_nextn_predict_layers", 0)
    keys.ignore("num_key_value_heads", "head_dim", "qk_head_dim")  # follow from other keys
    keys.ignore("rope_theta", "rope_scaling", "rope_parameters")  # nothing rotates
    layers = keys.integer("num_hidden_layers")
    delta, delta_layers = _read_delta(keys, layers)
    config = keys.into(
        KimiLinearConfig,
        max_position_embeddings=keys.integer("model_max_length"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        latent=keys.into(LatentShape, q_lora_rank=0),
        delta=delta,
        delta_layers=delta_layers,
        experts=_read_experts(keys, layers),
    )
    keys.finish()
    return config


def _read_delta(keys: ConfigKeys, layers: int) -> tuple[DeltaShape, frozenset[int]]:
    section = keys.section("linear_attn_config")
    if section is None:
        raise keys.error("linear_attn_config is missing; expected a mapping")
    heads, dim = section.integer("num_heads"), section.integer("head_dim")
    shape = DeltaShape(heads, heads, dim, dim, section.integer("short_conv_kernel_size"))
    shape.check(section)
    full, delta = section.integers("full_attn_layers"), section.integers("kda_layers")  # counted from 1
    if sorted((*full, *delta)) != list(range(1, layers + 1)) or not full or not delta:
        raise section.error(
            f"full_attn_layers {full} and kda_layers {delta} are not the {layers} layers, once each"
        )
    section.finish()
    kinds = ["linear_attention" if layer in delta else "full_attention" for layer in range(1, layers + 1)]
    keys.only("layer_types", kinds)  # what transformers writes out
    keys.only("linear_num_heads", heads)
    keys.only("linear_head_dim", dim)
    keys.only("linear_conv_kernel_dim", shape.kernel)
    return shape, frozenset(layer - 1 for layer in delta)


def _read_experts(keys: ConfigKeys, layers: int) -> ExpertSettings:
    keys.only("moe_router_activation_func", "sigmoid")
    keys.only("moe_layer_freq", 1)
    keys.ignore("use_grouped_topk")  # said by the number of groups
    keys.ignore("output_router_logits")  # training
    size, dense = keys.integer("moe_intermediate_size"), keys.integer("first_k_dense_replace")
    keys.only(
        "mlp_layer_types", ["dense"] * dense + ["sparse"] * (layers - dense)
    )  # what transformers writes out
    experts = ExpertSettings(
        layers=frozenset(range(dense, layers)),
        num_experts=keys.integer("num_experts"),
        experts_per_token=keys.integer("num_experts_per_token"),
        intermediate_size=size,
        routing=GroupRouting(
            normalize=keys.flag("moe_renormalize"),
            scale=keys.number("routed_scaling_factor"),
            num_groups=keys.integer("num_expert_group"),
            kept_groups=keys.integer("topk_group"),
        ),
        shared_size=size * keys.integer("num_shared_experts"),
    )
    experts.check(keys)
    return experts


class KimiLinear:
    """An `Architecture`."""

    def config(self, values: Mapping[str, Any], origin: str) -> KimiLinearConfig:
        return read_kimi_linear(ConfigKeys(values, origin))

    def cache_layouts(self, config: KimiLinearConfig) -> tuple[CacheLayout, ...]:
        recurrent = len(config.delta_layers)
        return (
            LatentLayout("latent", config.num_hidden_layers - recurrent, config.latent.row_size),
            StateLayout("delta", recurrent, config.delta.state()),
        )

    def weights(self, config: KimiLinearConfig) -> WeightTable:
        table, hidden = WeightTable(), config.hidden_size
        add_ends(table, config, "model.embed_tokens", "model.norm")
        for layer in range(config.num_hidden_layers):
            ours, hf = f"layers.{layer}", f"model.layers.{layer}"
            if layer in config.delta_layers:
                add_kimi_delta(table, config.delta, hidden, ours, f"{hf}.self_attn")
            else:
                add_latent_attention(table, config.latent, ours, f"{hf}.self_attn")
            if layer in config.experts.layers:
                names = ("w1", "w3"), "w2"
                add_experts(table, config.experts, hidden, ours, f"{hf}.block_sparse_moe", *names)
            else:
                add_gated_mlp(table, config.intermediate_size, hidden, ours, f"{hf}.mlp")
                table.also_called(f"{hf}.block_sparse_moe.", f"{hf}.mlp.")  # by transformers
            add_norms(table, PRE_NORMS, hidden, ours, hf)
        return table

    def build(self, config: KimiLinearConfig, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.kimi_linear_build import (
            build_kimi_linear as build,
        )  # torch: not before

        return build(config, parameters)


DECLARATION = ArchitectureDeclaration(
    name="kimi_linear",
    summary="Kimi Linear 48B-A3B",
    model_types=("kimi_linear",),
    load=KimiLinear,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
