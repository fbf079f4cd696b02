"""A model architecture as the core sees it: which checkpoints it reads. Its layers belong to the torch drivers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ArchitectureDeclaration:
    """What an architecture plugin returns from `pie_architectures`; light: torch is imported by `load`.

    `load` returns what torch drivers build models from: a `pie_plugins.models.layers.architecture.Architecture`.
    """

    name: str
    summary: str
    model_types: tuple[str, ...]  # `model_type` of config.json
    load: Callable[[], Any]
    gguf_architectures: tuple[str, ...] = ()  # `general.architecture` of GGUF files
    api_version: int = 1
