"""Tool servers on the client's side. This version has none of it yet."""

from __future__ import annotations

from typing import NoReturn

from inferlet.errors import not_in_this_version


def available_servers() -> NoReturn:
    raise not_in_this_version("mcp.available_servers")


def connect(server_name: str) -> NoReturn:
    raise not_in_this_version("mcp.connect")
