"""The portable driver: torch on the CPU, the embedded default."""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest
from pie_core.hookspecs import hookimpl
from pie_plugins.drivers.portable.options import PortableOptions


def load(request: DriverRequest) -> Driver:
    from pie_plugins.drivers.portable.driver import load_portable  # torch: not before a model is loaded

    return load_portable(request)


@hookimpl
def pie_drivers() -> Sequence[DriverDeclaration]:
    return [
        DriverDeclaration(
            name="portable",
            summary="torch on the CPU: every architecture, no GPU needed",
            options=PortableOptions,
            load=load,
            requires=("torch",),
        )
    ]
