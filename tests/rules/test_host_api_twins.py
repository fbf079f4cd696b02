"""Every interface that guests see stands in two files of one name: wit/x.wit and host_api/x.py."""

from __future__ import annotations

from tests.rules.source_tree import ROOT

NO_FUNCTIONS = {"types", "world"}  # shared types, and the list of what is imported


def test_every_interface_has_its_twin_in_the_host_api() -> None:
    interfaces = {path.stem for path in (ROOT / "pie_core/wit").glob("*.wit")} - NO_FUNCTIONS
    twins = {path.stem for path in (ROOT / "pie_core/host_api").glob("*.py")}
    assert interfaces
    assert interfaces <= twins
