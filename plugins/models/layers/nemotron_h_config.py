"""The configuration of Nemotron-H, as its weight table and its layers use it."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.experts import ExpertSettings
from pie_plugins.models.layers.mamba_shape import MambaShape

MAMBA, ATTENTION, MLP, MOE = "mamba", "attention", "mlp", "moe"
ATTENTION_GROUP, STATE_GROUP = 0, 1


@dataclass(frozen=True, slots=True)
class NemotronHConfig:
    vocab_size: int
    hidden_size: int
    layers: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    mamba: MambaShape
    experts: ExpertSettings | None
    latent_size: int  # of the rows that routed experts work on; 0 = hidden_size

    def place(self, layer: int) -> int:
        """Among the layers of its kind."""
        return self.layers[:layer].count(self.layers[layer])
