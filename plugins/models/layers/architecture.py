"""What `ArchitectureDeclaration.load` returns: an `Architecture`, from which torch drivers build models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from pie_plugins.models.weight_table import WeightTable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pie_plugins.models.layers.parameters import Parameters
    from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """One cache group of keys and values by head; `window` limits how far back its layers look."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def row(self) -> tuple[int, ...]:
        """What one token keeps in one layer."""
        return 2, self.num_kv_heads, self.head_dim


@dataclass(frozen=True, slots=True)
class LatentLayout:
    """One cache group of rows that all heads share."""

    name: str
    num_layers: int
    width: int
    window: ClassVar[None] = None

    @property
    def row(self) -> tuple[int, ...]:
        return (self.width,)


RowsLayout = PagedLayout | LatentLayout


@dataclass(frozen=True, slots=True)
class StatePart:
    """One tensor of a layer's recurrent state."""

    name: str
    shape: tuple[int, ...]
    keep_float32: bool = False  # what is summed up over a whole context, whatever dtype the model runs in

    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        import torch

        return torch.float32 if self.keep_float32 else dtype


@dataclass(frozen=True, slots=True)
class StateLayout:
    """One cache group of recurrent state: for each context a slot, whatever its length."""

    name: str
    num_layers: int
    parts: tuple[StatePart, ...]


CacheLayout = RowsLayout | StateLayout


class ModelConfig(Protocol):
    """What every architecture's frozen configuration tells a driver."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@runtime_checkable
class WithPositionAxes(Protocol):
    """A configuration whose positions have several axes."""

    @property
    def position_axes(self) -> int: ...


@runtime_checkable
class WithStreams(Protocol):
    """A configuration whose tokens have several columns."""

    @property
    def streams(self) -> int: ...

    @property
    def input_vocab_size(self) -> int:
        """Of what may be fed: at least `vocab_size`, which is what each column is drawn from."""
        ...


def streams(config: ModelConfig) -> int:
    return config.streams if isinstance(config, WithStreams) else 1


def position_axes(config: ModelConfig) -> int:
    return config.position_axes if isinstance(config, WithPositionAxes) else 1


class Model(Protocol):
    """A built model. It keeps no state of its own: caches and positions are the step's."""

    def hidden(self, step: Step) -> Tensor:
        """[tokens, hidden_size]: the residual stream behind the last layer."""
        ...

    def normalized(self, hidden: Tensor, step: Step) -> Tensor:
        """The final norm, for the rows that somebody asks about."""
        ...

    def logits(self, normalized: Tensor, step: Step) -> Tensor:
        """[rows, vocab_size]"""
        ...


C = TypeVar("C", bound=ModelConfig)


class Columns(Protocol):
    """The columns of some rows' next tokens, behind the first one, which `Model.logits` is for."""

    def logits(self, column: int, tokens: Tensor, step: Step) -> Tensor:
        """[rows, vocab_size] of the next column, `tokens` [rows] being what was drawn for the one before."""
        ...


@runtime_checkable
class StreamModel(Model, Protocol):
    """A model whose tokens have several columns, drawn one after the other."""

    def columns(self, normalized: Tensor) -> Columns: ...


class Architecture(Protocol[C]):
    """Reads a configuration, names its weights and caches, and builds its layers."""

    def config(self, values: Mapping[str, Any], origin: str) -> C:
        """Reads a config.json, `origin` in messages. LoadError on keys that are missing, wrong or not implemented."""
        ...

    def cache_layouts(self, config: C) -> tuple[CacheLayout, ...]: ...

    def weights(self, config: C) -> WeightTable: ...

    def build(self, config: C, parameters: Parameters) -> Model: ...
