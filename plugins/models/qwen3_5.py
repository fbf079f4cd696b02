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
from pie_plugins.models.layers.delta_shape import DeltaShape
from pie_plugins.models.layers.experts import (
    ExpertSettings,
    SoftmaxRouting,
    add_gated_mlp,
    add_stacked_experts,
)
from pie_plugins.models.layers.qwen3_5_config import FULL, LINEAR, Qwen35Config
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.weight_table import WeightTable, hf_source

if TYPE_CHECKING:
    from pie_plugins.models.layers.decoder import Decoder
    from pie_plugins.models.layers.parameters import Parameters


SECTIONS, ROTARY_FACTOR = (11, 11, 10), 0.25  # where the configuration does not say


def read_qwen3_5(outer: ConfigKeys, has_experts: bool) -> Qwen35Config:
    text = text_part(outer)
    keys = text.keys
    _read_settled(keys)
    layers = keys.integer("num_hidden_layers")
    config = Qwen35Config(
        prefix=text.prefix,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=0 if has_experts else keys.integer("intermediate_size"),
        num_attention_heads=keys.integer("num_attention_heads"),
        num_key_value_heads=keys.integer("num_key_value_heads"),
        head_dim=keys.integer("head_dim"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        tie_word_embeddings=text.is_tied,
        rope=read_axes_rope(keys, keys.integer("head_dim"), SECTIONS, ROTARY_FACTOR),
        layer_types=_layer_types(keys, layers),
        delta=DeltaShape(
            num_key_heads=keys.integer("linear_num_key_heads"),
            num_value_heads=keys.integer("linear_num_value_heads"),
            key_dim=keys.integer("linear_key_head_dim"),
            value_dim=keys.integer("linear_value_head_dim"),
            kernel=keys.integer("linear_conv_kernel_dim"),
        ),
        experts=_read_experts(keys, layers) if has_experts else None,
    )
    config.delta.check(keys)
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


def _read_experts(keys: ConfigKeys, layers: int) -> ExpertSettings:
    keys.only("norm_topk_prob", True)
    keys.ignore("intermediate_size")  # of dense layers, which there are none of
    experts = ExpertSettings(
        layers=frozenset(range(layers)),
        num_experts=keys.integer("num_experts"),
        experts_per_token=keys.integer("num_experts_per_tok"),
        intermediate_size=keys.integer("moe_intermediate_size"),
        routing=SoftmaxRouting(normalize=True),
        shared_size=keys.integer("shared_expert_intermediate_size"),
    )
    experts.check(keys)
    return experts


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
        table, vocab, hidden = WeightTable(), config.vocab_size, config.hidden_size
        table.take("embedding", hf_source(f"{config.prefix}.embed_tokens.weight", vocab, hidden))
        for layer, kind in enumerate(config.layer_types):
            ours, hf = f"layers.{layer}", f"{config.prefix}.layers.{layer}"
            (_add_delta if kind == LINEAR else _add_attention)(table, config, ours, hf)
            _add_feed_forward(table, config, ours, f"{hf}.mlp")
            _add_norm(table, f"{ours}.input_norm", f"{hf}.input_layernorm", hidden)
            _add_norm(table, f"{ours}.mlp_norm", f"{hf}.post_attention_layernorm", hidden)
        _add_norm(table, "norm", f"{config.prefix}.norm", hidden)
        if config.tie_word_embeddings:
            table.leave("lm_head.weight")
        else:
            table.take("head.weight", hf_source("lm_head.weight", vocab, hidden))
        table.leave("mtp.*", "model.visual.*")
        return table

    def build(self, config: Qwen35Config, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.qwen3_5_build import (
            build_qwen3_5,
        )  # torch: not before a model is built

        return build_qwen3_5(config, parameters)


class Qwen35Moe(Qwen35):
    def config(self, values: Mapping[str, Any], origin: str) -> Qwen35Config:
        return read_qwen3_5(ConfigKeys(values, origin), has_experts=True)


def _add_delta(table: WeightTable, config: Qwen35Config, ours: str, layer: str) -> None:
    hf, hidden, delta = f"{layer}.linear_attn", config.hidden_size, config.delta
    heads, width = delta.num_value_heads, delta.num_value_heads * delta.value_dim
    rows = {"qkv": delta.channels, "z": width, "b": heads, "a": heads}
    sources = [hf_source(f"{hf}.in_proj_{name}.weight", count, hidden) for name, count in rows.items()]
    table.fuse(f"{ours}.projection.weight", sources)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.out_proj.weight", hidden, width))
    table.take(f"{ours}.convolution", hf_source(f"{hf}.conv1d.weight", delta.channels, 1, delta.kernel))
    table.take(f"{ours}.rate", hf_source(f"{hf}.A_log", heads, keep_float32=True))
    table.take(f"{ours}.rate_bias", hf_source(f"{hf}.dt_bias", heads, keep_float32=True))
    table.take(f"{ours}.norm", hf_source(f"{hf}.norm.weight", delta.value_dim))


def _add_attention(table: WeightTable, config: Qwen35Config, ours: str, layer: str) -> None:
    hf, hidden, dim = f"{layer}.self_attn", config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * dim, config.num_key_value_heads * dim
    rows = {"q": 2 * q_rows, "k": kv_rows, "v": kv_rows}  # of each head the query, then its gate
    sources = [hf_source(f"{hf}.{name}_proj.weight", count, hidden) for name, count in rows.items()]
    table.fuse(f"{ours}.projection.weight", sources)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, q_rows))
    _add_norm(table, f"{ours}.q_norm", f"{hf}.q_norm", dim)
    _add_norm(table, f"{ours}.k_norm", f"{hf}.k_norm", dim)


def _add_norm(table: WeightTable, ours: str, hf: str, size: int) -> None:
    table.take(ours, hf_source(f"{hf}.weight", size, keep_float32=True))


def _add_feed_forward(table: WeightTable, config: Qwen35Config, ours: str, hf: str) -> None:
    hidden, experts = config.hidden_size, config.experts
    if experts is None:
        add_gated_mlp(table, config.intermediate_size, hidden, ours, hf)
        return
    add_stacked_experts(table, experts, hidden, ours, hf)
    add_gated_mlp(table, experts.shared_size, hidden, f"{ours}.shared", f"{hf}.shared_expert")
    table.take(f"{ours}.shared.gate.weight", hf_source(f"{hf}.shared_expert_gate.weight", 1, hidden))


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
