"""The sizes of a Mamba 2 layer, and its rows of the weight table."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.architecture import StatePart
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.weight_table import WeightTable, hf_source

UNLIMITED = 1e30  # JSON has no infinity: published files write large numbers


@dataclass(frozen=True, slots=True)
class MambaShape:
    num_heads: int
    head_dim: int
    num_groups: int  # of heads that share what they write with and read with
    state_size: int
    kernel: int  # rows that the convolution looks at
    has_bias: bool  # of the convolution

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """That go through the convolution."""
        return self.width + 2 * self.num_groups * self.state_size

    def state(self) -> tuple[StatePart, ...]:
        """What a layer keeps of a context."""
        matrix = (self.num_heads, self.state_size, self.head_dim)
        return (
            StatePart("convolution", (self.kernel - 1, self.channels)),
            StatePart("matrix", matrix, keep_float32=True),
        )


def read_mamba(keys: ConfigKeys) -> MambaShape:
    shape = MambaShape(
        num_heads=keys.integer("mamba_num_heads"),
        head_dim=keys.integer("mamba_head_dim"),
        num_groups=keys.integer("n_groups"),
        state_size=keys.integer("ssm_state_size"),
        kernel=keys.integer("conv_kernel"),
        has_bias=keys.flag("use_conv_bias", True),
    )
    if shape.kernel < 2 or shape.num_groups < 1 or shape.num_heads % shape.num_groups:
        raise keys.error(
            f"mamba_num_heads is {shape.num_heads}, n_groups {shape.num_groups} and conv_kernel {shape.kernel};"
            " expected a multiple of the groups, and at least 2 rows"
        )
    limit = keys.numbers("time_step_limit") if keys.has("time_step_limit") else (0.0, UNLIMITED)
    if limit[0] != 0 or limit[-1] < UNLIMITED:
        raise keys.error(f"time_step_limit is {limit}, implemented is none: 0 to infinity")
    return shape


def add_mamba(table: WeightTable, shape: MambaShape, hidden: int, ours: str, hf: str) -> None:
    rows = shape.width + shape.channels + shape.num_heads
    table.take(f"{ours}.projection.weight", hf_source(f"{hf}.in_proj.weight", rows, hidden))
    table.take(f"{ours}.output.weight", hf_source(f"{hf}.out_proj.weight", hidden, shape.width))
    table.take(f"{ours}.convolution", hf_source(f"{hf}.conv1d.weight", shape.channels, 1, shape.kernel))
    if shape.has_bias:
        table.take(f"{ours}.convolution_bias", hf_source(f"{hf}.conv1d.bias", shape.channels))
    for name, stored in (("rate", "A_log"), ("time_bias", "dt_bias"), ("skip", "D")):
        table.take(f"{ours}.{name}", hf_source(f"{hf}.{stored}", shape.num_heads, keep_float32=True))
    table.take(f"{ours}.norm", hf_source(f"{hf}.norm.weight", shape.width))
