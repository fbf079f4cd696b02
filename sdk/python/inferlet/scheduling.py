"""What the scheduler charges. This version has none of it yet."""

from __future__ import annotations

from typing import NoReturn

from inferlet.context import Context
from inferlet.errors import not_in_this_version
from inferlet.model import Model


def balance(model: Model) -> NoReturn:
    raise not_in_this_version("scheduling.balance")


def rent(context: Context) -> NoReturn:
    raise not_in_this_version("scheduling.rent")


def dividend(model: Model) -> NoReturn:
    raise not_in_this_version("scheduling.dividend")


def latency(context: Context) -> NoReturn:
    raise not_in_this_version("scheduling.latency")


def price(model: Model | None = None) -> NoReturn:
    raise not_in_this_version("scheduling.price")
