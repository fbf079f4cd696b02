"""Rows of weight tables that decoders of several families share, in the names of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pie_plugins.models.weight_table import WeightTable, hf_source


class Vocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class Heads(Protocol):
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def add_ends(
    table: WeightTable, config: Vocabulary, embedding: str, norm: str, keep_float32: bool = False
) -> None:
    """The embedding, the last norm and the head, which may be the embedding again."""
    vocab, hidden = config.vocab_size, config.hidden_size
    table.take("embedding", hf_source(f"{embedding}.weight", vocab, hidden))
    table.take("norm", hf_source(f"{norm}.weight", hidden, keep_float32=keep_float32))
    if config.tie_word_embeddings:
        table.leave("lm_head.weight")
    else:
        table.take("head.weight", hf_source("lm_head.weight", vocab, hidden))


def add_fused(table: WeightTable, ours: str, hf: str, rows: Mapping[str, int], columns: int) -> None:
    """Matrices over the same input as one; `hf` has a place for the name of each."""
    sources = [hf_source(hf.format(name), count, columns) for name, count in rows.items()]
    table.fuse(f"{ours}.weight", sources)


def add_attention(
    table: WeightTable, config: Heads, ours: str, hf: str, name: str = "qkv", query_parts: int = 1
) -> None:
    """Projections of queries, keys and values as one, and the one behind; `query_parts`: 2 with a gate in each head."""
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    rows = {"q": query_parts * q_rows, "k": kv_rows, "v": kv_rows}
    add_fused(table, f"{ours}.{name}", f"{hf}.{{}}_proj.weight", rows, config.hidden_size)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", config.hidden_size, q_rows))


def add_norms(
    table: WeightTable, names: Mapping[str, str], size: int, ours: str, hf: str, keep_float32: bool = False
) -> None:
    """`names`: ours -> the hub's."""
    for name, stored in names.items():
        table.take(f"{ours}.{name}", hf_source(f"{hf}.{stored}.weight", size, keep_float32=keep_float32))


HEAD_NORMS = {"q_norm": "q_norm", "k_norm": "k_norm"}
PRE_NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
