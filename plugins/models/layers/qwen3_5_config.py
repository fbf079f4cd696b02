"""The configuration of Qwen3.5, as its weight table and its layers use it."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.axes_rope_settings import AXES, AxesRopeSettings
from pie_plugins.models.layers.delta_shape import DeltaShape
from pie_plugins.models.layers.experts import ExpertSettings

FULL, LINEAR = "full_attention", "linear_attention"
ATTENTION_GROUP, STATE_GROUP = 0, 1


@dataclass(frozen=True, slots=True)
class Qwen35Config:
    prefix: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the dense models
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: AxesRopeSettings
    layer_types: tuple[str, ...]
    delta: DeltaShape
    experts: ExpertSettings | None
    position_axes: int = AXES

    def place(self, layer: int) -> int:
        """Among the layers of its kind."""
        return self.layer_types[:layer].count(self.layer_types[layer])
