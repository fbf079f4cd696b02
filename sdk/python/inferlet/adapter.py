"""Low-rank adapters. This version has none of it yet."""

from __future__ import annotations

from typing import NoReturn

from inferlet.errors import not_in_this_version
from inferlet.model import Model


class Adapter:
    """An adapter of a model."""

    @staticmethod
    def create(model: Model, name: str) -> NoReturn:
        raise not_in_this_version("Adapter.create")

    @staticmethod
    def open(model: Model, name: str) -> NoReturn:
        raise not_in_this_version("Adapter.open")
