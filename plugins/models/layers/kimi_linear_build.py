"""Kimi Linear's layers, built from its configuration and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.decoder import Decoder, Part, PreNormLayer
from pie_plugins.models.layers.kimi_delta import KimiDelta
from pie_plugins.models.layers.kimi_linear_config import LATENT_GROUP, STATE_GROUP, KimiLinearConfig
from pie_plugins.models.layers.latent_attention import LatentAttention
from pie_plugins.models.layers.latent_build import LATENT_NORM_EPS
from pie_plugins.models.layers.moe import build_experts, build_gated_mlp
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.short_conv import convolution
from pie_plugins.models.layers.step import CacheRef, LatentHeads


def build_kimi_linear(config: KimiLinearConfig, parameters: Parameters) -> Decoder:
    embedding = parameters.tensor("embedding")
    tied = config.tie_word_embeddings
    return Decoder(
        embedding=embedding,
        layers=tuple(_layer(config, parameters, layer) for layer in range(config.num_hidden_layers)),
        norm=RMSNorm(parameters.tensor("norm"), config.rms_norm_eps),
        head=parameters.tied_linear(embedding) if tied else parameters.linear("head"),
    )


def _layer(config: KimiLinearConfig, parameters: Parameters, layer: int) -> PreNormLayer:
    name, eps = f"layers.{layer}", config.rms_norm_eps
    return PreNormLayer(
        mixer_norm=RMSNorm(parameters.tensor(f"{name}.input_norm"), eps),
        mixer=(_delta if layer in config.delta_layers else _latent)(config, parameters, layer),
        mlp_norm=RMSNorm(parameters.tensor(f"{name}.mlp_norm"), eps),
        mlp=_feed_forward(config, parameters, layer),
    )


def _feed_forward(config: KimiLinearConfig, parameters: Parameters, layer: int) -> Part:
    name = f"layers.{layer}"
    if layer in config.experts.layers:
        return build_experts(config.experts, parameters, name)
    return build_gated_mlp(parameters, name)


def _delta(config: KimiLinearConfig, parameters: Parameters, layer: int) -> KimiDelta:
    name, heads = f"layers.{layer}", config.delta.num_value_heads
    return KimiDelta(
        projection=parameters.linear(f"{name}.projection"),
        decay=parameters.linear(f"{name}.decay"),
        gate=parameters.linear(f"{name}.gate"),
        output=parameters.linear(f"{name}.output"),
        convolution=convolution(parameters.tensor(f"{name}.convolution")),
        rate=-parameters.tensor(f"{name}.rate").exp().view(heads, 1),
        rate_bias=parameters.tensor(f"{name}.rate_bias").view(heads, -1),
        norm=parameters.tensor(f"{name}.norm"),
        norm_eps=config.rms_norm_eps,
        shape=config.delta,
        cache=CacheRef(STATE_GROUP, config.place(layer)),
    )


def _latent(config: KimiLinearConfig, parameters: Parameters, layer: int) -> LatentAttention:
    name, plain, value = f"layers.{layer}", config.qk_nope_head_dim, config.v_head_dim
    expansion = parameters.tensor(f"{name}.expansion").view(config.num_attention_heads, plain + value, -1)
    keys, values = expansion.split((plain, value), 1)
    return LatentAttention(
        down=parameters.linear(f"{name}.down_projection"),
        query=None,
        latent_norm=RMSNorm(parameters.tensor(f"{name}.latent_norm"), LATENT_NORM_EPS),
        output=parameters.linear(f"{name}.output"),
        heads=LatentHeads(
            num_heads=config.num_attention_heads,
            rope=None,
            rope_dim=config.qk_rope_head_dim,
            key_expansion=keys,
            value_expansion=values,
            scale=(plain + config.qk_rope_head_dim) ** -0.5,
        ),
        cache=CacheRef(LATENT_GROUP, config.place(layer)),
    )
