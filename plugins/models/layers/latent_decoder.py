"""The decoder that the DeepSeek-V3 family shares: its configuration, weight table, caches and build.

Latent attention, one gated MLP in the first layers and experts in the others. A variant subclasses `LatentDecoder` and
says in `read` what its checkpoints add, such as an indexer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pie_plugins.models.layers.architecture import LatentLayout
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.experts import ExpertSettings, add_experts, add_gated_mlp, read_group_experts
from pie_plugins.models.layers.rope_settings import RopeSettings, YarnScaling, read_rope
from pie_plugins.models.weight_table import WeightTable, hf_source

if TYPE_CHECKING:
    from pie_plugins.models.layers.decoder import Decoder
    from pie_plugins.models.layers.parameters import Parameters


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """Which layers choose the rows that they and the following ones read, and how."""

    layers: tuple[int, ...]
    num_heads: int
    head_dim: int
    top_k: int
    interleaved_rope: bool

    def chosen_by(self, layer: int) -> int:
        """The place, among the layers that choose, of the one that this layer follows."""
        return sum(each <= layer for each in self.layers) - 1


@dataclass(frozen=True, slots=True)
class LatentShape:
    """The sizes of latent attention."""

    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int  # 0: queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def row_size(self) -> int:
        """Of what is kept of a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)


@dataclass(frozen=True, slots=True)
class LatentConfig:
    vocab_size: int
    intermediate_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeSettings
    attention: LatentShape
    num_mtp_layers: int
    experts: ExpertSettings
    index: IndexSettings | None = None

    @property
    def softmax_scale(self) -> float:
        magnitude = 1.0
        if isinstance(self.rope.scaling, YarnScaling):
            magnitude = self.rope.scaling.softmax_magnitude
        return (
            magnitude
            * magnitude
            / math.sqrt(self.attention.qk_nope_head_dim + self.attention.qk_rope_head_dim)
        )

    @property
    def hidden_size(self) -> int:
        return self.attention.hidden_size


def read_latent(keys: ConfigKeys) -> LatentConfig:
    """The keys that all members of the family share."""
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("rope_interleave", True)
    # Latent attention has no key heads of its own, and head_dim follows from its parts, whatever files say.
    keys.ignore("num_key_value_heads", "head_dim", "qk_head_dim")
    keys.ignore("aux_loss_alpha", "seq_aux", "output_router_logits", "ep_size")  # training, and parallelism
    rank = keys.integer("q_lora_rank", 0)
    config = keys.into(
        LatentConfig,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        rope=read_rope(keys, 10000.0),
        attention=keys.into(LatentShape, q_lora_rank=rank),
        num_mtp_layers=keys.integer("num_nextn_predict_layers", 0),
        experts=_read_experts(keys),
    )
    turned = config.attention.qk_rope_head_dim
    if turned < 2 or turned % 2:
        raise keys.error(f"qk_rope_head_dim is {turned}, expected an even number")
    return config


def _read_experts(keys: ConfigKeys) -> ExpertSettings:
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    keys.only("moe_layer_freq", 1)
    keys.only("moe_router_dtype", "float32")
    size, groups = (
        keys.integer("moe_intermediate_size"),
        (keys.integer("n_group"), keys.integer("topk_group")),
    )
    return read_group_experts(
        keys, _expert_layers(keys), size, size * keys.integer("n_shared_experts"), groups
    )


def _expert_layers(keys: ConfigKeys) -> frozenset[int]:
    """The first layers are dense; transformers writes out what each layer is, the hub how many are."""
    layers, first = keys.integer("num_hidden_layers"), keys.integer("first_k_dense_replace", 0)
    kinds = keys.texts("mlp_layer_types") or ("dense",) * first + ("sparse",) * (layers - first)
    if set(kinds) - {"dense", "sparse"} or len(kinds) < layers:
        raise keys.error(f"mlp_layer_types is {kinds}, expected dense or sparse for each of {layers} layers")
    return frozenset(layer for layer in range(layers) if kinds[layer] == "sparse")


def read_index(
    keys: ConfigKeys, config: LatentConfig, layers: tuple[int, ...], *, interleaved_rope: bool
) -> IndexSettings:
    keys.only_all("layer_types", "indexed_attention", "deepseek_sparse_attention")
    index = IndexSettings(
        layers=layers,
        num_heads=keys.integer("index_n_heads"),
        head_dim=keys.integer("index_head_dim"),
        top_k=keys.integer("index_topk"),
        interleaved_rope=interleaved_rope,
    )
    turned, rank = config.attention.qk_rope_head_dim, config.attention.q_lora_rank
    if index.top_k < 1 or index.head_dim < turned or not rank:
        raise keys.error(
            f"index_topk is {index.top_k}, index_head_dim {index.head_dim}, q_lora_rank {rank}; expected at least 1,"
            f" at least qk_rope_head_dim ({turned}), and a rank"
        )
    return index


class LatentDecoder:
    """An `Architecture`; a variant says in `read` what its checkpoints are."""

    prefix = ""  # of all tensors, where the decoder is part of a larger model

    def read(self, keys: ConfigKeys) -> LatentConfig:
        return read_latent(keys)

    def config(self, values: Mapping[str, Any], origin: str) -> LatentConfig:
        keys = ConfigKeys(values, origin)
        config = self.read(keys)
        keys.finish()
        return config

    def cache_layouts(self, config: LatentConfig) -> tuple[LatentLayout, ...]:
        latent = LatentLayout("latent", config.num_hidden_layers, config.attention.row_size)
        if config.index is None:
            return (latent,)
        return latent, LatentLayout("index", len(config.index.layers), config.index.head_dim)

    def weights(self, config: LatentConfig) -> WeightTable:
        table, hidden, prefix = WeightTable(), config.hidden_size, self.prefix
        vocab = config.vocab_size
        table.take("embedding", hf_source(f"{prefix}model.embed_tokens.weight", vocab, hidden))
        for layer in range(config.num_hidden_layers):
            ours, hf = f"layers.{layer}", f"{prefix}model.layers.{layer}"
            table.take(f"{ours}.input_norm", hf_source(f"{hf}.input_layernorm.weight", hidden))
            table.take(f"{ours}.mlp_norm", hf_source(f"{hf}.post_attention_layernorm.weight", hidden))
            add_latent_attention(table, config.attention, ours, f"{hf}.self_attn")
            if config.index is not None and layer in config.index.layers:
                _add_indexer(table, config, config.index, f"{ours}.indexer", f"{hf}.self_attn.indexer")
            if layer in config.experts.layers:
                add_experts(table, config.experts, hidden, ours, f"{hf}.mlp")
            else:
                add_gated_mlp(table, config.intermediate_size, hidden, ours, f"{hf}.mlp")
        table.take("norm", hf_source(f"{prefix}model.norm.weight", hidden))
        if not config.tie_word_embeddings:
            table.take("head.weight", hf_source(f"{prefix}lm_head.weight", vocab, hidden))
        self._leave(table, config)
        return table

    def _leave(self, table: WeightTable, config: LatentConfig) -> None:
        """Layers behind the last one predict further tokens; some configurations have one without counting it."""
        if config.tie_word_embeddings:
            table.leave(f"{self.prefix}lm_head.weight")
        table.leave("*.rotary_emb.inv_freq")
        for layer in range(max(config.num_mtp_layers, 1)):
            table.leave(f"{self.prefix}model.layers.{config.num_hidden_layers + layer}.*")

    def build(self, config: LatentConfig, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.latent_build import build_latent  # torch: not before a model is built

        return build_latent(config, parameters)


def add_latent_attention(table: WeightTable, shape: LatentShape, ours: str, hf: str) -> None:
    """The projections of the hidden states are one matrix: query or its low rank, then the latent row."""
    hidden, rank, latent = shape.hidden_size, shape.q_lora_rank, shape.kv_lora_rank
    heads, query = shape.num_attention_heads, shape.query_size
    first = hf_source(f"{hf}.q_a_proj.weight" if rank else f"{hf}.q_proj.weight", rank or query, hidden)
    row = hf_source(f"{hf}.kv_a_proj_with_mqa.weight", shape.row_size, hidden)
    table.fuse(f"{ours}.down_projection.weight", [first, row])
    if rank:
        table.take(f"{ours}.query_norm", hf_source(f"{hf}.q_a_layernorm.weight", rank))
        table.take(f"{ours}.query.weight", hf_source(f"{hf}.q_b_proj.weight", query, rank))
    table.take(f"{ours}.latent_norm", hf_source(f"{hf}.kv_a_layernorm.weight", latent))
    expanded = heads * (shape.qk_nope_head_dim + shape.v_head_dim)
    table.take(f"{ours}.expansion", hf_source(f"{hf}.kv_b_proj.weight", expanded, latent))
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, heads * shape.v_head_dim))


def _add_indexer(table: WeightTable, config: LatentConfig, index: IndexSettings, ours: str, hf: str) -> None:
    hidden, dim, heads = config.hidden_size, index.head_dim, index.num_heads
    table.take(
        f"{ours}.query.weight", hf_source(f"{hf}.wq_b.weight", heads * dim, config.attention.q_lora_rank)
    )
    table.take(f"{ours}.key.weight", hf_source(f"{hf}.wk.weight", dim, hidden))
    table.take(f"{ours}.key_norm", hf_source(f"{hf}.k_norm.weight", dim))
    table.take(f"{ours}.key_norm_bias", hf_source(f"{hf}.k_norm.bias", dim))
    weights = hf_source(f"{hf}.weights_proj.weight", heads, hidden, keep_float32=True)
    table.take(f"{ours}.head_weights", weights)
