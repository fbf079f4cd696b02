"""The dummy driver: a deterministic pretended model that needs no checkpoint; the smallest driver, and the tests'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest
from pie_core.hookspecs import hookimpl
from pie_plugins.drivers.dummy.options import DummyOptions

CHECKPOINT = Path(__file__).parent / "checkpoint"


def _load(request: DriverRequest) -> Driver:
    from pie_plugins.drivers.dummy.load import load_dummy  # here, so that declaring stays light

    return load_dummy(request)


@hookimpl
def pie_drivers() -> Sequence[DriverDeclaration]:
    return [
        DriverDeclaration(
            name="dummy",
            summary="a deterministic pretended model, for tests and for measuring everything but the model",
            options=DummyOptions,
            load=_load,
            needs_checkpoint=False,
            default_checkpoint=CHECKPOINT,
        )
    ]
