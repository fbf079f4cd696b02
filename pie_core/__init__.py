"""The microkernel of pie: contracts, plugins, scheduling, the inferlet runtime. It knows no tensor library and no model."""

from __future__ import annotations

__version__ = "0.1.0"
