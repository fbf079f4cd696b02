"""Where the files live that travel with pie: shipped inferlets, the Python SDK's source, the WIT package.

In a checkout they are folders of the repository; in an installed wheel they lie under `pie_core/data`
(see `[tool.hatch.build.targets.wheel.force-include]` in pyproject.toml). The WIT files are inside the
package in both.
"""

from __future__ import annotations

from pathlib import Path

from pie_core.errors import PieError

_PACKAGE = Path(__file__).resolve().parent


def inferlets_dir() -> Path:
    """One folder or file per shipped inferlet."""
    return _bundled("inferlets")


def sdk_dir() -> Path:
    """The source of the Python guest SDK: what `import inferlet` finds inside a guest."""
    return _bundled("sdk/python")


def wit_dir() -> Path:
    """The WIT package that guests are built against."""
    return _present(_PACKAGE / "wit")


def _bundled(name: str) -> Path:
    installed = _PACKAGE / "data" / name
    return installed if installed.is_dir() else _present(_PACKAGE.parent / name)


def _present(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    raise PieError(
        f"{folder} is missing: this installation of pie-core is incomplete; "
        "install the wheel again, or run from a complete checkout"
    )
