"""The examples at the end of every `--help`."""

from __future__ import annotations


def examples(*commands: str) -> str:
    """One command a line; the \\b keeps them from being joined."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])
