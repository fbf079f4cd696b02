"""Where pie keeps its files on this machine, and the only reader of environment variables.

PIE_HOME (default ~/.pie)
├── config.yaml     the configuration that is used when none is named
├── authorized.yaml who may use the server: users and their keys, for its owner's eyes only
├── programs/       the installed programs, see program_store.py
├── models/         the default model and imported ones, a folder each
└── cache/          compiled programs and guest runtimes; private to the user, safe to delete
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pie_core.errors import ConfigError


def pie_home() -> Path:
    """The folder that PIE_HOME names, or ~/.pie; it need not exist yet."""
    named = os.environ.get("PIE_HOME", "")
    return Path(named or "~/.pie").expanduser().absolute()


def default_config_file() -> Path:
    return pie_home() / "config.yaml"


def credentials_file() -> Path:
    return pie_home() / "authorized.yaml"


def installed_programs_dir() -> Path:
    return pie_home() / "programs"


def models_dir() -> Path:
    return pie_home() / "models"


def snapshots_dir(model: str) -> Path:
    return pie_home() / "snapshots" / model


def cache_dir() -> Path:
    return pie_home() / "cache"


def programs_cache_dir() -> Path:
    return cache_dir() / "programs"


def make_private_dir(path: Path) -> Path:
    """`path`, created if need be and closed to other users: what lies in a cache is trusted later."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot use the folder {path}: {error.strerror}; free it, or set PIE_HOME to a folder you can write to"
        ) from error
    return path


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `changes`, for a program that we start."""
    return {**os.environ, **changes}
