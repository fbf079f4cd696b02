"""The sizes of a delta rule layer."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.architecture import StatePart
from pie_plugins.models.layers.config import ConfigKeys


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
