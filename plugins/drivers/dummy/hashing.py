"""The arithmetic that stands in for weights: 64-bit words, wrapping, the same in any order of the work."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

GROWTH = 0x9E3779B97F4A7C15  # odd, so its powers are never 0 and have inverses
_SHRINK = pow(GROWTH, -1, 2**64)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(words: Words) -> Words:
    """A bijection under which near words end far apart (the finalizer of SplitMix64)."""
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    return words ^ (words >> _31)


def digest_word(*parts: bytes | str) -> np.uint64:
    """One word for whatever the parts say."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return np.uint64(int.from_bytes(digest.digest(), "little"))


def uniform(words: Words, columns: int) -> NDArray[np.float32]:
    """[len(words), columns] numbers in [0, 1), each a function of its word and its column."""
    columns_word = np.arange(columns, dtype=np.uint32) * np.uint32(0x9E3779B1)
    low = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    bits = low[:, None] + columns_word
    bits ^= bits >> np.uint32(16)
    bits *= np.uint32(0x7FEB352D)
    bits ^= (words >> np.uint64(32)).astype(np.uint32)[:, None]
    bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0x846CA68B)
    bits >>= np.uint32(8)
    return bits.astype(np.float32) * np.float32(2.0**-24)


class Powers:
    """GROWTH ** n and its inverse, from tables that grow with the largest n asked for."""

    def __init__(self) -> None:
        self._up, self._down = _powers(GROWTH, 1024), _powers(_SHRINK, 1024)

    def up(self, exponents: NDArray[np.int64]) -> Words:
        self._cover(exponents)
        return self._up[exponents]

    def down(self, exponents: NDArray[np.int64]) -> Words:
        self._cover(exponents)
        return self._down[exponents]

    def _cover(self, exponents: NDArray[np.int64]) -> None:
        highest = int(exponents.max()) if exponents.size else 0
        if highest >= len(self._up):
            count = 1 << highest.bit_length()
            self._up, self._down = _powers(GROWTH, count), _powers(_SHRINK, count)


def _powers(base: int, count: int) -> Words:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
