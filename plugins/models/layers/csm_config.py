"""The configuration of CSM, as its weight table and its layers use it."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.dense import DenseConfig


@dataclass(frozen=True, slots=True)
class CsmConfig:
    backbone: DenseConfig  # its vocabulary is that of codes
    depth: DenseConfig
    streams: int
    text_vocab_size: int

    @property
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    @property
    def input_vocab_size(self) -> int:
        return self.backbone.vocab_size + self.text_vocab_size

    @property
    def hidden_size(self) -> int:
        return self.backbone.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        return self.backbone.max_position_embeddings
