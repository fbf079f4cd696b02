"""A checkpoint on disk: its configuration, what tensors it holds, and their content one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pie_core.errors import LoadError
from pie_plugins.models.weight_table import Format


@dataclass(frozen=True, slots=True)
class StoredTensor:
    shape: tuple[int, ...]
    num_bytes: int


class Checkpoint(Protocol):
    """A Hugging Face directory or a GGUF file."""

    @property
    def form(self) -> Format: ...

    @property
    def origin(self) -> str:
        """Where error messages say it is."""
        ...

    @property
    def kind(self) -> str:
        """`model_type` of config.json, or `general.architecture` of a GGUF file."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The keys of config.json; GGUF metadata comes under the same names."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def expect(self, names: Sequence[str]) -> None:
        """These will be read, in this order: whoever can, begins with it."""
        ...

    def read(self, name: str) -> Tensor:
        """In float32, float16 or bfloat16; quantized tensors in float32. Raises LoadError."""
        ...

    def close(self) -> None: ...


def config_origin(checkpoint: Checkpoint) -> str:
    """Where error messages say its configuration stands."""
    return f"{checkpoint.origin}{'/config.json' if checkpoint.form == 'hf' else ' (metadata)'}"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content
