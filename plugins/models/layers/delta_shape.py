"""The sizes of a delta rule layer, and its rows of the weight table."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.architecture import StatePart
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.weight_rows import add_fused
from pie_plugins.models.weight_table import WeightTable, hf_source


@dataclass(frozen=True, slots=True)
class DeltaShape:
    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head
    value_dim: int
    kernel: int  # rows that the convolution looks at

    @property
    def channels(self) -> int:
        """Of queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def state(self) -> tuple[StatePart, ...]:
        """What a layer keeps of a context."""
        matrix = (self.num_value_heads, self.key_dim, self.value_dim)
        return (
            StatePart("convolution", (self.kernel - 1, self.channels)),
            StatePart("matrix", matrix, keep_float32=True),
        )

    def check(self, keys: ConfigKeys) -> None:
        if self.kernel < 2 or self.num_key_heads < 1 or self.num_value_heads % self.num_key_heads:
            raise keys.error(
                f"linear_num_value_heads is {self.num_value_heads}, linear_num_key_heads {self.num_key_heads} and"
                f" linear_conv_kernel_dim {self.kernel}; expected a multiple of the key heads, and at least 2 rows"
            )


def read_gated_delta(keys: ConfigKeys) -> DeltaShape:
    """As Qwen's configurations say it."""
    shape = DeltaShape(
        num_key_heads=keys.integer("linear_num_key_heads"),
        num_value_heads=keys.integer("linear_num_value_heads"),
        key_dim=keys.integer("linear_key_head_dim"),
        value_dim=keys.integer("linear_value_head_dim"),
        kernel=keys.integer("linear_conv_kernel_dim"),
    )
    shape.check(keys)
    return shape


def add_gated_delta(table: WeightTable, shape: DeltaShape, hidden: int, ours: str, hf: str) -> None:
    heads, width = shape.num_value_heads, shape.num_value_heads * shape.value_dim
    rows = {"qkv": shape.channels, "z": width, "b": heads, "a": heads}
    add_fused(table, f"{ours}.projection", f"{hf}.in_proj_{{}}.weight", rows, hidden)
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.out_proj.weight", hidden, width))
    table.take(f"{ours}.convolution", hf_source(f"{hf}.conv1d.weight", shape.channels, 1, shape.kernel))
    table.take(f"{ours}.rate", hf_source(f"{hf}.A_log", heads, keep_float32=True))
    table.take(f"{ours}.rate_bias", hf_source(f"{hf}.dt_bias", heads, keep_float32=True))
    table.take(f"{ours}.norm", hf_source(f"{hf}.norm.weight", shape.value_dim))


def add_kimi_delta(table: WeightTable, shape: DeltaShape, hidden: int, ours: str, hf: str) -> None:
    heads, dim, width = shape.num_value_heads, shape.value_dim, shape.num_value_heads * shape.value_dim
    rows = {"q": width, "k": width, "v": width, "f_a": dim, "g_a": dim, "b": heads}
    add_fused(table, f"{ours}.projection", f"{hf}.{{}}_proj.weight", rows, hidden)
    convolutions = [hf_source(f"{hf}.{name}_conv1d.weight", width, 1, shape.kernel) for name in "qkv"]
    table.fuse(f"{ours}.convolution", convolutions)
    table.take(f"{ours}.decay.weight", hf_source(f"{hf}.f_b_proj.weight", width, dim))
    table.take(f"{ours}.gate.weight", hf_source(f"{hf}.g_b_proj.weight", width, dim))
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.o_proj.weight", hidden, width))
    table.take(f"{ours}.rate", hf_source(f"{hf}.A_log", 1, 1, heads, 1, keep_float32=True))
    table.take(f"{ours}.rate_bias", hf_source(f"{hf}.dt_bias", width, keep_float32=True))
    table.take(f"{ours}.norm", hf_source(f"{hf}.o_norm.weight", dim))
