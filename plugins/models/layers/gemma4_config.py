"""The configuration of Gemma 4, as its weight table and its layers use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pie_plugins.models.layers.head_shapes import FULL, SLIDING, HeadShape

GROUPS = {FULL: "full", SLIDING: "window"}


@dataclass(frozen=True, slots=True)
class Gemma4Config:
    prefix: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    shapes: Mapping[str, HeadShape]  # by layer type
    num_writing_layers: int  # those behind them read what these have written
    widens_reading_layers: bool
    per_layer_size: int  # 0 = no per-layer vectors
    soft_cap: float | None
    num_experts: int  # 0 = none
    experts_per_token: int
    expert_size: int
    tie_word_embeddings: bool = True  # the only way it is implemented

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def writer(self, layer: int) -> int:
        """The layer whose keys and values this one attends to."""
        if layer < self.num_writing_layers:
            return layer
        kind, writers = self.layer_types[layer], self.layer_types[: self.num_writing_layers]
        return max(place for place, each in enumerate(writers) if each == kind)

    def place(self, layer: int) -> int:
        """Of a writing layer, among those of its kind."""
        return self.layer_types[:layer].count(self.layer_types[layer])

    def mlp_size(self, layer: int) -> int:
        doubled = self.widens_reading_layers and layer >= self.num_writing_layers
        return 2 * self.intermediate_size if doubled else self.intermediate_size

    def kinds(self) -> tuple[str, ...]:
        """In the order of their cache groups."""
        return tuple(kind for kind in (FULL, SLIDING) if kind in self.layer_types)
