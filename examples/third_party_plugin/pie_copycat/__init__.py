"""The driver copycat: what it declares. Nothing heavy is imported before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest
from pie_core.hookspecs import hookimpl

from pie_copycat.options import Options


def _load(request: DriverRequest) -> Driver:
    from pie_copycat.driver import load  # here, so that declaring stays light

    return load(request)


DECLARATION = DriverDeclaration(
    name="copycat",
    summary="continues a text by what followed the same token before",
    options=Options,
    load=_load,
)


@hookimpl
def pie_drivers() -> Sequence[DriverDeclaration]:
    return [DECLARATION]
