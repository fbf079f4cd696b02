"""Nemotron-H's layers, built from its configuration and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.attention import Attention
from pie_plugins.models.layers.decoder import Decoder, Part, PreNormPart
from pie_plugins.models.layers.mamba2 import Mamba2
from pie_plugins.models.layers.mlp import PlainMLP, squared_relu
from pie_plugins.models.layers.moe import MixtureOfExperts, build_routed
from pie_plugins.models.layers.nemotron_h_config import (
    ATTENTION,
    ATTENTION_GROUP,
    MAMBA,
    MLP,
    STATE_GROUP,
    NemotronHConfig,
)
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.short_conv import convolution
from pie_plugins.models.layers.step import AttentionHeads, CacheRef


def build_nemotron_h(config: NemotronHConfig, parameters: Parameters) -> Decoder:
    embedding = parameters.tensor("embedding")
    tied = config.tie_word_embeddings
    return Decoder(
        embedding=embedding,
        layers=tuple(
            PreNormPart(
                _norm(config, parameters, f"layers.{layer}.pre_norm"), _part(config, parameters, layer)
            )
            for layer in range(len(config.layers))
        ),
        norm=_norm(config, parameters, "norm"),
        head=parameters.tied_linear(embedding) if tied else parameters.linear("head"),
    )


def _norm(config: NemotronHConfig, parameters: Parameters, name: str) -> RMSNorm:
    return RMSNorm(parameters.tensor(name), config.norm_eps)


def _part(config: NemotronHConfig, parameters: Parameters, layer: int) -> Part:
    kind = config.layers[layer]
    if kind == MAMBA:
        return _mamba(config, parameters, layer)
    if kind == ATTENTION:
        return _attention(config, parameters, layer)
    return _mlp(parameters, f"layers.{layer}") if kind == MLP else _experts(config, parameters, layer)


def _mamba(config: NemotronHConfig, parameters: Parameters, layer: int) -> Mamba2:
    name, shape = f"layers.{layer}", config.mamba
    bias = parameters.tensor(f"{name}.convolution_bias") if config.convolution_bias else None
    return Mamba2(
        projection=parameters.linear(f"{name}.projection"),
        output=parameters.linear(f"{name}.output"),
        convolution=convolution(parameters.tensor(f"{name}.convolution"), bias),
        rate=-parameters.tensor(f"{name}.rate").exp(),
        time_bias=parameters.tensor(f"{name}.time_bias"),
        skip=parameters.tensor(f"{name}.skip")[:, None],
        norm=parameters.tensor(f"{name}.norm").view(shape.num_groups, -1),
        norm_eps=config.norm_eps,
        shape=shape,
        cache=CacheRef(STATE_GROUP, config.place(layer)),
    )


def _attention(config: NemotronHConfig, parameters: Parameters, layer: int) -> Attention:
    name = f"layers.{layer}"
    return Attention(
        qkv=parameters.linear(f"{name}.qkv"),
        output=parameters.linear(f"{name}.output"),
        heads=AttentionHeads(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm=None,
            norm_eps=config.norm_eps,
            rope=None,
            scale=config.head_dim**-0.5,
        ),
        cache=CacheRef(ATTENTION_GROUP, config.place(layer)),
    )


def _mlp(parameters: Parameters, name: str) -> PlainMLP:
    return PlainMLP(parameters.linear(f"{name}.up"), parameters.linear(f"{name}.down"), squared_relu)


def _experts(config: NemotronHConfig, parameters: Parameters, layer: int) -> MixtureOfExperts:
    name, has_latents = f"layers.{layer}", bool(config.latent_size)
    assert config.experts is not None
    router, experts = build_routed(config.experts, parameters, name, squared_relu)
    return MixtureOfExperts(
        router=router,
        experts=experts,
        shared=_mlp(parameters, f"{name}.shared"),
        enter=parameters.linear(f"{name}.enter") if has_latents else None,
        leave=parameters.linear(f"{name}.leave") if has_latents else None,
    )
