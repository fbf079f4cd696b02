"""Nemotron-H: 56B, and Nemotron 3 Nano, Super and Ultra.

Reference: `NemotronHForCausalLM` of transformers. Unusual:

- a layer is one part alone: Mamba 2, attention, an MLP, or experts;
- attention does not know positions; MLPs and experts square a ReLU instead of having a gate;
- in Super and Ultra, routed experts work on smaller rows than the shared one.

Time steps are not clamped, as the published configurations say; transformers clamps them in prefill, but not in decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.architecture import CacheLayout, PagedLayout, StateLayout
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.experts import ExpertSettings, add_routed, add_router, read_group_experts
from pie_plugins.models.layers.mamba_shape import add_mamba, read_mamba
from pie_plugins.models.layers.nemotron_h_config import ATTENTION, MAMBA, MLP, MOE, NemotronHConfig
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.layers.weight_rows import add_attention, add_ends
from pie_plugins.models.weight_table import WeightTable, hf_source

if TYPE_CHECKING:
    from pie_plugins.models.layers.decoder import Decoder
    from pie_plugins.models.layers.parameters import Parameters


LETTERS = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": MOE}
SPELLINGS = {"linear_attention": MAMBA, "full_attention": ATTENTION}  # of newer files


def read_nemotron_h(keys: ConfigKeys) -> NemotronHConfig:
    _read_settled(keys)
    layers = _layers(keys)
    config = keys.into(
        NemotronHConfig,
        layers=layers,
        num_key_value_heads=keys.integer("num_key_value_heads", keys.integer("num_attention_heads")),
        head_dim=keys.integer("attention_head_dim" if keys.has("attention_head_dim") else "head_dim"),
        intermediate_size=keys.integer("intermediate_size", 0),
        norm_eps=keys.number("layer_norm_epsilon"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        mamba=read_mamba(keys),
        experts=_experts(keys, layers),
        latent_size=keys.integer("moe_latent_size", 0),
    )
    keys.finish()
    return config


def _read_settled(keys: ConfigKeys) -> None:
    """Keys that all checkpoints set alike, that the reference does not read, and those of the second-token heads."""
    keys.only("mamba_hidden_act", "silu")
    keys.only("mlp_hidden_act", "relu2")
    keys.only("mamba_ssm_cache_dtype", "float32")
    for name in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "sliding_window"):
        keys.only(name, False)
    keys.ignore("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual")  # training
    keys.ignore("expand", "chunk_size", "residual_in_fp32", "rms_norm_eps")
    keys.ignore("rope_theta", "partial_rotary_factor", "num_logits_to_keep", "use_mamba_kernels")
    keys.ignore("moe_shared_expert_overlap", "output_router_logits", "num_nextn_predict_layers")
    keys.ignore("mtp_hybrid_override_pattern", "mtp_layers_block_type")


def _layers(keys: ConfigKeys) -> tuple[str, ...]:
    pattern, listed = keys.text("hybrid_override_pattern", ""), keys.texts("layers_block_type")
    kinds = tuple(SPELLINGS.get(each, each) for each in listed or ()) or tuple(
        LETTERS.get(letter, letter) for letter in pattern
    )
    count = keys.integer("num_hidden_layers", len(kinds))
    if not kinds or set(kinds) - set(LETTERS.values()) or count != len(kinds):
        raise keys.error(
            f"hybrid_override_pattern is {pattern!r} and layers_block_type {listed}, expected {count} of"
            f" {', '.join(f'{letter} ({kind})' for letter, kind in LETTERS.items())}"
        )
    if not {MAMBA, ATTENTION} <= set(kinds):
        raise keys.error(f"hybrid_override_pattern or layers_block_type lacks {MAMBA} or {ATTENTION} layers")
    return kinds


def _experts(keys: ConfigKeys, layers: tuple[str, ...]) -> ExpertSettings | None:
    if MOE not in layers:
        keys.ignore("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
        keys.ignore("moe_shared_expert_intermediate_size", "n_group", "topk_group", "norm_topk_prob")
        keys.ignore("routed_scaling_factor")
        return None
    keys.only("n_shared_experts", 1)
    size, shared = keys.integer("moe_intermediate_size"), keys.integer("moe_shared_expert_intermediate_size")
    groups = keys.integer("n_group", 1), keys.integer("topk_group", 1)
    return read_group_experts(keys, (i for i, kind in enumerate(layers) if kind == MOE), size, shared, groups)


class NemotronH:
    """An `Architecture`."""

    def config(self, values: Mapping[str, Any], origin: str) -> NemotronHConfig:
        return read_nemotron_h(ConfigKeys(values, origin))

    def cache_layouts(self, config: NemotronHConfig) -> tuple[CacheLayout, ...]:
        count = config.layers.count
        return (
            PagedLayout("kv", count(ATTENTION), config.num_key_value_heads, config.head_dim),
            StateLayout("mamba", count(MAMBA), config.mamba.state()),
        )

    def weights(self, config: NemotronHConfig) -> WeightTable:
        table, hidden = WeightTable(), config.hidden_size
        add_ends(table, config, "backbone.embeddings", "backbone.norm_f")
        for layer, kind in enumerate(config.layers):
            ours, hf = f"layers.{layer}", f"backbone.layers.{layer}.mixer"
            if kind == MAMBA:
                add_mamba(table, config.mamba, hidden, ours, hf)
            elif kind == ATTENTION:
                add_attention(table, config, ours, hf)
            elif kind == MLP:
                _add_mlp(table, hidden, config.intermediate_size, ours, hf)
            else:
                _add_experts(table, config, ours, hf)
            table.take(f"{ours}.pre_norm", hf_source(f"backbone.layers.{layer}.norm.weight", hidden))
        table.leave("mtp.*")
        for part in ("embeddings.", "layers.", "norm_f."):
            table.also_called(f"model.{part}", f"backbone.{part}")  # by transformers, in memory
        return table

    def build(self, config: NemotronHConfig, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.nemotron_h_build import build_nemotron_h as build  # torch: not before

        return build(config, parameters)


def _add_mlp(table: WeightTable, hidden: int, inner: int, ours: str, hf: str) -> None:
    table.take(f"{ours}.up.weight", hf_source(f"{hf}.up_proj.weight", inner, hidden))
    table.take(f"{ours}.down.weight", hf_source(f"{hf}.down_proj.weight", hidden, inner))


def _add_experts(table: WeightTable, config: NemotronHConfig, ours: str, hf: str) -> None:
    experts, hidden, width = config.experts, config.hidden_size, config.latent_size or config.hidden_size
    assert experts is not None
    add_router(table, experts, hidden, ours, hf)
    add_routed(table, experts, width, ours, hf, ("up_proj",))
    _add_mlp(table, hidden, experts.shared_size, f"{ours}.shared", f"{hf}.shared_experts")
    if config.latent_size:
        table.take(f"{ours}.enter.weight", hf_source(f"{hf}.fc1_latent_proj.weight", width, hidden))
        table.take(f"{ours}.leave.weight", hf_source(f"{hf}.fc2_latent_proj.weight", hidden, width))


DECLARATION = ArchitectureDeclaration(
    name="nemotron_h",
    summary="Nemotron-H, and Nemotron 3 Nano, Super and Ultra",
    model_types=("nemotron_h",),
    load=NemotronH,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
