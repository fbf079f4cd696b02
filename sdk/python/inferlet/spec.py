"""Speculative decoding by the program's own drafts. This version declares it and does not apply it yet."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Speculator(Protocol):
    """Guesses what the model will draw; a guess is kept only if the model draws it too."""

    def draft(self) -> tuple[list[int], list[int]]: ...

    def accept(self, tokens: list[int]) -> None: ...

    def rollback(self, count: int) -> None: ...

    def reset(self) -> None: ...
