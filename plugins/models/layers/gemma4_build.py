"""Gemma 4's layers, built from its configuration and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.build import build_norm, with_key_norm
from pie_plugins.models.layers.decoder import Part
from pie_plugins.models.layers.gemma4_config import Gemma4Config
from pie_plugins.models.layers.head_shapes import SLIDING
from pie_plugins.models.layers.mlp import GatedMLP, gelu_gated
from pie_plugins.models.layers.moe import Experts
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.normed_value_attention import NormedValueAttention
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.per_layer_embedding import (
    build_per_layer_embedding,
    build_per_layer_input,
)
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.rope_variants import frequencies, proportional_rope
from pie_plugins.models.layers.router import ScaledRouter
from pie_plugins.models.layers.sandwich import (
    MlpBesideExperts,
    NormedPart,
    SandwichDecoder,
    SandwichLayer,
)
from pie_plugins.models.layers.step import AttentionHeads, CacheRef


def build_gemma4(config: Gemma4Config, parameters: Parameters) -> SandwichDecoder:
    return _Builder(config, parameters).decoder()


class _Builder:
    def __init__(self, config: Gemma4Config, parameters: Parameters) -> None:
        self._config, self._parameters = config, parameters
        self._ropes = {kind: self._rope(kind) for kind in config.kinds()}

    def decoder(self) -> SandwichDecoder:
        embedding, size = self._parameters.tensor("embedding"), self._config.per_layer_size
        eps = self._config.rms_norm_eps
        return SandwichDecoder(
            embedding=embedding,
            per_layer=build_per_layer_embedding(self._parameters, size, eps) if size else None,
            layers=tuple(self._layer(layer) for layer in range(self._config.num_layers)),
            norm=self._norm("norm"),
            head=self._parameters.tied_linear(embedding),
            soft_cap=self._config.soft_cap,
        )

    def _layer(self, layer: int) -> SandwichLayer:
        name, eps = f"layers.{layer}", self._config.rms_norm_eps
        takes_in = bool(self._config.per_layer_size)
        return SandwichLayer(
            mixer=NormedPart(self._norm(f"{name}.input_layernorm"), self._attention(layer)),
            mixer_norm=self._norm(f"{name}.post_attention_layernorm"),
            feed_forward=self._feed_forward(name),
            feed_forward_norm=self._norm(f"{name}.post_feedforward_layernorm"),
            per_layer=build_per_layer_input(self._parameters, name, eps) if takes_in else None,
            scalar=self._parameters.tensor(f"{name}.scalar"),
        )

    def _norm(self, name: str) -> RMSNorm:
        return build_norm(self._parameters, name, self._config.rms_norm_eps)

    def _rope(self, kind: str) -> Rope:
        shape = self._config.shapes[kind]
        if kind == SLIDING:
            return Rope(frequencies(shape.theta, shape.head_dim))
        return proportional_rope(shape.theta, shape.head_dim, shape.rotary_factor)

    def _attention(self, layer: int) -> NormedValueAttention:
        config, name = self._config, f"layers.{layer}"
        kind, writer = config.layer_types[layer], config.writer(layer)
        shape, reads_only = config.shapes[kind], writer != layer
        norm = self._parameters.tensor(f"{name}.q_norm").expand(config.num_attention_heads, -1)
        if not reads_only:
            norm = with_key_norm(norm, self._parameters.tensor(f"{name}.k_norm"), shape.num_kv_heads)
        return NormedValueAttention(
            projection=self._parameters.linear(f"{name}.projection"),
            output=self._parameters.linear(f"{name}.output"),
            heads=AttentionHeads(
                num_heads=config.num_attention_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                norm=norm,
                norm_eps=config.rms_norm_eps,
                rope=self._ropes[kind],
                scale=1.0,
                reads_only=reads_only,
            ),
            cache=CacheRef(config.kinds().index(kind), config.place(writer)),
            value_norm=norm.new_ones(shape.head_dim),
        )

    def _feed_forward(self, name: str) -> Part:
        parameters = self._parameters
        gate_up, down = parameters.linear(f"{name}.mlp.gate_up"), parameters.linear(f"{name}.mlp.down")
        mlp = GatedMLP(gate_up, down, gelu_gated)
        normed = NormedPart(self._norm(f"{name}.pre_feedforward_layernorm"), mlp)
        return self._beside_experts(name, normed) if self._config.num_experts else normed

    def _beside_experts(self, name: str, mlp: NormedPart) -> MlpBesideExperts:
        config, tensor = self._config, self._parameters.tensor
        return MlpBesideExperts(
            mlp=mlp,
            mlp_norm=self._norm(f"{name}.post_feedforward_layernorm_1"),
            router=ScaledRouter(
                weight=tensor(f"{name}.router"),
                scale=tensor(f"{name}.router_scale") * config.hidden_size**-0.5,
                expert_scale=tensor(f"{name}.expert_scale"),
                eps=config.rms_norm_eps,
                experts_per_token=config.experts_per_token,
            ),
            experts=Experts(tensor(f"{name}.experts.gate_up"), tensor(f"{name}.experts.down"), gelu_gated),
            experts_input_norm=self._norm(f"{name}.pre_feedforward_layernorm_2"),
            experts_norm=self._norm(f"{name}.post_feedforward_layernorm_2"),
        )
