"""The generic guests: components that take a program as source text.

`python_guest()` is the Python one. In a source checkout it is built on demand from `sdk/python` and the WIT, and again
whenever they change; a wheel carries it.
"""

from __future__ import annotations

from pathlib import Path

from pie_core.errors import ProgramError
from pie_core.guests.python_component import ARTIFACT, Progress, build_if_stale, is_buildable, print_progress

__all__ = ["python_guest"]


def python_guest(progress: Progress = print_progress) -> Path:
    """The component's file, up to date. Raises ProgramError where it is missing and cannot be built."""
    if is_buildable():
        return build_if_stale(progress)
    if not ARTIFACT.is_file():
        raise ProgramError(
            f"this installation of pie lacks the generic Python guest ({ARTIFACT}), so it cannot run Python inferlets; "
            "install pie again from a complete wheel, or work in a source checkout, which builds it"
        )
    return ARTIFACT
