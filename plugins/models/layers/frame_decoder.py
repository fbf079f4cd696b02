"""A decoder over frames: tokens of several columns, beside rows of text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.decoder import Decoder
from pie_plugins.models.layers.depth_decoder import DepthColumns, DepthDecoder
from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True, eq=False)
class FrameDecoder:
    """A frame's embedding is the sum of its columns'. In the first column, ids past the codes' are text."""

    backbone: Decoder  # its embedding is that of text
    depth: DepthDecoder

    def hidden(self, step: Step) -> Tensor:
        return self.backbone.layers_over(self._embedded(step), step)

    def normalized(self, hidden: Tensor, step: Step) -> Tensor:
        return self.backbone.normalized(hidden, step)

    def logits(self, normalized: Tensor, step: Step) -> Tensor:
        return self.backbone.logits(normalized, step)

    def columns(self, normalized: Tensor) -> DepthColumns:
        return self.depth.columns(normalized)

    def _embedded(self, step: Step) -> Tensor:
        codes, table = self.depth.vocab_size, self.depth.table
        text = step.token_ids[:, 0] - codes
        is_text = text >= 0
        frames = step.token_ids.where(~is_text[:, None], 0)
        offsets = torch.arange(frames.shape[1], device=frames.device) * codes
        summed = table.index_select(0, (frames + offsets).flatten()).unflatten(0, frames.shape).sum(1)
        words = self.backbone.embedding.index_select(0, text.clamp(min=0))
        return torch.where(is_text[:, None], words, summed)
