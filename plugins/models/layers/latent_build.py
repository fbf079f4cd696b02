"""The latent decoder's layers, built from its configuration and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.decoder import Decoder, PreNormLayer
from pie_plugins.models.layers.latent_attention import LatentAttention, LowRankQuery
from pie_plugins.models.layers.latent_decoder import IndexSettings, LatentConfig
from pie_plugins.models.layers.moe import build_experts, build_gated_mlp
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.rope import Rope, build_rope
from pie_plugins.models.layers.sparse_indexer import SparseIndexer
from pie_plugins.models.layers.step import CacheRef, IndexHeads, LatentHeads

LATENT_NORM_EPS = 1e-6  # of the norms inside attention, whatever rms_norm_eps says


def build_latent(config: LatentConfig, parameters: Parameters) -> Decoder:
    rope = build_rope(config.qk_rope_head_dim, config.rope, interleaved=True)
    embedding = parameters.tensor("embedding")
    tied = config.tie_word_embeddings
    return Decoder(
        embedding=embedding,
        layers=tuple(_layer(config, parameters, rope, layer) for layer in range(config.num_hidden_layers)),
        norm=RMSNorm(parameters.tensor("norm"), config.rms_norm_eps),
        head=parameters.tied_linear(embedding) if tied else parameters.linear("head"),
    )


def _layer(config: LatentConfig, parameters: Parameters, rope: Rope, layer: int) -> PreNormLayer:
    name, eps = f"layers.{layer}", config.rms_norm_eps
    has_experts = layer in config.experts.layers
    return PreNormLayer(
        mixer_norm=RMSNorm(parameters.tensor(f"{name}.input_norm"), eps),
        mixer=_attention(config, parameters, rope, layer),
        mlp_norm=RMSNorm(parameters.tensor(f"{name}.mlp_norm"), eps),
        mlp=build_experts(config.experts, parameters, name)
        if has_experts
        else build_gated_mlp(parameters, name),
    )


def _attention(config: LatentConfig, parameters: Parameters, rope: Rope, layer: int) -> LatentAttention:
    name, index = f"layers.{layer}", config.index
    return LatentAttention(
        down=parameters.linear(f"{name}.down_projection"),
        query=_query(parameters, name) if config.q_lora_rank else None,
        latent_norm=RMSNorm(parameters.tensor(f"{name}.latent_norm"), LATENT_NORM_EPS),
        output=parameters.linear(f"{name}.output"),
        heads=_heads(config, parameters, rope, name),
        cache=CacheRef(0, layer),
        indexer=_indexer(config, index, parameters, rope, layer)
        if index is not None and layer in index.layers
        else None,
        chosen=None if index is None else CacheRef(1, index.chosen_by(layer)),
    )


def _query(parameters: Parameters, name: str) -> LowRankQuery:
    norm = RMSNorm(parameters.tensor(f"{name}.query_norm"), LATENT_NORM_EPS)
    return LowRankQuery(norm, parameters.linear(f"{name}.query"))


def _heads(config: LatentConfig, parameters: Parameters, rope: Rope, name: str) -> LatentHeads:
    plain, value = config.qk_nope_head_dim, config.v_head_dim
    expansion = parameters.tensor(f"{name}.expansion").view(config.num_attention_heads, plain + value, -1)
    keys, values = expansion.split((plain, value), 1)
    return LatentHeads(
        num_heads=config.num_attention_heads,
        rope=rope,
        rope_dim=config.qk_rope_head_dim,
        key_expansion=keys,
        value_expansion=values,
        scale=config.softmax_scale,
    )


def _indexer(
    config: LatentConfig, index: IndexSettings, parameters: Parameters, rope: Rope, layer: int
) -> SparseIndexer:
    name = f"layers.{layer}.indexer"
    turned = rope if index.interleaved_rope else Rope(rope.frequencies, rope.magnitude)
    return SparseIndexer(
        query=parameters.linear(f"{name}.query"),
        key=parameters.linear(f"{name}.key"),
        key_norm=parameters.tensor(f"{name}.key_norm"),
        key_norm_bias=parameters.tensor(f"{name}.key_norm_bias"),
        head_weights=parameters.tensor(f"{name}.head_weights"),
        heads=IndexHeads(index.num_heads, turned, config.qk_rope_head_dim, index.top_k),
        cache=CacheRef(1, index.chosen_by(layer)),
    )
