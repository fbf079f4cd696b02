"""Layers of two kinds, global ones and ones with a window, as configurations describe their heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pie_plugins.models.layers.config import ConfigKeys

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Of all layers of one kind."""

    num_kv_heads: int
    head_dim: int
    theta: float
    rotary_factor: float
    window: int | None
    keys_are_values: bool


def read_head_shapes(keys: ConfigKeys, layer_types: tuple[str, ...]) -> dict[str, HeadShape]:
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
