"""Several threads may load what Triton built to launch kernels.

Up to version 3.6 Triton builds an extension module for every combination of argument types, all of one name. CPython
keeps one entry of a name in `sys.modules`: loading such a file again fills the module that was loaded last under that
name, whichever file it came from, and returns it. With one thread that does no harm, for Triton takes `launch` from the
module at once. With several, one takes the function of another's kernel: called with too many arguments at best, with
arguments that are read as something else at worst.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import Lock
from types import ModuleType
from typing import Any

Load = Callable[[str, str], ModuleType]

_loading = Lock()


def unshared(load: Load) -> Load:
    """`load` of a name and a path, whose modules nobody else changes."""

    @wraps(load)
    def load_alone(name: str, path: str) -> ModuleType:
        own = ModuleType(name)
        with _loading:
            vars(own).update(vars(load(name, path)))
        return own

    return load_alone


def keep_apart(build: Any) -> None:
    """Mends `triton.runtime.build` for all of this process; versions that load nothing there need no mending."""
    load = getattr(build, "_load_module_from_path", None)
    if load is not None and not hasattr(load, "__wrapped__"):
        build._load_module_from_path = unshared(load)
