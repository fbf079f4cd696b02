"""Layers of two kinds, global ones and ones with a window, some of which only read what earlier ones have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pie_plugins.models.layers.architecture import PagedLayout
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.weight_rows import add_fused, add_norms
from pie_plugins.models.weight_table import WeightTable, hf_source

FULL, SLIDING = "full_attention", "sliding_attention"
GROUPS = {FULL: "full", SLIDING: "window"}


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of all layers of one kind."""

    num_kv_heads: int
    head_dim: int
    theta: float
    rotary_factor: float
    window: int | None
    keys_are_values: bool


@dataclass(frozen=True, slots=True)
class WindowedLayers:
    types: tuple[str, ...]
    shapes: Mapping[str, HeadShape]  # by type
    num_heads: int
    num_writing: int  # those behind them read what these have written

    def __len__(self) -> int:
        return len(self.types)

    def shape(self, layer: int) -> HeadShape:
        return self.shapes[self.types[layer]]

    def writer(self, layer: int) -> int:
        """The layer whose keys and values this one attends to."""
        if layer < self.num_writing:
            return layer
        kind, writers = self.types[layer], self.types[: self.num_writing]
        return max(place for place, each in enumerate(writers) if each == kind)

    def place(self, layer: int) -> tuple[int, int]:
        """Of the keys and values that a layer attends to: their cache group, and the layer within it."""
        kind, writer = self.types[layer], self.writer(layer)
        return self.kinds().index(kind), self.types[:writer].count(kind)

    def kinds(self) -> tuple[str, ...]:
        """In the order of their cache groups."""
        return tuple(kind for kind in GROUPS if kind in self.types)

    def layouts(self) -> tuple[PagedLayout, ...]:
        written = self.types[: self.num_writing]
        shapes = [(kind, self.shapes[kind]) for kind in self.kinds()]
        return tuple(
            PagedLayout(GROUPS[kind], written.count(kind), shape.num_kv_heads, shape.head_dim, shape.window)
            for kind, shape in shapes
        )


def read_windowed_layers(keys: ConfigKeys) -> WindowedLayers:
    count, types = keys.integer("num_hidden_layers"), keys.texts("layer_types") or ()
    writing = count - keys.integer("num_kv_shared_layers", 0)
    if len(types) != count or set(types) - GROUPS.keys():
        raise keys.error(f"layer_types is {types}, expected {count} of {' and '.join(GROUPS)}")
    if set(types) - set(types[: max(writing, 0)]):
        raise keys.error(
            f"num_kv_shared_layers leaves {writing} layers that write keys and values, which are not of every type"
        )
    return WindowedLayers(types, _read_shapes(keys, types), keys.integer("num_attention_heads"), writing)


def add_windowed_attention(
    table: WeightTable, layers: WindowedLayers, layer: int, hidden: int, ours: str, hf: str
) -> None:
    """Queries, and keys and values of layers that write some; values only where keys are not values too."""
    shape = layers.shape(layer)
    q_rows, kv_rows = layers.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    rows, norms = {"q": q_rows}, {"q_norm": "q_norm"}
    if layers.writer(layer) == layer:
        rows |= {"k": kv_rows} if shape.keys_are_values else {"k": kv_rows, "v": kv_rows}
        norms |= {"k_norm": "k_norm"}
    else:
        table.leave(*(f"{hf}.{name}.weight" for name in ("k_proj", "v_proj", "k_norm", "v_norm")))
    add_norms(table, norms, shape.head_dim, ours, hf)
    add_fused(table, f"{ours}.projection", f"{hf}.{{}}_proj.weight", rows, hidden)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, q_rows))


def _read_shapes(keys: ConfigKeys, layer_types: tuple[str, ...]) -> dict[str, HeadShape]:
    kv_heads, equal = keys.integer("num_key_value_heads"), keys.flag("attention_k_eq_v", False)
    global_head_dim, global_kv_heads = _global_heads(keys, layer_types, kv_heads)
    ropes = keys.section("rope_parameters")
    if ropes is None:
        raise keys.error("rope_parameters is missing; expected one mapping for each layer type")
    full, sliding = ropes.section(FULL), ropes.section(SLIDING)
    if full is None or sliding is None:
        raise ropes.error(f"expected mappings for {FULL} and {SLIDING}")
    full.only("rope_type", "proportional")
    sliding.only("rope_type", "default")
    sliding.only("partial_rotary_factor", 1.0)
    shapes = {
        FULL: HeadShape(
            num_kv_heads=global_kv_heads if equal else kv_heads,
            head_dim=global_head_dim,
            theta=full.number("rope_theta"),
            rotary_factor=full.number("partial_rotary_factor"),
            window=None,
            keys_are_values=equal,
        ),
        SLIDING: HeadShape(
            num_kv_heads=kv_heads,
            head_dim=keys.integer("head_dim"),
            theta=sliding.number("rope_theta"),
            rotary_factor=1.0,
            window=keys.integer("sliding_window"),
            keys_are_values=False,
        ),
    }
    for section in (full, sliding, ropes):
        section.finish()
    _check(shapes, keys)
    return shapes


def _check(shapes: Mapping[str, HeadShape], keys: ConfigKeys) -> None:
    heads = keys.integer("num_attention_heads")
    for kind, shape in shapes.items():
        if shape.num_kv_heads < 1 or heads % shape.num_kv_heads:
            raise keys.error(
                f"num_key_value_heads (num_global_key_value_heads for {FULL}, with attention_k_eq_v) is"
                f" {shape.num_kv_heads} for {kind}, expected a divisor of num_attention_heads ({heads})"
            )


def _global_heads(keys: ConfigKeys, layer_types: tuple[str, ...], kv_heads: int) -> tuple[int, int]:
    """Head size and key heads of global layers: published once, written out for each layer by transformers."""
    written_out = keys.section("per_layer_config")
    if written_out is None:
        return keys.integer("global_head_dim"), keys.integer("num_global_key_value_heads", kv_heads)
    found = set()
    for layer in (layer for layer, kind in enumerate(layer_types) if kind == FULL):
        section = written_out.section(str(layer))
        if section is None:
            raise written_out.error(f"layer {layer} is missing")
        found.add((section.integer("head_dim"), section.integer("num_key_value_heads", kv_heads)))
        section.finish()
    written_out.finish()
    if len(found) != 1:
        raise written_out.error(f"global layers differ: (head_dim, num_key_value_heads) are {sorted(found)}")
    return found.pop()
