"""What a context consists of: its tokens, their positions, and the attention masks of those rows that have one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pie_core.contracts.forward import Int32


class History:
    """Rows in the order they were given. Growing arrays, so that a step takes slices and no row is an object."""

    __slots__ = ("_positions", "_tokens", "length", "masks", "position")

    def __init__(self) -> None:
        self._tokens: Int32 = np.empty(16, np.int32)
        self._positions: Int32 = np.empty(16, np.int32)
        self.length = 0
        self.position = 0  # the next row's, unless it says otherwise: the greatest so far + 1
        self.masks: dict[int, Int32] = {}  # row -> run lengths over rows; rows without are causal

    def rows(self, start: int, stop: int) -> tuple[Int32, Int32]:
        """Tokens and positions."""
        return self._tokens[start:stop], self._positions[start:stop]

    @property
    def tokens(self) -> Int32:
        return self._tokens[: self.length]

    @property
    def positions(self) -> Int32:
        return self._positions[: self.length]

    def append(self, token: int) -> None:
        """One row at the next position."""
        self._make_room(self.length + 1)
        self._tokens[self.length] = token
        self._positions[self.length] = self.position
        self.length += 1
        self.position += 1

    def extend(
        self, tokens: Sequence[int], positions: Sequence[int] | None = None, masks: Sequence[Int32] = ()
    ) -> None:
        """Rows at these positions, or at the next ones; with a mask for each or for none."""
        if positions is None and len(tokens) == 1 and not masks:
            self.append(tokens[0])
            return
        start, stop = self.length, self.length + len(tokens)
        if positions is None:
            positions = range(self.position, self.position + len(tokens))
        self._make_room(stop)
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = positions
        self.masks.update(zip(range(start, stop), masks, strict=False))
        self.length = stop
        self.position = max(self.position, max(positions) + 1)

    def extend_next(self, tokens: Int32) -> None:
        """Rows at the next positions."""
        start, stop = self.length, self.length + len(tokens)
        self._make_room(stop)
        self._tokens[start:stop] = tokens
        self._positions[start:stop] = np.arange(self.position, self.position + len(tokens))
        self.length = stop
        self.position += len(tokens)

    def truncate(self, length: int) -> None:
        if length == self.length:
            return
        self.length = length
        self.position = int(self.positions.max()) + 1 if length else 0
        if self.masks:
            self.masks = {row: runs for row, runs in self.masks.items() if row < length}

    def copy(self) -> History:
        other = History()
        other._tokens, other._positions = self.tokens.copy(), self.positions.copy()
        other.length, other.position, other.masks = self.length, self.position, dict(self.masks)
        return other

    def _make_room(self, length: int) -> None:
        if length > len(self._tokens):
            size = max(length, 2 * len(self._tokens), 16)
            self._tokens, self._positions = _enlarged(self._tokens, size), _enlarged(self._positions, size)


def _enlarged(values: Int32, size: int) -> Int32:
    larger = np.empty(size, np.int32)
    larger[: len(values)] = values
    return larger
