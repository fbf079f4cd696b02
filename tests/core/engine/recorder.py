"""A driver that keeps what it was asked."""

from __future__ import annotations

from typing import Any

from pie_core.contracts.forward import ForwardBatch
from pie_core.ids import Ticket
from pie_plugins.drivers.dummy.driver import DummyDriver
from tests.core.engine.stepping import dummy


class Recorder(DummyDriver):
    """A dummy that keeps every batch."""

    def __init__(self, **options: Any) -> None:
        self.__dict__ = dummy(**options).__dict__
        self.batches: list[ForwardBatch] = []

    def submit(self, batch: ForwardBatch) -> Ticket:
        self.batches.append(batch)
        return super().submit(batch)
