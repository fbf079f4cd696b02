"""Kimi Linear's layers, built from its configuration and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.build import build_decoder, build_norm
from pie_plugins.models.layers.decoder import Decoder, Part, PreNormLayer
from pie_plugins.models.layers.kimi_delta import build_kimi_delta
from pie_plugins.models.layers.kimi_linear_config import LATENT_GROUP, STATE_GROUP, KimiLinearConfig
from pie_plugins.models.layers.latent_build import build_latent_attention
from pie_plugins.models.layers.moe import build_experts, build_gated_mlp
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.step import CacheRef


def build_kimi_linear(config: KimiLinearConfig, parameters: Parameters) -> Decoder:
    layers = [_layer(config, parameters, layer) for layer in range(config.num_hidden_layers)]
    norm = build_norm(parameters, "norm", config.rms_norm_eps)
    return build_decoder(layers, norm, parameters, config.tie_word_embeddings)


def _layer(config: KimiLinearConfig, parameters: Parameters, layer: int) -> PreNormLayer:
    name, eps = f"layers.{layer}", config.rms_norm_eps
    has_experts = layer in config.experts.layers
    return PreNormLayer(
        mixer_norm=build_norm(parameters, f"{name}.input_norm", eps),
        mixer=_mixer(config, parameters, layer),
        mlp_norm=build_norm(parameters, f"{name}.mlp_norm", eps),
        mlp=build_experts(config.experts, parameters, name)
        if has_experts
        else build_gated_mlp(parameters, name),
    )


def _mixer(config: KimiLinearConfig, parameters: Parameters, layer: int) -> Part:
    name, place, latent = f"layers.{layer}", config.place(layer), config.latent
    if layer in config.delta_layers:
        cache = CacheRef(STATE_GROUP, place)
        return build_kimi_delta(config.delta, parameters, name, config.rms_norm_eps, cache)
    scale = (latent.qk_nope_head_dim + latent.qk_rope_head_dim) ** -0.5
    return build_latent_attention(latent, parameters, None, scale, name, CacheRef(LATENT_GROUP, place))
