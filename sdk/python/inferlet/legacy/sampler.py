"""Samplers of the older API: the engine's, or the program's own over (ids, probabilities)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from inferlet.sample import Sampler as EngineSampler


@runtime_checkable
class Sample(Protocol):
    """A sampler that the program writes itself."""

    def sample(self, ids: Sequence[int], probs: Sequence[float]) -> int: ...


class Sampler:
    """Factories by their older names."""

    @staticmethod
    def greedy() -> EngineSampler:
        return EngineSampler.argmax()

    @staticmethod
    def top_p(temperature: float, top_p: float) -> EngineSampler:
        return EngineSampler.top_p(temperature, top_p)

    @staticmethod
    def top_k(temperature: float, top_k: int) -> EngineSampler:
        return EngineSampler.top_k(temperature, top_k)

    @staticmethod
    def min_p(temperature: float, min_p: float) -> EngineSampler:
        return EngineSampler.min_p(temperature, min_p)

    @staticmethod
    def top_k_top_p(temperature: float, top_k: int, top_p: float) -> EngineSampler:
        return EngineSampler.top_k_top_p(temperature, top_k, top_p)

    @staticmethod
    def reasoning() -> EngineSampler:
        return EngineSampler.top_k_top_p(0.6, 20, 0.95)


AnySampler = EngineSampler | Sample
