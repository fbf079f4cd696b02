"""The microkernel of pie: contracts, plugins, scheduling, the inferlet runtime. No tensor library, no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pie_core.offline import AsyncPie, Pie

__version__ = "0.1.0"

__all__ = ["AsyncPie", "Pie", "__version__"]


def __getattr__(name: str) -> Any:
    """`from pie_core import Pie` works, and whoever does not ask for it loads nothing."""
    if name in ("AsyncPie", "Pie"):
        from pie_core import offline

        return getattr(offline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
