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
from pie_plugins.models.layers.experts import add_gated_mlp
from pie_plugins.models.layers.gemma4_config import GROUPS, Gemma4Config
from pie_plugins.models.layers.head_shapes import read_head_shapes
from pie_plugins.models.layers.per_layer_rows import add_per_layer_embedding, add_per_layer_input
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.layers.weight_rows import add_ends, add_fused, add_norms
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
    keys.ignore("tie_word_embeddings")  # said outside
    layers, vocab_size = keys.integer("num_hidden_layers"), keys.integer("vocab_size")
    layer_types = keys.texts("layer_types") or ()
    per_layer_size = keys.integer("hidden_size_per_layer_input", 0)
    keys.only("vocab_size_per_layer_input", *((vocab_size,) if per_layer_size else (vocab_size, 262144)))
    has_experts = keys.flag("enable_moe_block", False)
    config = keys.into(
        Gemma4Config,
        prefix=text.prefix,
        layer_types=layer_types,
        shapes=read_head_shapes(keys, layer_types),
        num_writing_layers=layers - keys.integer("num_kv_shared_layers", 0),
        widens_reading_layers=keys.flag("use_double_wide_mlp", False),
        per_layer_size=per_layer_size,
        soft_cap=keys.number("final_logit_softcapping", 0.0) or None,
        num_experts=keys.integer("num_experts") if has_experts else 0,
        experts_per_token=keys.integer("top_k_experts") if has_experts else 0,
        expert_size=keys.integer("moe_intermediate_size") if has_experts else 0,
    )
    if not has_experts:
        keys.ignore("num_experts", "top_k_experts", "moe_intermediate_size")
    _check(config, layers, keys)
    keys.finish()
    return config


def _check(config: Gemma4Config, layers: int, keys: ConfigKeys) -> None:
    if len(config.layer_types) != layers or set(config.layer_types) - GROUPS.keys():
        raise keys.error(f"layer_types is {config.layer_types}, expected {layers} of {' and '.join(GROUPS)}")
    if set(config.layer_types) - set(config.layer_types[: config.num_writing_layers]):
        raise keys.error(
            f"num_kv_shared_layers leaves {config.num_writing_layers} layers that write keys and values, which are not"
            " of every type"
        )


class Gemma4:
    """An `Architecture`."""

    def config(self, values: Mapping[str, Any], origin: str) -> Gemma4Config:
        return read_gemma4(ConfigKeys(values, origin))

    def cache_layouts(self, config: Gemma4Config) -> tuple[PagedLayout, ...]:
        written = config.layer_types[: config.num_writing_layers]
        shapes = [(kind, config.shapes[kind]) for kind in config.kinds()]
        return tuple(
            PagedLayout(GROUPS[kind], written.count(kind), shape.num_kv_heads, shape.head_dim, shape.window)
            for kind, shape in shapes
        )

    def weights(self, config: Gemma4Config) -> WeightTable:
        table, stem = WeightTable(), config.prefix
        add_ends(table, config, f"{stem}.embed_tokens", f"{stem}.norm")
        if config.per_layer_size:
            vocab, width = config.vocab_size, config.num_layers * config.per_layer_size
            add_per_layer_embedding(table, vocab, width, config.hidden_size, config.per_layer_size, stem)
        for layer in range(config.num_layers):
            ours, hf = f"layers.{layer}", f"{stem}.layers.{layer}"
            _add_attention(table, config, layer, ours, f"{hf}.self_attn")
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


def _add_attention(table: WeightTable, config: Gemma4Config, layer: int, ours: str, hf: str) -> None:
    shape, hidden = config.shapes[config.layer_types[layer]], config.hidden_size
    q_rows, kv_rows = config.num_attention_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    rows, norms = {"q": q_rows}, {"q_norm": "q_norm"}
    if config.writer(layer) == layer:
        rows |= {"k": kv_rows} if shape.keys_are_values else {"k": kv_rows, "v": kv_rows}
        norms |= {"k_norm": "k_norm"}
    else:
        table.leave(*(f"{hf}.{name}.weight" for name in ("k_proj", "v_proj", "k_norm", "v_norm")))
    add_norms(table, norms, shape.head_dim, ours, hf)
    add_fused(table, f"{ours}.projection", f"{hf}.{{}}_proj.weight", rows, hidden)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, q_rows))


def _add_feed_forward(table: WeightTable, config: Gemma4Config, layer: int, ours: str, hf: str) -> None:
    hidden, count, size = config.hidden_size, config.num_experts, config.expert_size
    add_gated_mlp(table, config.mlp_size(layer), hidden, f"{ours}.mlp", f"{hf}.mlp")
    if count:
        for name, stored, shape in (
            ("router", "proj.weight", (count, hidden)),
            ("router_scale", "scale", (hidden,)),
            ("expert_scale", "per_expert_scale", (count,)),
        ):
            table.take(f"{ours}.{name}", hf_source(f"{hf}.router.{stored}", *shape, keep_float32=True))
        gate_up = hf_source(f"{hf}.experts.gate_up_proj", count, 2 * size, hidden)
        table.take(f"{ours}.experts.gate_up", gate_up)
        table.take(f"{ours}.experts.down", hf_source(f"{hf}.experts.down_proj", count, hidden, size))
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
