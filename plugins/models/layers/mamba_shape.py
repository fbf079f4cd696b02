"""The sizes of a Mamba 2 layer."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.architecture import StatePart
from pie_plugins.models.layers.config import ConfigKeys


@dataclass(frozen=True, slots=True)
class MambaShape:
    num_heads: int
    head_dim: int
    num_groups: int  # of heads that share what they write with and read with
    state_size: int
    kernel: int  # rows that the convolution looks at

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

    def check(self, keys: ConfigKeys) -> None:
        if self.kernel < 2 or self.num_groups < 1 or self.num_heads % self.num_groups:
            raise keys.error(
                f"mamba_num_heads is {self.num_heads}, n_groups {self.num_groups} and conv_kernel {self.kernel};"
                " expected a multiple of the groups, and at least 2 rows"
            )
