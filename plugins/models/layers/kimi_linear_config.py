"""The configuration of Kimi Linear, as its weight table and its layers use it."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.delta_shape import DeltaShape
from pie_plugins.models.layers.experts import ExpertSettings
from pie_plugins.models.layers.latent_decoder import LatentShape

LATENT_GROUP, STATE_GROUP = 0, 1


@dataclass(frozen=True, slots=True)
class KimiLinearConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    latent: LatentShape  # whose rotary part does not rotate
    delta: DeltaShape
    delta_layers: frozenset[int]
    experts: ExpertSettings

    def place(self, layer: int) -> int:
        """Among the layers of its kind."""
        before = sum(each in self.delta_layers for each in range(layer))
        return before if layer in self.delta_layers else layer - before
