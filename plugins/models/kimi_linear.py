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
from pie_plugins.models.layers.delta_shape import DeltaShape
from pie_plugins.models.layers.experts import ExpertSettings, GroupRouting, add_gated_mlp
from pie_plugins.models.layers.kimi_linear_config import KimiLinearConfig
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.weight_table import WeightTable, hf_source

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
    config = KimiLinearConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=keys.integer("num_attention_heads"),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        v_head_dim=keys.integer("v_head_dim"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        max_position_embeddings=keys.integer("model_max_length"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
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
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return (
            LatentLayout("latent", config.num_hidden_layers - recurrent, width),
            StateLayout("delta", recurrent, config.delta.state()),
        )

    def weights(self, config: KimiLinearConfig) -> WeightTable:
        table, vocab, hidden = WeightTable(), config.vocab_size, config.hidden_size
        table.take("embedding", hf_source("model.embed_tokens.weight", vocab, hidden))
        for layer in range(config.num_hidden_layers):
            ours, hf = f"layers.{layer}", f"model.layers.{layer}"
            add = _add_delta if layer in config.delta_layers else _add_latent
            add(table, config, ours, f"{hf}.self_attn")
            if layer in config.experts.layers:
                _add_experts(table, config, ours, f"{hf}.block_sparse_moe")
            else:
                add_gated_mlp(table, config.intermediate_size, hidden, ours, f"{hf}.mlp")
                table.also_called(f"{hf}.block_sparse_moe.", f"{hf}.mlp.")  # by transformers
            table.take(f"{ours}.input_norm", hf_source(f"{hf}.input_layernorm.weight", hidden))
            table.take(f"{ours}.mlp_norm", hf_source(f"{hf}.post_attention_layernorm.weight", hidden))
        table.take("norm", hf_source("model.norm.weight", hidden))
        if config.tie_word_embeddings:
            table.leave("lm_head.weight")
        else:
            table.take("head.weight", hf_source("lm_head.weight", vocab, hidden))
        return table

    def build(self, config: KimiLinearConfig, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.kimi_linear_build import (
            build_kimi_linear,
        )  # torch: not before a model is built

        return build_kimi_linear(config, parameters)


def _add_delta(table: WeightTable, config: KimiLinearConfig, ours: str, hf: str) -> None:
    delta, hidden = config.delta, config.hidden_size
    heads, dim, width = delta.num_value_heads, delta.value_dim, delta.num_value_heads * delta.value_dim
    rows = {"q": width, "k": width, "v": width, "f_a": dim, "g_a": dim, "b": heads}
    sources = [hf_source(f"{hf}.{name}_proj.weight", count, hidden) for name, count in rows.items()]
    table.fuse(f"{ours}.projection.weight", sources)
    convolutions = [hf_source(f"{hf}.{name}_conv1d.weight", width, 1, delta.kernel) for name in "qkv"]
    table.fuse(f"{ours}.convolution", convolutions)
    table.take(f"{ours}.decay.weight", hf_source(f"{hf}.f_b_proj.weight", width, dim))
    table.take(f"{ours}.gate.weight", hf_source(f"{hf}.g_b_proj.weight", width, dim))
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, width))
    table.take(f"{ours}.rate", hf_source(f"{hf}.A_log", 1, 1, heads, 1, keep_float32=True))
    table.take(f"{ours}.rate_bias", hf_source(f"{hf}.dt_bias", width, keep_float32=True))
    table.take(f"{ours}.norm", hf_source(f"{hf}.o_norm.weight", dim))


def _add_latent(table: WeightTable, config: KimiLinearConfig, ours: str, hf: str) -> None:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    plain, turned, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query = hf_source(f"{hf}.q_proj.weight", heads * (plain + turned), hidden)
    row = hf_source(f"{hf}.kv_a_proj_with_mqa.weight", rank + turned, hidden)
    table.fuse(f"{ours}.down_projection.weight", [query, row])
    table.take(f"{ours}.latent_norm", hf_source(f"{hf}.kv_a_layernorm.weight", rank))
    table.take(f"{ours}.expansion", hf_source(f"{hf}.kv_b_proj.weight", heads * (plain + value), rank))
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, heads * value))


def _add_experts(table: WeightTable, config: KimiLinearConfig, ours: str, hf: str) -> None:
    count, size, hidden = config.experts.num_experts, config.experts.intermediate_size, config.hidden_size
    table.take(f"{ours}.router", hf_source(f"{hf}.gate.weight", count, hidden, keep_float32=True))
    correction = hf_source(f"{hf}.gate.e_score_correction_bias", count, keep_float32=True)
    table.take(f"{ours}.correction", correction)
    experts = [f"{hf}.experts.{expert}" for expert in range(count)]
    halves = [hf_source(f"{each}.{half}.weight", size, hidden) for each in experts for half in ("w1", "w3")]
    table.stack(f"{ours}.experts.gate_up", halves)
    table.stack(f"{ours}.experts.down", [hf_source(f"{each}.w2.weight", hidden, size) for each in experts])
    add_gated_mlp(table, config.experts.shared_size, hidden, f"{ours}.shared", f"{hf}.shared_experts")


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
