"""Applies a weight table to a checkpoint: every tensor once, converted, joined, and none missing or left over."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import LoadError
from pie_plugins.models.layers.checkpoint import Checkpoint
from pie_plugins.models.layers.gguf_checkpoint import GgufCheckpoint
from pie_plugins.models.layers.safetensors_checkpoint import SafetensorsCheckpoint
from pie_plugins.models.weight_table import Entry, Format, Source, WeightTable

_log = logging.getLogger(__name__)

NAMED = 8  # how many tensors an error message names
SAMPLED = 4096  # values of each tensor that the revision looks at


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    tensors: dict[str, Tensor]
    revision: str  # digest of names, shapes and a sample of the values


def open_checkpoint(path: Path) -> Checkpoint:
    """A Hugging Face directory or a GGUF file. Raises LoadError where there is nothing usable."""
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file():
        return GgufCheckpoint(path)
    raise LoadError(f"{path}: no such checkpoint; expected a Hugging Face directory or a GGUF file")


def architecture_of(
    checkpoint: Checkpoint, architectures: Mapping[str, ArchitectureDeclaration]
) -> ArchitectureDeclaration:
    """Raises LoadError."""
    return find_architecture(checkpoint.kind, architectures, checkpoint.origin, checkpoint.form)


def find_architecture(
    kind: str, architectures: Mapping[str, ArchitectureDeclaration], origin: str, form: Format = "hf"
) -> ArchitectureDeclaration:
    """The one that reads checkpoints of this kind. Raises LoadError that lists what can be read."""
    known: list[str] = []
    for declaration in architectures.values():
        read = declaration.model_types if form == "hf" else declaration.gguf_architectures
        if kind in read:
            return declaration
        known += read
    raise LoadError(
        f"{origin}: no installed architecture reads {kind!r} from a"
        f" {'Hugging Face folder' if form == 'hf' else 'GGUF file'}; those that can be read are"
        f" {', '.join(sorted(known)) or 'none'}"
    )


# What becomes of a tensor that an entry has made, under the name it goes by.
Place = Callable[[Entry, str, Tensor], Tensor]


def load_weights(
    checkpoint: Checkpoint,
    table: WeightTable,
    dtype: torch.dtype,
    device: str,
    progress: ProgressCallback,
    place: Place = lambda _entry, _target, tensor: tensor,
) -> LoadedWeights:
    """Raises LoadError that names the tensors which are missing, left over or misshaped."""
    checkpoint = _Renamed(checkpoint, table)
    table = table.resolved({name: each.shape for name, each in checkpoint.tensors.items()}, checkpoint.form)
    _check_names(checkpoint, table)
    _check_shapes(checkpoint, table)
    _tell_what_is_left(checkpoint, table)
    checkpoint.expect([source.name(checkpoint.form) for source in table.sources()])
    loader = _Loader(checkpoint, dtype, device, progress, sum(_sizes(checkpoint, table)), place)
    for entry in table.entries:
        loader.apply(entry)
    return LoadedWeights(loader.tensors, loader.digest.hexdigest())


class _Renamed:
    """A checkpoint under the names that the weight table uses."""

    def __init__(self, checkpoint: Checkpoint, table: WeightTable) -> None:
        self._checkpoint = checkpoint
        self._stored = {table.known_name(name): name for name in checkpoint.tensors}
        self.form, self.origin, self.kind = checkpoint.form, checkpoint.origin, checkpoint.kind
        self.config = checkpoint.config
        self.tensors = {ours: checkpoint.tensors[name] for ours, name in self._stored.items()}

    def expect(self, names: Sequence[str]) -> None:
        self._checkpoint.expect([self._stored[name] for name in names])

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._stored[name])

    def close(self) -> None:
        self._checkpoint.close()


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: str,
        progress: ProgressCallback,
        total: int,
        place: Place,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.digest = hashlib.sha256(str(sorted(checkpoint.config.items(), key=str)).encode())
        self._checkpoint = checkpoint
        self._dtype, self._device = dtype, device
        self._progress, self._place = progress, place
        self._done, self._total = 0, total

    def apply(self, entry: Entry) -> None:
        parts = [self._read(source) for source in entry.sources]
        joined = _JOINS[entry.join](parts)
        made = [joined]
        if len(entry.targets) > 1:
            made = [piece.clone() for piece in torch.split_with_sizes(joined, list(entry.rows))]
        for target, tensor in zip(entry.targets, made, strict=True):
            self.tensors[target] = self._place(entry, target, tensor)

    def _read(self, source: Source) -> Tensor:
        name = source.name(self._checkpoint.form)
        tensor = self._checkpoint.read(name)
        self._hash(name, tensor)
        self._done += self._checkpoint.tensors[name].num_bytes
        self._progress(Progress("loading weights", self._done, self._total))
        tensor = tensor.to(self._device, torch.float32 if source.keep_float32 else self._dtype)
        if self._checkpoint.form == "hf" and source.hf_transposed:
            return tensor.transpose(-1, -2)
        if self._checkpoint.form == "gguf" and source.gguf_heads:
            return _halves_from_pairs(tensor, source.gguf_heads)
        return tensor

    def _hash(self, name: str, tensor: Tensor) -> None:
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED)].contiguous()
        self.digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        self.digest.update(sample.view(torch.uint8).numpy().tobytes())


def _first(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous()


def _in_turn(parts: list[Tensor]) -> Tensor:
    """The first of each part, then the second of each, …"""
    return torch.stack(parts, 1).flatten(0, 1)


_JOINS: Mapping[str, Callable[[list[Tensor]], Tensor]] = {
    "take": _first,
    "fuse": torch.cat,
    "stack": torch.stack,
    "interleave": _in_turn,
}


def _halves_from_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, 2) of GGUF to rows (head, 2, pair) of Hugging Face; a bias is permuted alike."""
    rows = tensor.shape[0]
    paired = tensor.reshape(heads, rows // heads // 2, 2, *tensor.shape[1:])
    return paired.transpose(1, 2).reshape(tensor.shape)


def _sizes(checkpoint: Checkpoint, table: WeightTable) -> list[int]:
    return [checkpoint.tensors[source.name(checkpoint.form)].num_bytes for source in table.sources()]


def _check_names(checkpoint: Checkpoint, table: WeightTable) -> None:
    wanted = {source.name(checkpoint.form) for source in table.sources()}
    missing = sorted(wanted - checkpoint.tensors.keys())
    extra = sorted(name for name in checkpoint.tensors.keys() - wanted if not table.is_left(name))
    complaints = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("left over", extra))
        if names
    ]
    if complaints:
        raise LoadError(
            f"{checkpoint.origin}: the tensors do not fit {checkpoint.kind!r} as its configuration describes it:"
            f" {'; '.join(complaints)}"
        )


def _tell_what_is_left(checkpoint: Checkpoint, table: WeightTable) -> None:
    for pattern in table.left:
        count = sum(fnmatchcase(name, pattern) for name in checkpoint.tensors)
        if count:
            _log.info("%s: %d tensors are left aside: %s", checkpoint.origin, count, pattern)


def _check_shapes(checkpoint: Checkpoint, table: WeightTable) -> None:
    wrong = []
    for source in table.sources():
        name = source.name(checkpoint.form)
        seen, expected = checkpoint.tensors[name].shape, source.stored_shape(checkpoint.form)
        if seen != expected:
            wrong.append(f"{name} is {list(seen)}, expected {list(expected)}")
    if wrong:
        raise LoadError(f"{checkpoint.origin}: {len(wrong)} misshaped tensors: {_listed(wrong)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
