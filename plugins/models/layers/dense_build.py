"""The dense decoder's layers, built from its configuration and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.attention import Attention
from pie_plugins.models.layers.axes_rope_settings import AxesRopeSettings
from pie_plugins.models.layers.build import build_decoder, build_heads, build_norm, head_norm
from pie_plugins.models.layers.decoder import Decoder, Part, PreNormLayer
from pie_plugins.models.layers.dense import DenseConfig
from pie_plugins.models.layers.moe import build_experts, build_gated_mlp
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.rope import Rope, build_rope
from pie_plugins.models.layers.rope_variants import interleaved_axes_rope
from pie_plugins.models.layers.step import CacheRef


def build_dense(config: DenseConfig, parameters: Parameters) -> Decoder:
    rope = dense_rope(config)
    layers = [dense_layer(config, parameters, rope, layer) for layer in range(config.num_hidden_layers)]
    norm = build_norm(parameters, "norm", config.rms_norm_eps)
    return build_decoder(layers, norm, parameters, config.tie_word_embeddings)


def dense_rope(config: DenseConfig) -> Rope:
    rope = config.rope
    if isinstance(rope, AxesRopeSettings):
        return interleaved_axes_rope(rope.theta, rope.rotary_dim, rope.sections)
    return build_rope(config.head_dim, rope)


def dense_layer(config: DenseConfig, parameters: Parameters, rope: Rope, layer: int) -> PreNormLayer:
    name, eps = f"layers.{layer}", config.rms_norm_eps
    return PreNormLayer(
        mixer_norm=build_norm(parameters, f"{name}.input_norm", eps),
        mixer=_attention(config, parameters, rope, layer),
        mlp_norm=build_norm(parameters, f"{name}.mlp_norm", eps),
        mlp=_feed_forward(config, parameters, layer),
    )


def _feed_forward(config: DenseConfig, parameters: Parameters, layer: int) -> Part:
    name = f"layers.{layer}"
    if config.experts is not None and config.has_experts(layer):
        return build_experts(config.experts, parameters, name)
    return build_gated_mlp(parameters, name, config.mlp_bias)


def _attention(config: DenseConfig, parameters: Parameters, rope: Rope, layer: int) -> Attention:
    name, norm = f"layers.{layer}", None
    if config.qk_norm:
        norm = head_norm(parameters.tensor(f"{name}.q_norm"), parameters.tensor(f"{name}.k_norm"), config)
    return Attention(
        qkv=parameters.linear(f"{name}.qkv", config.qkv_bias),
        output=parameters.linear(f"{name}.output", config.output_bias),
        heads=build_heads(config, rope, norm, config.rms_norm_eps),
        cache=CacheRef(0, layer),
    )
