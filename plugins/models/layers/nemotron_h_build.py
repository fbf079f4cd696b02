"""Nemotron-H's layers, built from its configuration and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.attention import Attention
from pie_plugins.models.layers.build import build_decoder, build_heads, build_norm
from pie_plugins.models.layers.decoder import Decoder, Part, PreNormPart
from pie_plugins.models.layers.mamba2 import build_mamba
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
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.step import CacheRef


def build_nemotron_h(config: NemotronHConfig, parameters: Parameters) -> Decoder:
    eps, count = config.norm_eps, len(config.layers)
    norms = [build_norm(parameters, f"layers.{layer}.pre_norm", eps) for layer in range(count)]
    layers = [PreNormPart(norms[layer], _part(config, parameters, layer)) for layer in range(count)]
    return build_decoder(layers, build_norm(parameters, "norm", eps), parameters, config.tie_word_embeddings)


def _part(config: NemotronHConfig, parameters: Parameters, layer: int) -> Part:
    kind, name, place = config.layers[layer], f"layers.{layer}", config.place(layer)
    if kind == MAMBA:
        return build_mamba(config.mamba, parameters, name, config.norm_eps, CacheRef(STATE_GROUP, place))
    if kind == ATTENTION:
        qkv, output = parameters.linear(f"{name}.qkv"), parameters.linear(f"{name}.output")
        heads = build_heads(config, None, None, config.norm_eps)
        return Attention(qkv, output, heads, CacheRef(ATTENTION_GROUP, place))
    return _mlp(parameters, name) if kind == MLP else _experts(config, parameters, name)


def _mlp(parameters: Parameters, name: str) -> PlainMLP:
    return PlainMLP(parameters.linear(f"{name}.up"), parameters.linear(f"{name}.down"), squared_relu)


def _experts(config: NemotronHConfig, parameters: Parameters, name: str) -> MixtureOfExperts:
    assert config.experts is not None
    router, experts = build_routed(config.experts, parameters, name, squared_relu)
    shared = _mlp(parameters, f"{name}.shared")
    if not config.latent_size:
        return MixtureOfExperts(router, experts, shared)
    enter, leave = parameters.linear(f"{name}.enter"), parameters.linear(f"{name}.leave")
    return MixtureOfExperts(router, experts, shared, enter, leave)
