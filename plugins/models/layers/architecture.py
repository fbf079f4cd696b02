"""What `ArchitectureDeclaration.load` returns: an `Architecture`, from which torch drivers build models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pie_plugins.models.weight_table import WeightTable

if TYPE_CHECKING:
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


CacheLayout = PagedLayout  # a union once there are latent and state groups


class ModelConfig(Protocol):
    """What every architecture's frozen configuration tells a driver."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


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


class Architecture(Protocol[C]):
    """Reads a configuration, names its weights and caches, and builds its layers."""

    def config(self, values: Mapping[str, Any], origin: str) -> C:
        """Reads a config.json, `origin` in messages. LoadError on keys that are missing, wrong or not implemented."""
        ...

    def cache_layouts(self, config: C) -> tuple[CacheLayout, ...]: ...

    def weights(self, config: C) -> WeightTable: ...

    def build(self, config: C, parameters: Parameters) -> Model: ...
