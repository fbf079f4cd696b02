"""Rows of the weight table for vectors that every layer takes in for each token, in the names of the hub."""

from __future__ import annotations

from pie_plugins.models.weight_table import WeightTable, hf_source


def add_per_layer_embedding(
    table: WeightTable, vocab: int, width: int, hidden: int, size: int, hf: str
) -> None:
    """`width`: of the vectors of all layers; `size`: of one."""
    table.take("per_layer.table", hf_source(f"{hf}.embed_tokens_per_layer.weight", vocab, width))
    projection = hf_source(f"{hf}.per_layer_model_projection.weight", width, hidden)
    table.take("per_layer.projection.weight", projection)
    table.take("per_layer.norm", hf_source(f"{hf}.per_layer_projection_norm.weight", size))


def add_per_layer_input(table: WeightTable, hidden: int, size: int, ours: str, hf: str) -> None:
    table.take(f"{ours}.per_layer_gate.weight", hf_source(f"{hf}.per_layer_input_gate.weight", size, hidden))
    up = hf_source(f"{hf}.per_layer_projection.weight", hidden, size)
    table.take(f"{ours}.per_layer_projection.weight", up)
    table.take(f"{ours}.per_layer_norm", hf_source(f"{hf}.post_per_layer_input_norm.weight", hidden))
