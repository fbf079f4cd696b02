"""The decoder that the Llama family shares: its configuration, weight table, cache and build. Layers may hold experts.

A variant subclasses `DenseDecoder` and says in `read` which options its checkpoints use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pie_plugins.models.layers.architecture import PagedLayout
from pie_plugins.models.layers.axes_rope_settings import AXES, AxesRopeSettings
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.experts import ExpertSettings, add_experts, add_stacked_experts
from pie_plugins.models.layers.rope_settings import RopeSettings, read_rope
from pie_plugins.models.weight_table import Source, WeightTable

if TYPE_CHECKING:
    from pie_plugins.models.layers.decoder import Decoder
    from pie_plugins.models.layers.parameters import Parameters


@dataclass(frozen=True, slots=True)
class DenseConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeSettings | AxesRopeSettings
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    experts: ExpertSettings | None = None
    prefix: str = "model"  # of the tensors' names

    @property
    def position_axes(self) -> int:
        return AXES if isinstance(self.rope, AxesRopeSettings) else 1

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer in self.experts.layers


def read_dense(
    keys: ConfigKeys,
    *,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    rope: AxesRopeSettings | None = None,
) -> DenseConfig:
    """The keys that all members of the family share. `head_dim` is the default; None means hidden / heads."""
    hidden_size, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    keys.only("hidden_act", "silu")
    config = keys.into(
        DenseConfig,
        num_key_value_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", head_dim or hidden_size // max(heads, 1)),
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        rope=rope or read_rope(keys, rope_theta),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )
    _check(config, keys)
    return config


def _check(config: DenseConfig, keys: ConfigKeys) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        if getattr(config, name) < 1:
            raise keys.error(f"{name} is {getattr(config, name)}, expected at least 1")
    if config.num_key_value_heads < 1 or config.num_attention_heads % config.num_key_value_heads:
        raise keys.error(
            f"num_attention_heads is {config.num_attention_heads}, expected a multiple of num_key_value_heads"
            f" ({config.num_key_value_heads})"
        )
    if config.head_dim < 2 or config.head_dim % 2:
        raise keys.error(f"head_dim is {config.head_dim}, expected an even number")


@dataclass(frozen=True, slots=True)
class _Part:
    """One matrix of a checkpoint inside a fused one."""

    hf: str
    gguf: str
    rows: int
    gguf_heads: int = 0


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A linear layer of a decoder layer, as the checkpoint's parts."""

    name: str
    parts: tuple[_Part, ...]
    columns: int
    bias: bool

    def add_to(self, table: WeightTable, prefix: str, layer: int) -> None:
        shapes = {"weight": (self.columns,), "bias": ()} if self.bias else {"weight": (self.columns,)}
        for kind, columns in shapes.items():
            sources = [
                Source(
                    f"{prefix}.layers.{layer}.{part.hf}.{kind}",
                    f"blk.{layer}.{part.gguf}.{kind}",
                    (part.rows, *columns),
                    gguf_heads=part.gguf_heads,
                )
                for part in self.parts
            ]
            table.fuse(f"layers.{layer}.{self.name}.{kind}", sources)


class DenseDecoder:
    """An `Architecture`; a variant says in `read` which options its checkpoints use."""

    gguf_swaps_pairs = False  # llama.cpp keeps the rotary pairs of "llama" files side by side

    def read(self, keys: ConfigKeys) -> DenseConfig:
        raise NotImplementedError

    def config(self, values: Mapping[str, Any], origin: str) -> DenseConfig:
        keys = ConfigKeys(values, origin)
        config = self.read(keys)
        keys.finish()
        return config

    def cache_layouts(self, config: DenseConfig) -> tuple[PagedLayout, ...]:
        return (PagedLayout("kv", config.num_hidden_layers, config.num_key_value_heads, config.head_dim),)

    def weights(self, config: DenseConfig) -> WeightTable:
        table = WeightTable()
        vocab, hidden = config.vocab_size, config.hidden_size
        table.take(
            "embedding", Source(f"{config.prefix}.embed_tokens.weight", "token_embd.weight", (vocab, hidden))
        )
        for layer in range(config.num_hidden_layers):
            for matrix in self._attention(config):
                matrix.add_to(table, config.prefix, layer)
            self._feed_forward(table, config, layer)
            self._norms(table, config, layer)
        table.take("norm", Source(f"{config.prefix}.norm.weight", "output_norm.weight", (hidden,)))
        if config.tie_word_embeddings:
            table.leave("lm_head.weight")
        else:
            table.take("head.weight", Source("lm_head.weight", "output.weight", (vocab, hidden)))
        table.leave("*.rotary_emb.inv_freq", "rope_freqs.weight")  # both follow from the configuration
        return table

    def _attention(self, config: DenseConfig) -> tuple[_Matrix, ...]:
        hidden = config.hidden_size
        q, kv = config.num_attention_heads, config.num_key_value_heads
        q_rows, kv_rows = q * config.head_dim, kv * config.head_dim
        if not self.gguf_swaps_pairs:
            q = kv = 0
        qkv = (
            _Part("self_attn.q_proj", "attn_q", q_rows, q),
            _Part("self_attn.k_proj", "attn_k", kv_rows, kv),
            _Part("self_attn.v_proj", "attn_v", kv_rows),
        )
        output = (_Part("self_attn.o_proj", "attn_output", hidden),)
        return (
            _Matrix("qkv", qkv, hidden, config.qkv_bias),
            _Matrix("output", output, q_rows, config.output_bias),
        )

    def _feed_forward(self, table: WeightTable, config: DenseConfig, layer: int) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        if config.experts is not None and config.has_experts(layer):
            names = f"layers.{layer}", f"{config.prefix}.layers.{layer}.mlp"
            if config.experts.is_stacked:
                add_stacked_experts(table, config.experts, hidden, *names, True, gguf=f"blk.{layer}")
            else:
                add_experts(table, config.experts, hidden, *names, gguf=f"blk.{layer}")
            return
        gate_up = (_Part("mlp.gate_proj", "ffn_gate", inner), _Part("mlp.up_proj", "ffn_up", inner))
        _Matrix("gate_up", gate_up, hidden, config.mlp_bias).add_to(table, config.prefix, layer)
        down = (_Part("mlp.down_proj", "ffn_down", hidden),)
        _Matrix("down", down, inner, config.mlp_bias).add_to(table, config.prefix, layer)

    def _norms(self, table: WeightTable, config: DenseConfig, layer: int) -> None:
        hf, gguf, ours = f"{config.prefix}.layers.{layer}", f"blk.{layer}", f"layers.{layer}"
        hidden, dim = (config.hidden_size,), (config.head_dim,)
        table.take(
            f"{ours}.input_norm", Source(f"{hf}.input_layernorm.weight", f"{gguf}.attn_norm.weight", hidden)
        )
        table.take(
            f"{ours}.mlp_norm",
            Source(f"{hf}.post_attention_layernorm.weight", f"{gguf}.ffn_norm.weight", hidden),
        )
        if config.qk_norm:
            table.take(
                f"{ours}.q_norm",
                Source(f"{hf}.self_attn.q_norm.weight", f"{gguf}.attn_q_norm.weight", dim),
            )
            table.take(
                f"{ours}.k_norm",
                Source(f"{hf}.self_attn.k_norm.weight", f"{gguf}.attn_k_norm.weight", dim),
            )

    def build(self, config: DenseConfig, parameters: Parameters) -> Decoder:
        from pie_plugins.models.layers.dense_build import build_dense  # torch: not before a model is built

        return build_dense(config, parameters)
