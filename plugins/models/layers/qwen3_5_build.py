"""The layers of Qwen3.5, built from its configuration and parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from pie_plugins.models.layers.decoder import Decoder, Part, PreNormLayer
from pie_plugins.models.layers.experts import ExpertSettings
from pie_plugins.models.layers.gated_attention import GatedAttention
from pie_plugins.models.layers.gated_delta_net import GatedDeltaNet
from pie_plugins.models.layers.mlp import GatedPart
from pie_plugins.models.layers.moe import MixtureOfExperts, build_gated_mlp, build_routed
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.qwen3_5_config import ATTENTION_GROUP, LINEAR, STATE_GROUP, Qwen35Config
from pie_plugins.models.layers.rope_variants import AxesRope, interleaved_axes_rope
from pie_plugins.models.layers.short_conv import convolution
from pie_plugins.models.layers.step import AttentionHeads, CacheRef


def build_qwen3_5(config: Qwen35Config, parameters: Parameters) -> Decoder:
    rope = interleaved_axes_rope(config.rope.theta, config.rope.rotary_dim, config.rope.sections)
    embedding = parameters.tensor("embedding")
    tied = config.tie_word_embeddings
    return Decoder(
        embedding=embedding,
        layers=tuple(_layer(config, parameters, rope, layer) for layer in range(len(config.layer_types))),
        norm=_norm(config, parameters, "norm"),
        head=parameters.tied_linear(embedding) if tied else parameters.linear("head"),
    )


def _layer(config: Qwen35Config, parameters: Parameters, rope: AxesRope, layer: int) -> PreNormLayer:
    name = f"layers.{layer}"
    is_linear = config.layer_types[layer] == LINEAR
    return PreNormLayer(
        mixer_norm=_norm(config, parameters, f"{name}.input_norm"),
        mixer=_delta(config, parameters, layer) if is_linear else _attention(config, parameters, rope, layer),
        mlp_norm=_norm(config, parameters, f"{name}.mlp_norm"),
        mlp=_feed_forward(config.experts, parameters, name),
    )


def _norm(config: Qwen35Config, parameters: Parameters, name: str) -> RMSNorm:
    return RMSNorm(_plus_one(parameters, name), config.rms_norm_eps)


def _plus_one(parameters: Parameters, name: str) -> Tensor:
    """The checkpoint keeps norms as what they add to one, which bfloat16 would round away from 1.0."""
    return parameters.tensor(name) + 1


def _delta(config: Qwen35Config, parameters: Parameters, layer: int) -> GatedDeltaNet:
    name = f"layers.{layer}"
    return GatedDeltaNet(
        projection=parameters.linear(f"{name}.projection"),
        output=parameters.linear(f"{name}.output"),
        convolution=convolution(parameters.tensor(f"{name}.convolution")),
        rate=-parameters.tensor(f"{name}.rate").exp(),
        rate_bias=parameters.tensor(f"{name}.rate_bias"),
        norm=parameters.tensor(f"{name}.norm"),
        norm_eps=config.rms_norm_eps,
        shape=config.delta,
        cache=CacheRef(STATE_GROUP, config.place(layer)),
    )


def _attention(config: Qwen35Config, parameters: Parameters, rope: AxesRope, layer: int) -> GatedAttention:
    name = f"layers.{layer}"
    q_norm = _plus_one(parameters, f"{name}.q_norm").expand(config.num_attention_heads, -1)
    k_norm = _plus_one(parameters, f"{name}.k_norm").expand(config.num_key_value_heads, -1)
    return GatedAttention(
        projection=parameters.linear(f"{name}.projection"),
        output=parameters.linear(f"{name}.output"),
        heads=AttentionHeads(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm=torch.cat((q_norm, k_norm)),
            norm_eps=config.rms_norm_eps,
            rope=rope,
            scale=config.head_dim**-0.5,
        ),
        cache=CacheRef(ATTENTION_GROUP, config.place(layer)),
    )


def _feed_forward(experts: ExpertSettings | None, parameters: Parameters, name: str) -> Part:
    if experts is None:
        return build_gated_mlp(parameters, name)
    shared = GatedPart(
        parameters.linear(f"{name}.shared.gate"), build_gated_mlp(parameters, f"{name}.shared")
    )
    router, routed = build_routed(experts, parameters, name)
    return MixtureOfExperts(router, routed, shared)
