"""Snapshots on disk: one safetensors file each, written whole or not at all, checked when it is read.

A file holds what a context consists of, not its KV: rows are computed again when the snapshot is first used. So it
outlives page sizes, KV types and drivers, but not the weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pie_core.engine.context import Context
from pie_core.ids import Tenant

_log = logging.getLogger(__name__)

FORMAT = "pie-snapshot-1"
_TICK_NS = 100_000_000  # more than the steps in which file systems tell time


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands beside the arrays."""

    format: str
    tenant: Tenant
    name: str
    weights: str  # revision of those that the tokens belong to
    saved_at: float  # seconds since 1970
    stream: str  # 64 bits, in decimal
    epoch: int
    children: int
    pinned: list[tuple[int, int]]
    digest: str  # of the arrays


@dataclass(frozen=True, slots=True)
class Stored:
    header: Header
    arrays: dict[str, NDArray[Any]]

    @property
    def attachment(self) -> bytes:
        return self.arrays["attachment"].tobytes()

    def restore(self, context: Context) -> None:
        """The context becomes what was saved; none of its rows is on a page."""
        header, arrays = self.header, self.arrays
        masks = np.split(arrays["mask_runs"], arrays["mask_ends"][:-1]) if len(arrays["mask_ends"]) else []
        context.history.extend(arrays["tokens"].tolist(), arrays["positions"].tolist())
        context.history.masks = dict(zip(arrays["mask_rows"].tolist(), masks, strict=True))
        context.evictions.restore(arrays["hidden_since"])
        for start, stop in header.pinned:
            context.evictions.pin(start, stop)
        context.stream, context.epoch, context.children = int(header.stream), header.epoch, header.children


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file as it was when we last read or wrote it."""

    stamp: tuple[int, int]  # inode and time of its last change
    tenant: Tenant
    name: str


class SnapshotFiles:
    """The files of one model, in a folder of their own, which several engines of the model may use."""

    def __init__(self, folder: Path, weights: str) -> None:
        self._folder = folder
        self._weights = weights
        self._seen: dict[Path, _Seen] = {}
        self._left_out: dict[Path, tuple[int, int]] = {}
        self._folder_unchanged_since = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, context: Context, name: str, attachment: bytes, saved_at: float) -> None:
        arrays = _arrays(context, attachment)
        header = Header(
            format=FORMAT,
            tenant=context.tenant,
            name=name,
            weights=self._weights,
            saved_at=saved_at,
            stream=str(context.stream),
            epoch=context.epoch,
            children=context.children,
            pinned=context.evictions.pinned,
            digest=_digest(arrays),
        )
        content = save(arrays, {"pie": msgspec.json.encode(header).decode()})
        path = self._path(context.tenant, name)
        unfinished = path.with_suffix(f".{os.getpid()}.new")
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            self._seen[path] = _Seen(_stamp(os.fstat(file.fileno())), context.tenant, name)
        unfinished.replace(path)

    def delete(self, tenant: Tenant, name: str) -> None:
        path = self._path(tenant, name)
        self._seen.pop(path, None)
        path.unlink(missing_ok=True)

    def changes(self) -> Iterator[tuple[Tenant, str, Stored | None]]:
        """What others have saved since the last call, or deleted (None); at first all there is.

        Files that are broken or of other weights are left alone, and told in the log.
        """
        if self._is_unchanged():
            return
        found = {path: stamp for path in self._folder.glob("*.safetensors") if (stamp := _stamp_of(path))}
        for path in self._seen.keys() - found.keys():
            gone = self._seen.pop(path)
            yield gone.tenant, gone.name, None
        for path, stamp in sorted(found.items()):
            before = self._seen.get(path)
            if (before is None or before.stamp != stamp) and self._left_out.get(path) != stamp:
                yield from self._changed(path, stamp)

    def _changed(self, path: Path, stamp: tuple[int, int]) -> Iterator[tuple[Tenant, str, Stored | None]]:
        stored = self._read(path)
        if stored is not None:
            header = stored.header
            self._seen[path] = _Seen(stamp, header.tenant, header.name)
            yield header.tenant, header.name, stored
            return
        self._left_out[path] = stamp
        before = self._seen.pop(path, None)
        if before is not None:
            yield before.tenant, before.name, None

    def _read(self, path: Path) -> Stored | None:
        try:
            stored = _read(path)
        except (ValueError, KeyError, OSError, SafetensorError, msgspec.MsgspecError) as error:
            _log.warning("the snapshot in %s is left out: %s", path, error)
            return None
        if stored.header.weights != self._weights:
            _log.warning("the snapshot in %s is left out: it was made with other weights", path)
            return None
        return stored

    def _is_unchanged(self) -> bool:
        """Whether the folder lists the same files as before, as far as its time of change tells."""
        changed_at = self._folder.stat().st_mtime_ns
        is_unchanged = changed_at == self._folder_unchanged_since
        # A change within the same tick of the file system's clock would not show.
        is_old = time.time_ns() - changed_at > _TICK_NS
        self._folder_unchanged_since = changed_at if is_old else 0
        return is_unchanged

    def _path(self, tenant: Tenant, name: str) -> Path:
        key = hashlib.sha256(json.dumps([tenant, name]).encode()).hexdigest()
        return self._folder / f"{key}.safetensors"


def _arrays(context: Context, attachment: bytes) -> dict[str, NDArray[Any]]:
    history, masks = context.history, context.history.masks
    runs = list(masks.values())
    return {
        "tokens": history.tokens.copy(),
        "positions": history.positions.copy(),
        "mask_rows": np.array(list(masks), np.int32),
        "mask_ends": np.cumsum([len(each) for each in runs], dtype=np.int32),
        "mask_runs": np.concatenate([np.empty(0, np.int32), *runs]),
        "hidden_since": context.evictions.since(history.length),
        "attachment": np.frombuffer(attachment, np.uint8),
    }


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_mtime_ns


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        return _stamp(path.stat())
    except FileNotFoundError:  # deleted in the meantime
        return None


def _read(path: Path) -> Stored:
    with safe_open(path, framework="numpy") as file:
        header = msgspec.json.decode(file.metadata()["pie"], type=Header)
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if header.format != FORMAT:
        raise ValueError(f"its format is {header.format!r}; expected {FORMAT!r}")
    if _digest(arrays) != header.digest:
        raise ValueError(f"its content is not what was written: expected the digest {header.digest}")
    return Stored(header, arrays)


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
