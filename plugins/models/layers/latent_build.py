"""The latent decoder's layers, built from its configuration and parameters."""

from __future__ import annotations

from dataclasses import replace

from pie_plugins.models.layers.build import build_decoder, build_norm
from pie_plugins.models.layers.decoder import Decoder, PreNormLayer
from pie_plugins.models.layers.latent_attention import LatentAttention, LowRankQuery
from pie_plugins.models.layers.latent_decoder import IndexSettings, LatentConfig, LatentShape
from pie_plugins.models.layers.moe import build_experts, build_gated_mlp
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.rope import Rope, build_rope
from pie_plugins.models.layers.sparse_indexer import SparseIndexer
from pie_plugins.models.layers.step import CacheRef, IndexHeads, LatentHeads

LATENT_NORM_EPS = 1e-6  # of the norms inside attention, whatever rms_norm_eps says


def build_latent(config: LatentConfig, parameters: Parameters) -> Decoder:
    rope = build_rope(config.attention.qk_rope_head_dim, config.rope, interleaved=True)
    layers = [_layer(config, parameters, rope, layer) for layer in range(config.num_hidden_layers)]
    norm = build_norm(parameters, "norm", config.rms_norm_eps)
    return build_decoder(layers, norm, parameters, config.tie_word_embeddings)


def _layer(config: LatentConfig, parameters: Parameters, rope: Rope, layer: int) -> PreNormLayer:
    name, eps = f"layers.{layer}", config.rms_norm_eps
    has_experts = layer in config.experts.layers
    return PreNormLayer(
        mixer_norm=build_norm(parameters, f"{name}.input_norm", eps),
        mixer=_attention(config, parameters, rope, layer),
        mlp_norm=build_norm(parameters, f"{name}.mlp_norm", eps),
        mlp=build_experts(config.experts, parameters, name)
        if has_experts
        else build_gated_mlp(parameters, name),
    )


def _attention(config: LatentConfig, parameters: Parameters, rope: Rope, layer: int) -> LatentAttention:
    index = config.index
    plain = build_latent_attention(
        config.attention, parameters, rope, config.softmax_scale, f"layers.{layer}", CacheRef(0, layer)
    )
    if index is None:
        return plain
    indexer = _indexer(config, index, parameters, rope, layer) if layer in index.layers else None
    return replace(plain, indexer=indexer, chosen=CacheRef(1, index.chosen_by(layer)))


def build_latent_attention(
    shape: LatentShape, parameters: Parameters, rope: Rope | None, scale: float, name: str, cache: CacheRef
) -> LatentAttention:
    plain, value = shape.qk_nope_head_dim, shape.v_head_dim
    expansion = parameters.tensor(f"{name}.expansion").view(shape.num_attention_heads, plain + value, -1)
    keys, values = expansion.split((plain, value), 1)
    return LatentAttention(
        down=parameters.linear(f"{name}.down_projection"),
        query=_query(parameters, name) if shape.q_lora_rank else None,
        latent_norm=build_norm(parameters, f"{name}.latent_norm", LATENT_NORM_EPS),
        output=parameters.linear(f"{name}.output"),
        heads=LatentHeads(
            num_heads=shape.num_attention_heads,
            rope=rope,
            rope_dim=shape.qk_rope_head_dim,
            key_expansion=keys,
            value_expansion=values,
            scale=scale,
        ),
        cache=cache,
    )


def _query(parameters: Parameters, name: str) -> LowRankQuery:
    norm = build_norm(parameters, f"{name}.query_norm", LATENT_NORM_EPS)
    return LowRankQuery(norm, parameters.linear(f"{name}.query"))


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
        heads=IndexHeads(index.num_heads, turned, config.attention.qk_rope_head_dim, index.top_k),
        cache=CacheRef(1, index.chosen_by(layer)),
    )
