"""The dense decoder's layers, built from its configuration and parameters."""

from __future__ import annotations

import torch

from pie_plugins.models.layers.attention import Attention
from pie_plugins.models.layers.axes_rope_settings import AxesRopeSettings
from pie_plugins.models.layers.decoder import Decoder, Part, PreNormLayer
from pie_plugins.models.layers.dense import DenseConfig
from pie_plugins.models.layers.moe import build_experts, build_gated_mlp
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.rope import Rope, build_rope
from pie_plugins.models.layers.rope_variants import interleaved_axes_rope
from pie_plugins.models.layers.step import AttentionHeads, CacheRef


def build_dense(config: DenseConfig, parameters: Parameters) -> Decoder:
    rope = dense_rope(config)
    embedding = parameters.tensor("embedding")
    tied = config.tie_word_embeddings
    return Decoder(
        embedding=embedding,
        layers=tuple(
            dense_layer(config, parameters, rope, layer) for layer in range(config.num_hidden_layers)
        ),
        norm=RMSNorm(parameters.tensor("norm"), config.rms_norm_eps),
        head=parameters.tied_linear(embedding) if tied else parameters.linear("head"),
    )


def dense_rope(config: DenseConfig) -> Rope:
    rope = config.rope
    if isinstance(rope, AxesRopeSettings):
        return interleaved_axes_rope(rope.theta, rope.rotary_dim, rope.sections)
    return build_rope(config.head_dim, rope)


def dense_layer(config: DenseConfig, parameters: Parameters, rope: Rope, layer: int) -> PreNormLayer:
    name, eps = f"layers.{layer}", config.rms_norm_eps
    return PreNormLayer(
        mixer_norm=RMSNorm(parameters.tensor(f"{name}.input_norm"), eps),
        mixer=_attention(config, parameters, rope, layer),
        mlp_norm=RMSNorm(parameters.tensor(f"{name}.mlp_norm"), eps),
        mlp=_feed_forward(config, parameters, layer),
    )


def _feed_forward(config: DenseConfig, parameters: Parameters, layer: int) -> Part:
    name = f"layers.{layer}"
    if config.experts is not None and config.has_experts(layer):
        return build_experts(config.experts, parameters, name)
    return build_gated_mlp(parameters, name, config.mlp_bias)


def _attention(config: DenseConfig, parameters: Parameters, rope: Rope, layer: int) -> Attention:
    name = f"layers.{layer}"
    return Attention(
        qkv=parameters.linear(f"{name}.qkv", config.qkv_bias),
        output=parameters.linear(f"{name}.output", config.output_bias),
        heads=AttentionHeads(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm=_head_norm(config, parameters, name) if config.qk_norm else None,
            norm_eps=config.rms_norm_eps,
            rope=rope,
            scale=config.head_dim**-0.5,
        ),
        cache=CacheRef(0, layer),
    )


def _head_norm(config: DenseConfig, parameters: Parameters, name: str) -> torch.Tensor:
    """One norm over all query and key heads: its weight has a row for each."""
    q = parameters.tensor(f"{name}.q_norm").expand(config.num_attention_heads, -1)
    k = parameters.tensor(f"{name}.k_norm").expand(config.num_key_value_heads, -1)
    return torch.cat((q, k))
