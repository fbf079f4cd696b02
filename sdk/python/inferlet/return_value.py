"""A return value that is set from anywhere in the program instead of returned by `main`."""

from __future__ import annotations

_value: str | None = None


def set_return(value: str) -> None:
    """What the program returns if `main` returns None; the last call wins."""
    global _value
    _value = value


def get_return_value() -> str | None:
    """What `set_return` was last given."""
    return _value
