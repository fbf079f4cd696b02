"""Contract suites tell whoever subclasses them what is still to be said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pie_core.testing.any_architecture import ArchitectureContract
from pie_core.testing.any_media_frontend import MediaFrontendContract
from pie_core.testing.driver_contract.subject import DriverSubject


class TheirArchitecture(ArchitectureContract):
    """Says nothing."""


class TheirFrontend(MediaFrontendContract):
    """Says nothing."""


class TheirDriver(DriverSubject):
    """Says nothing."""


@pytest.mark.parametrize(
    ("ask", "missing"),
    [
        (lambda: TheirArchitecture().make_driver(Path("x")), "TheirArchitecture.make_driver: a driver"),
        (lambda: TheirArchitecture().reference_logits(Path("x"), []), "TheirArchitecture.reference_logits"),
        (lambda: TheirFrontend().make_frontend(), "TheirFrontend.make_frontend: the front-end"),
        (lambda: TheirFrontend().examples(), "TheirFrontend.examples: two files"),
        (lambda: TheirDriver().make_driver(), "TheirDriver.make_driver: a new driver"),
        (lambda: TheirDriver().adapter_paths(Path("x")), "TheirDriver.adapter_paths: the driver declares"),
        (lambda: TheirDriver().media_items(), "TheirDriver.media_items: the driver declares media"),
    ],
)
def test_what_a_suite_needs_is_asked_for_by_the_name_of_its_class(
    ask: Callable[[], Any], missing: str
) -> None:
    with pytest.raises(NotImplementedError, match=missing):
        ask()
