"""Messages between programs. This version has none of it yet."""

from __future__ import annotations

from typing import NoReturn

from inferlet.errors import not_in_this_version


def push(topic: str, message: str) -> NoReturn:
    raise not_in_this_version("messaging.push")


async def pull(topic: str) -> NoReturn:
    raise not_in_this_version("messaging.pull")


def broadcast(topic: str, message: str) -> NoReturn:
    raise not_in_this_version("messaging.broadcast")


def subscribe(topic: str) -> NoReturn:
    raise not_in_this_version("messaging.subscribe")
