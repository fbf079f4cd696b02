"""A model architecture as the core sees it: which checkpoints it reads. Its layers belong to the torch drivers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pie_core.contracts.forward import Float32

# Logits [tokens, vocab] of an independent implementation in float32, for the checkpoint at a path and token ids. Where
# tokens have several columns, [tokens, streams, vocab], for ids of text and frames, each column given those before it:
# of the frame that follows in the list, else the most probable ones.
ReferenceLogits = Callable[[Path, Sequence[Any]], Float32]


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
    reference: ReferenceLogits | None = None  # what `pie model check` compares with
    api_version: int = 1
