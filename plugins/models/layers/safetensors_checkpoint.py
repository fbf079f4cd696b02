"""A Hugging Face directory: config.json and one safetensors file, or several with an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pie_core.errors import LoadError
from pie_plugins.models.layers.checkpoint import StoredTensor, read_json
from pie_plugins.models.weight_table import Format

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsCheckpoint:
    """Files stay memory-mapped until `close`; tensors are read one at a time."""

    form: Format = "hf"

    def __init__(self, directory: Path) -> None:
        self.origin = str(directory)
        self._directory = directory
        self.config: Mapping[str, Any] = read_json(directory / "config.json")
        self._files: dict[str, Any] = {}
        self._owners: dict[str, str] = {}  # tensor -> file
        self._open_all()

    @property
    def kind(self) -> str:
        kind = self.config.get("model_type")
        if not isinstance(kind, str):
            raise LoadError(f"{self._directory / 'config.json'}: model_type is {kind!r}, expected a string")
        return kind

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {name: self._stored(name) for name in sorted(self._owners)}

    def expect(self, names: Sequence[str]) -> None:
        """The files are memory-mapped: there is nothing to begin with."""

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._files[self._owners[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._broken(self._owners[name], error) from error
        return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor

    def close(self) -> None:
        self._files.clear()

    def _open_all(self) -> None:
        for file in self._file_names():
            path = self._directory / file
            try:
                self._files[file] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._broken(file, error) from error
            self._owners.update(dict.fromkeys(self._files[file].keys(), file))

    def _file_names(self) -> list[str]:
        """The usual names decide where they are there: real checkpoints carry stray files beside them."""
        if (self._directory / INDEX).is_file():
            return self._indexed()
        if (self._directory / SINGLE).is_file():
            return [SINGLE]
        found = sorted(path.name for path in self._directory.glob("*.safetensors"))
        if not found:
            raise LoadError(f"{self._directory}: no .safetensors file; convert other formats to safetensors")
        if len(found) > 1:
            raise LoadError(
                f"{self._directory}: {len(found)} .safetensors files and neither {SINGLE} nor {INDEX}: {found}"
            )
        return found

    def _indexed(self) -> list[str]:
        weight_map = read_json(self._directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise LoadError(f"{self._directory / INDEX}: weight_map is not a mapping of tensors to files")
        outside = [name for name in weight_map.values() if Path(name).name != name]
        if outside:
            raise LoadError(f"{self._directory / INDEX}: {outside[0]!r} is not a file of this directory")
        return sorted(set(weight_map.values()))

    def _stored(self, name: str) -> StoredTensor:
        part = self._files[self._owners[name]].get_slice(name)
        shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
        if dtype not in ITEM_BYTES:
            raise LoadError(
                f"{self._directory / self._owners[name]}: tensor {name!r} has dtype {dtype}; readable are"
                f" {', '.join(ITEM_BYTES)}"
            )
        return StoredTensor(shape, ITEM_BYTES[dtype] * int(torch.Size(shape).numel()))

    def _broken(self, file: str, error: Exception) -> LoadError:
        return LoadError(f"{self._directory / file}: not a whole safetensors file: {error}; fetch it again")
