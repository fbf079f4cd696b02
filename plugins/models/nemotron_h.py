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
from pie_plugins.models.layers.experts import ExpertSettings, GroupRouting
from pie_plugins.models.layers.mamba_shape import MambaShape
from pie_plugins.models.layers.nemotron_h_config import (
    ATTENTION,
    MAMBA,
    MLP,
    MOE,
    NemotronHConfig,
)
from pie_plugins.models.layers.transformers_reference import causal_logits
from pie_plugins.models.weight_table import WeightTable, hf_source

if TYPE_CHECKING:
    from pie_plugins.models.layers.decoder import Decoder
    from pie_plugins.models.layers.parameters import Parameters


LETTERS = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": MOE}
SPELLINGS = {"linear_attention": MAMBA, "full_attention": ATTENTION}  # of newer files
UNLIMITED = 1e30  # JSON has no infinity: published files write large numbers


def read_nemotron_h(keys: ConfigKeys) -> NemotronHConfig:
    _read_settled(keys)
    layers = _layers(keys)
    heads = keys.integer("num_attention_heads")
    config = NemotronHConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("attention_head_dim" if keys.has("attention_head_dim") else "head_dim"),
        intermediate_size=keys.integer("intermediate_size", 0),
        norm_eps=keys.number("layer_norm_epsilon"),
        max_position_embeddings=keys.integer("max_position_embeddings"),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        mamba=MambaShape(
            num_heads=keys.integer("mamba_num_heads"),
            head_dim=keys.integer("mamba_head_dim"),
            num_groups=keys.integer("n_groups"),
            state_size=keys.integer("ssm_state_size"),
            kernel=keys.integer("conv_kernel"),
        ),
        convolution_bias=keys.flag("use_conv_bias", True),
        experts=_experts(keys, layers),
        latent_size=keys.integer("moe_latent_size", 0),
    )
    config.mamba.check(keys)
    keys.finish()
    return config


def _read_settled(keys: ConfigKeys) -> None:
    """Keys that all checkpoints set alike, that the reference does not read, and those of the second-token heads."""
    keys.only("mamba_hidden_act", "silu")
    keys.only("mlp_hidden_act", "relu2")
    keys.only("mamba_ssm_cache_dtype", "float32")
    for name in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "sliding_window"):
        keys.only(name, False)
    limit = keys.numbers("time_step_limit") if keys.has("time_step_limit") else (0.0, UNLIMITED)
    if limit[0] != 0 or limit[-1] < UNLIMITED:
        raise keys.error(f"time_step_limit is {limit}, implemented is none: 0 to infinity")
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
    experts = ExpertSettings(
        layers=frozenset(place for place, kind in enumerate(layers) if kind == MOE),
        num_experts=keys.integer("n_routed_experts"),
        experts_per_token=keys.integer("num_experts_per_tok"),
        intermediate_size=keys.integer("moe_intermediate_size"),
        routing=GroupRouting(
            normalize=keys.flag("norm_topk_prob"),
            scale=keys.number("routed_scaling_factor"),
            num_groups=keys.integer("n_group", 1),
            kept_groups=keys.integer("topk_group", 1),
        ),
        shared_size=keys.integer("moe_shared_expert_intermediate_size"),
    )
    experts.check(keys)
    return experts


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
        table.take("embedding", hf_source("backbone.embeddings.weight", config.vocab_size, hidden))
        parts = {MAMBA: _add_mamba, ATTENTION: _add_attention, MLP: _add_mlp, MOE: _add_experts}
        for layer, kind in enumerate(config.layers):
            ours, hf = f"layers.{layer}", f"backbone.layers.{layer}"
            parts[kind](table, config, ours, f"{hf}.mixer")
            table.take(f"{ours}.pre_norm", hf_source(f"{hf}.norm.weight", hidden))
        table.take("norm", hf_source("backbone.norm_f.weight", hidden))
        if config.tie_word_embeddings:
            table.leave("lm_head.weight")
        else:
            table.take("head.weight", hf_source("lm_head.weight", config.vocab_size, hidden))
        table.leave("mtp.*")
        for part in ("embeddings.", "layers.", "norm_f."):
            table.also_called(f"model.{part}", f"backbone.{part}")  # by transformers, in memory
        return table

    def build(self, config: NemotronHConfig, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.nemotron_h_build import (
            build_nemotron_h,
        )  # torch: not before a model is built

        return build_nemotron_h(config, parameters)


def _add_mamba(table: WeightTable, config: NemotronHConfig, ours: str, hf: str) -> None:
    mamba, hidden = config.mamba, config.hidden_size
    rows = mamba.width + mamba.channels + mamba.num_heads
    table.take(f"{ours}.projection.weight", hf_source(f"{hf}.in_proj.weight", rows, hidden))
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.out_proj.weight", hidden, mamba.width))
    table.take(f"{ours}.convolution", hf_source(f"{hf}.conv1d.weight", mamba.channels, 1, mamba.kernel))
    if config.convolution_bias:
        table.take(f"{ours}.convolution_bias", hf_source(f"{hf}.conv1d.bias", mamba.channels))
    for name, stored in (("rate", "A_log"), ("time_bias", "dt_bias"), ("skip", "D")):
        table.take(f"{ours}.{name}", hf_source(f"{hf}.{stored}", mamba.num_heads, keep_float32=True))
    table.take(f"{ours}.norm", hf_source(f"{hf}.norm.weight", mamba.width))


def _add_attention(table: WeightTable, config: NemotronHConfig, ours: str, hf: str) -> None:
    q_rows, kv_rows = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    sources = [
        hf_source(f"{hf}.{name}_proj.weight", count, config.hidden_size) for name, count in rows.items()
    ]
    table.fuse(f"{ours}.qkv.weight", sources)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", config.hidden_size, q_rows))


def _add_mlp(table: WeightTable, config: NemotronHConfig, ours: str, hf: str, size: int = 0) -> None:
    hidden, inner = config.hidden_size, size or config.intermediate_size
    table.take(f"{ours}.up.weight", hf_source(f"{hf}.up_proj.weight", inner, hidden))
    table.take(f"{ours}.down.weight", hf_source(f"{hf}.down_proj.weight", hidden, inner))


def _add_experts(table: WeightTable, config: NemotronHConfig, ours: str, hf: str) -> None:
    assert config.experts is not None
    count, inner, hidden = config.experts.num_experts, config.experts.intermediate_size, config.hidden_size
    width = config.latent_size or hidden
    table.take(f"{ours}.router", hf_source(f"{hf}.gate.weight", count, hidden, keep_float32=True))
    correction = hf_source(f"{hf}.gate.e_score_correction_bias", count, keep_float32=True)
    table.take(f"{ours}.correction", correction)
    experts = [f"{hf}.experts.{expert}" for expert in range(count)]
    table.stack(f"{ours}.experts.gate_up", [hf_source(f"{e}.up_proj.weight", inner, width) for e in experts])
    table.stack(f"{ours}.experts.down", [hf_source(f"{e}.down_proj.weight", width, inner) for e in experts])
    _add_mlp(table, config, f"{ours}.shared", f"{hf}.shared_experts", config.experts.shared_size)
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
