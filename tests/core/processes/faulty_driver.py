"""A plugin whose driver goes wrong in the ways that need a process of its own to be survived."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

from pie_core.contracts.driver import Driver, DriverCapabilities, DriverDeclaration, DriverRequest
from pie_core.contracts.forward import ForwardBatch, ForwardResult
from pie_core.hookspecs import hookimpl
from pie_core.ids import Ticket
from pie_plugins.drivers.dummy import CHECKPOINT
from pie_plugins.drivers.dummy.driver import DummyDriver
from pie_plugins.drivers.dummy.options import DummyOptions

HANG_IN_COLLECT, HANG_IN_SUBMIT, SLOW_SUBMIT, EXIT = 77, 78, 79, 80  # tokens that bring it about
DEADLINE_S = 0.7


class FaultyDriver(DummyDriver):
    """A dummy until it reads one of those tokens."""

    _hangs = False

    @property
    def capabilities(self) -> DriverCapabilities:
        return replace(super().capabilities, step_deadline_s=DEADLINE_S)

    def submit(self, batch: ForwardBatch) -> Ticket:
        tokens = set(batch.tokens.ids.ravel().tolist())
        self._hangs |= HANG_IN_COLLECT in tokens
        if EXIT in tokens:
            os._exit(7)
        if HANG_IN_SUBMIT in tokens:
            time.sleep(3600)
        if SLOW_SUBMIT in tokens:
            time.sleep(DEADLINE_S)
        return super().submit(batch)

    def collect(self, ticket: Ticket) -> ForwardResult:
        if self._hangs:
            time.sleep(3600)
        return super().collect(ticket)


def _load(request: DriverRequest) -> Driver:
    return FaultyDriver(request.options, 97)


@hookimpl
def pie_drivers() -> Sequence[DriverDeclaration]:
    return [
        DriverDeclaration(
            name="faulty",
            summary="a dummy that goes wrong when told to",
            options=DummyOptions,
            load=_load,
            needs_checkpoint=False,
            default_checkpoint=CHECKPOINT,
        )
    ]
