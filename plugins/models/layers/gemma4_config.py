"""The configuration of Gemma 4, as its weight table and its layers use it."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.windowed_layers import WindowedLayers


@dataclass(frozen=True, slots=True)
class Gemma4Config:
    prefix: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    layers: WindowedLayers
    widens_reading_layers: bool
    per_layer_size: int  # 0 = no per-layer vectors
    soft_cap: float | None
    num_experts: int  # 0 = none
    experts_per_token: int
    expert_size: int
    tie_word_embeddings: bool = True  # the only way it is implemented

    def mlp_size(self, layer: int) -> int:
        doubled = self.widens_reading_layers and layer >= self.layers.num_writing
        return 2 * self.intermediate_size if doubled else self.intermediate_size
