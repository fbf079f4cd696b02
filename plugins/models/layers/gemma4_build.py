"""Gemma 4's layers, built from its configuration and parameters."""

from __future__ import annotations

from collections.abc import Mapping

from pie_plugins.models.layers.build import build_norm
from pie_plugins.models.layers.decoder import Part
from pie_plugins.models.layers.gemma4_config import Gemma4Config
from pie_plugins.models.layers.mlp import GatedMLP, gelu_gated
from pie_plugins.models.layers.moe import Experts
from pie_plugins.models.layers.normed_value_attention import build_normed_value_attention, layer_rope
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.per_layer_embedding import build_per_layer_embedding, build_per_layer_input
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.router import ScaledRouter
from pie_plugins.models.layers.sandwich import MlpBesideExperts, NormedPart, SandwichDecoder, SandwichLayer


def build_gemma4(config: Gemma4Config, parameters: Parameters) -> SandwichDecoder:
    embedding, size, eps = parameters.tensor("embedding"), config.per_layer_size, config.rms_norm_eps
    ropes = {kind: layer_rope(config.layers.shapes[kind]) for kind in config.layers.kinds()}
    return SandwichDecoder(
        embedding=embedding,
        per_layer=build_per_layer_embedding(parameters, size, eps) if size else None,
        layers=tuple(_layer(config, parameters, ropes, layer) for layer in range(len(config.layers))),
        norm=build_norm(parameters, "norm", eps),
        head=parameters.tied_linear(embedding),
        soft_cap=config.soft_cap,
    )


def _layer(
    config: Gemma4Config, parameters: Parameters, ropes: Mapping[str, Rope], layer: int
) -> SandwichLayer:
    name, eps, rope = f"layers.{layer}", config.rms_norm_eps, ropes[config.layers.types[layer]]
    attention = build_normed_value_attention(config.layers, layer, parameters, rope, eps)
    return SandwichLayer(
        mixer=NormedPart(build_norm(parameters, f"{name}.input_layernorm", eps), attention),
        mixer_norm=build_norm(parameters, f"{name}.post_attention_layernorm", eps),
        feed_forward=_feed_forward(config, parameters, name),
        feed_forward_norm=build_norm(parameters, f"{name}.post_feedforward_layernorm", eps),
        per_layer=build_per_layer_input(parameters, name, eps) if config.per_layer_size else None,
        scalar=parameters.tensor(f"{name}.scalar"),
    )


def _feed_forward(config: Gemma4Config, parameters: Parameters, name: str) -> Part:
    gate_up, down = parameters.linear(f"{name}.mlp.gate_up"), parameters.linear(f"{name}.mlp.down")
    norm = build_norm(parameters, f"{name}.pre_feedforward_layernorm", config.rms_norm_eps)
    normed = NormedPart(norm, GatedMLP(gate_up, down, gelu_gated))
    return _beside_experts(config, parameters, name, normed) if config.num_experts else normed


def _beside_experts(
    config: Gemma4Config, parameters: Parameters, name: str, mlp: NormedPart
) -> MlpBesideExperts:
    tensor, eps = parameters.tensor, config.rms_norm_eps
    return MlpBesideExperts(
        mlp=mlp,
        mlp_norm=build_norm(parameters, f"{name}.post_feedforward_layernorm_1", eps),
        router=ScaledRouter(
            weight=tensor(f"{name}.router"),
            scale=tensor(f"{name}.router_scale") * config.hidden_size**-0.5,
            expert_scale=tensor(f"{name}.expert_scale"),
            eps=eps,
            experts_per_token=config.experts_per_token,
        ),
        experts=Experts(tensor(f"{name}.experts.gate_up"), tensor(f"{name}.experts.down"), gelu_gated),
        experts_input_norm=build_norm(parameters, f"{name}.pre_feedforward_layernorm_2", eps),
        experts_norm=build_norm(parameters, f"{name}.post_feedforward_layernorm_2", eps),
    )
