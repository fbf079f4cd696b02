"""Evolution strategies over adapters. This version has none of it yet."""

from __future__ import annotations

from typing import Any, NoReturn

from inferlet.errors import not_in_this_version


def adapter_seed(forward: Any, seed: int) -> NoReturn:
    raise not_in_this_version("zo.adapter_seed")


def initialize(
    adapter: Any, rank: int, alpha: float, population_size: int, mu_fraction: float, initial_sigma: float
) -> NoReturn:
    raise not_in_this_version("zo.initialize")


def update(adapter: Any, scores: list[float], seeds: list[int], max_sigma: float) -> NoReturn:
    raise not_in_this_version("zo.update")
