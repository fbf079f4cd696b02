"""The layers of Qwen3.5, built from its configuration and parameters."""

from __future__ import annotations

from torch import Tensor

from pie_plugins.models.layers.build import build_decoder, build_heads, head_norm
from pie_plugins.models.layers.decoder import Decoder, Part, PreNormLayer
from pie_plugins.models.layers.gated_attention import GatedAttention
from pie_plugins.models.layers.gated_delta_net import build_gated_delta
from pie_plugins.models.layers.mlp import GatedPart
from pie_plugins.models.layers.moe import MixtureOfExperts, build_gated_mlp, build_routed
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.qwen3_5_config import ATTENTION_GROUP, LINEAR, STATE_GROUP, Qwen35Config
from pie_plugins.models.layers.rope_variants import AxesRope, interleaved_axes_rope
from pie_plugins.models.layers.step import CacheRef


def build_qwen3_5(config: Qwen35Config, parameters: Parameters) -> Decoder:
    rope = interleaved_axes_rope(config.rope.theta, config.rope.rotary_dim, config.rope.sections)
    layers = [_layer(config, parameters, rope, layer) for layer in range(len(config.layer_types))]
    return build_decoder(layers, _norm(config, parameters, "norm"), parameters, config.tie_word_embeddings)


def _layer(config: Qwen35Config, parameters: Parameters, rope: AxesRope, layer: int) -> PreNormLayer:
    name, eps = f"layers.{layer}", config.rms_norm_eps
    if config.layer_types[layer] == LINEAR:
        cache = CacheRef(STATE_GROUP, config.place(layer))
        mixer: Part = build_gated_delta(config.delta, parameters, name, eps, cache)
    else:
        mixer = _attention(config, parameters, rope, layer)
    return PreNormLayer(
        mixer_norm=_norm(config, parameters, f"{name}.input_norm"),
        mixer=mixer,
        mlp_norm=_norm(config, parameters, f"{name}.mlp_norm"),
        mlp=_feed_forward(config, parameters, name),
    )


def _norm(config: Qwen35Config, parameters: Parameters, name: str) -> RMSNorm:
    return RMSNorm(_plus_one(parameters, name), config.rms_norm_eps)


def _plus_one(parameters: Parameters, name: str) -> Tensor:
    """The checkpoint keeps norms as what they add to one, which bfloat16 would round away from 1.0."""
    return parameters.tensor(name) + 1


def _attention(config: Qwen35Config, parameters: Parameters, rope: AxesRope, layer: int) -> GatedAttention:
    name = f"layers.{layer}"
    q_norm, k_norm = _plus_one(parameters, f"{name}.q_norm"), _plus_one(parameters, f"{name}.k_norm")
    return GatedAttention(
        projection=parameters.linear(f"{name}.projection"),
        output=parameters.linear(f"{name}.output"),
        heads=build_heads(config, rope, head_norm(q_norm, k_norm, config), config.rms_norm_eps),
        cache=CacheRef(ATTENTION_GROUP, config.place(layer)),
    )


def _feed_forward(config: Qwen35Config, parameters: Parameters, name: str) -> Part:
    if config.experts is None:
        return build_gated_mlp(parameters, name)
    gate, shared = parameters.linear(f"{name}.shared.gate"), build_gated_mlp(parameters, f"{name}.shared")
    return MixtureOfExperts(*build_routed(config.experts, parameters, name), GatedPart(gate, shared))
