"""What the probes of a step found, joined as a ForwardResult has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Float32, Int32, Int64

V = TypeVar("V", bound=np.generic)


@dataclass(frozen=True, slots=True)
class ProbeValues:
    """The ragged answers of all probes."""

    indptr: Int64
    values: Float32
    token_indptr: Int64
    tokens: Int32
    failed: frozenset[int]  # probes whose values are not numbers


_NOTHING_PROBED = ProbeValues(
    np.zeros(1, np.int64), np.empty(0, np.float32), np.zeros(1, np.int64), np.empty(0, np.int32), frozenset()
)


def joined_probes(values: Sequence[Float32], tokens: Sequence[Int32]) -> ProbeValues:
    """Of each probe its values, and the tokens that these are of where it does not name them; copies."""
    if not values:
        return _NOTHING_PROBED
    failed = frozenset(probe for probe, answer in enumerate(values) if np.isnan(answer).any())
    return ProbeValues(*_ragged(values), *_ragged(tokens), failed)


def _ragged(parts: Sequence[NDArray[V]]) -> tuple[Int64, NDArray[V]]:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64), np.concatenate(parts)
