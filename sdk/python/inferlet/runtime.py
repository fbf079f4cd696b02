"""Where the program runs: versions, names, and the server's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wit_world.imports import logging, runtime

from inferlet import children
from inferlet.children import Child
from inferlet.host import call


def version() -> str:
    """The version of pie."""
    return runtime.version()


def instance_id() -> str:
    """The id of this running program."""
    return runtime.instance_id()


def username() -> str:
    """The user who launched it."""
    return runtime.username()


def models() -> list[str]:
    """Names of the models being served; the first is the default."""
    return list(runtime.models())


def priority() -> int:
    """The priority that the program was launched with, which is the highest that it may ask for."""
    return runtime.priority()


def launch(program: str, arguments: Mapping[str, Any] | str | None = None) -> Child:
    """See `inferlet.launch`."""
    return children.launch(program, arguments)


def log(message: str, level: str = "info") -> None:
    """Writes a line to the server's log; level is trace, debug, info, warn or error."""
    call(logging.log, logging.Level[level.upper()], message)
