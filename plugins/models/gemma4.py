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
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.weight_table import WeightTable, hf_source

if TYPE_CHECKING:
    from pie_plugins.models.layers.parameters import Parameters
    from pie_plugins.models.layers.sandwich import SandwichDecoder


def read_gemma4(outer: ConfigKeys) -> Gemma4Config:
    text = text_part(outer)
    keys = text.keys
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("attention_bias", False)
    if not text.is_tied:
        raise keys.error("tie_word_embeddings is false; this architecture is implemented for true")
    keys.only("use_bidirectional_attention", "vision")  # inside images, which come as media spans
    layers, vocab_size = keys.integer("num_hidden_layers"), keys.integer("vocab_size")
    layer_types = keys.texts("layer_types") or ()
    per_layer_size = keys.integer("hidden_size_per_layer_input", 0)
    keys.only("vocab_size_per_layer_input", *((vocab_size,) if per_layer_size else (vocab_size, 262144)))
    has_experts = keys.flag("enable_moe_block", False)
    config = Gemma4Config(
        prefix=text.prefix,
        vocab_size=vocab_size,
        hidden_size=keys.integer("hidden_size"),
        intermediate_size=keys.integer("intermediate_size"),
        num_attention_heads=keys.integer("num_attention_heads"),
        rms_norm_eps=keys.number("rms_norm_eps"),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        layer_types=layer_types,
        shapes=read_head_shapes(keys, layer_types),
        num_writing_layers=layers - keys.integer("num_kv_shared_layers", 0),
        widens_reading_layers=keys.flag("use_double_wide_mlp", False),
        per_layer_size=per_layer_size,
        soft_cap=keys.number("final_logit_softcapping", 0.0) or None,
        num_experts=keys.integer("num_experts", 0) if has_experts else 0,
        experts_per_token=keys.integer("top_k_experts", 0) if has_experts else 0,
        expert_size=keys.integer("moe_intermediate_size", 0) if has_experts else 0,
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
        table, hf, hidden = WeightTable(), config.prefix, config.hidden_size
        table.take("embedding", hf_source(f"{hf}.embed_tokens.weight", config.vocab_size, hidden))
        if config.per_layer_size:
            _add_per_layer_embedding(table, config)
        for layer in range(config.num_layers):
            _add_attention(table, config, layer)
            _add_feed_forward(table, config, layer)
            _add_rest(table, config, layer)
        table.take("norm", hf_source(f"{hf}.norm.weight", hidden))
        table.leave("lm_head.weight")  # the embedding again
        table.leave(
            "model.vision_tower.*", "model.audio_tower.*", "model.embed_vision.*", "model.embed_audio.*"
        )
        return table

    def build(self, config: Gemma4Config, parameters: Parameters) -> SandwichDecoder:
        from pie_plugins.models.layers.gemma4_build import build_gemma4  # torch: not before a model is built

        return build_gemma4(config, parameters)


def _add_per_layer_embedding(table: WeightTable, config: Gemma4Config) -> None:
    hf, size = config.prefix, config.per_layer_size
    width = config.num_layers * size
    table.take("per_layer.table", hf_source(f"{hf}.embed_tokens_per_layer.weight", config.vocab_size, width))
    projection = hf_source(f"{hf}.per_layer_model_projection.weight", width, config.hidden_size)
    table.take("per_layer.projection.weight", projection)
    table.take("per_layer.norm", hf_source(f"{hf}.per_layer_projection_norm.weight", size))


def _add_attention(table: WeightTable, config: Gemma4Config, layer: int) -> None:
    ours, hf = f"layers.{layer}", f"{config.prefix}.layers.{layer}.self_attn"
    shape, hidden = config.shapes[config.layer_types[layer]], config.hidden_size
    q_rows, kv_rows = config.num_attention_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    rows = {"q": q_rows}
    table.take(f"{ours}.q_norm", hf_source(f"{hf}.q_norm.weight", shape.head_dim))
    if config.writer(layer) == layer:
        rows |= {"k": kv_rows} if shape.keys_are_values else {"k": kv_rows, "v": kv_rows}
        table.take(f"{ours}.k_norm", hf_source(f"{hf}.k_norm.weight", shape.head_dim))
    else:
        table.leave(*(f"{hf}.{name}.weight" for name in ("k_proj", "v_proj", "k_norm", "v_norm")))
    sources = [hf_source(f"{hf}.{name}_proj.weight", count, hidden) for name, count in rows.items()]
    table.fuse(f"{ours}.projection.weight", sources)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, q_rows))


def _add_feed_forward(table: WeightTable, config: Gemma4Config, layer: int) -> None:
    ours, hf, hidden = f"layers.{layer}", f"{config.prefix}.layers.{layer}", config.hidden_size
    add_gated_mlp(table, config.mlp_size(layer), hidden, f"{ours}.mlp", f"{hf}.mlp")
    if not config.num_experts:
        return
    count, size = config.num_experts, config.expert_size
    table.take(f"{ours}.router", hf_source(f"{hf}.router.proj.weight", count, hidden, keep_float32=True))
    table.take(f"{ours}.router_scale", hf_source(f"{hf}.router.scale", hidden, keep_float32=True))
    table.take(f"{ours}.expert_scale", hf_source(f"{hf}.router.per_expert_scale", count, keep_float32=True))
    table.take(f"{ours}.experts.gate_up", hf_source(f"{hf}.experts.gate_up_proj", count, 2 * size, hidden))
    table.take(f"{ours}.experts.down", hf_source(f"{hf}.experts.down_proj", count, hidden, size))
    for name in (
        "post_feedforward_layernorm_1",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_2",
    ):
        table.take(f"{ours}.{name}", hf_source(f"{hf}.{name}.weight", hidden))


def _add_rest(table: WeightTable, config: Gemma4Config, layer: int) -> None:
    ours, hf, hidden = f"layers.{layer}", f"{config.prefix}.layers.{layer}", config.hidden_size
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        table.take(f"{ours}.{name}_layernorm", hf_source(f"{hf}.{name}_layernorm.weight", hidden))
    table.take(f"{ours}.scalar", hf_source(f"{hf}.layer_scalar", 1))
    if config.per_layer_size:
        down = hf_source(f"{hf}.per_layer_input_gate.weight", config.per_layer_size, hidden)
        up = hf_source(f"{hf}.per_layer_projection.weight", hidden, config.per_layer_size)
        table.take(f"{ours}.per_layer_gate.weight", down)
        table.take(f"{ours}.per_layer_projection.weight", up)
        table.take(f"{ours}.per_layer_norm", hf_source(f"{hf}.post_per_layer_input_norm.weight", hidden))


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
