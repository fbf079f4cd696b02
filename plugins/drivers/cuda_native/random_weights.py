"""Weights of a configuration's shapes, drawn on the device: for measuring models whose files are not at hand."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pie_plugins.models.weight_table import Entry, WeightTable

SEED = 7
SPREAD = 0.02


def draw_weights(table: WeightTable, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Matrices are normal, norms are one."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    drawn = {}
    for entry in table.entries:
        for target, shape in _shapes(entry):
            values = torch.ones(shape, dtype=dtype, device=device)
            drawn[target] = values.normal_(0, SPREAD, generator=generator) if len(shape) > 1 else values
    return drawn


def outline_weights(table: WeightTable, dtype: torch.dtype) -> dict[str, Tensor]:
    """Their shapes and types alone; vectors as they are, for they are small and some are joined."""
    outlines = {}
    for entry in table.entries:
        kept = torch.float32 if any(source.keep_float32 for source in entry.sources) else dtype
        for target, shape in _shapes(entry):
            outlines[target] = torch.empty(shape, dtype=kept, device="meta" if len(shape) > 1 else "cpu")
    return outlines


def _shapes(entry: Entry) -> Iterator[tuple[str, tuple[int, ...]]]:
    first = entry.sources[0].shape
    if entry.rows:
        yield from (
            (target, (rows, *first[1:])) for target, rows in zip(entry.targets, entry.rows, strict=True)
        )
    elif entry.join == "stack":
        yield entry.targets[0], (len(entry.sources), *first)
    else:
        yield entry.targets[0], (sum(source.shape[0] for source in entry.sources), *first[1:])
