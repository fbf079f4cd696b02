"""Compiled programs on disk, so that each is compiled once.

An image is native code that runs without further checks: the folder belongs to its user alone (0700), and an image is
used only if its bytes have the checksum that was noted when it was made. Without a usable folder everything still
works, compiled anew each time, with a warning.

    KEY.sum                 the checksum of the image, written last
    KEY-CHECKSUM.cwasm      the image, mapped by wasmtime, never changed in place
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from pie_core.sandbox.fibers import WASMTIME, EngineOptions

log = logging.getLogger(__name__)

MOST_BYTES = 2 << 30  # of images, before the ones unused for longest are removed


class AotCache:
    def __init__(self, folder: Path | None) -> None:
        self._folder = folder if folder is not None and _usable(folder) else None

    def find(self, key: str) -> Path | None:
        """The image under this key, if it is there and whole."""
        if self._folder is None:
            return None
        try:
            checksum = (self._folder / f"{key}.sum").read_text(encoding="ascii").strip()
            image = self._image(key, checksum)
            with image.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            log.warning(
                "the compiled image %s in %s cannot be read (%s): compiling again",
                key[:16],
                self._folder,
                error,
            )
            return None
        if actual != checksum:
            log.warning("the compiled image %s is corrupted (its checksum differs): compiling again", image)
            return None
        _touch(image)
        return image

    def store(self, key: str, image: bytes | memoryview) -> Path | None:
        """Keeps an image; None where that is impossible."""
        if self._folder is None:
            return None
        checksum = hashlib.sha256(image).hexdigest()
        path = self._image(key, checksum)
        try:
            _write(path, image)
            _write(self._folder / f"{key}.sum", checksum.encode("ascii"))
            self._prune(keep=path)
        except OSError as error:
            log.warning(
                "a compiled program cannot be kept in %s (%s): it will be compiled again", self._folder, error
            )
            return None
        return path

    def discard(self, key: str) -> None:
        """Forgets an image that wasmtime would not load."""
        if self._folder is not None:
            (self._folder / f"{key}.sum").unlink(missing_ok=True)

    def _image(self, key: str, checksum: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}-{checksum[:16]}.cwasm"

    def _prune(self, keep: Path) -> None:
        assert self._folder is not None
        images = sorted(
            ((path.stat(), path) for path in self._folder.glob("*.cwasm")), key=lambda item: item[0].st_mtime
        )
        excess = sum(stat.st_size for stat, _ in images) - MOST_BYTES
        for stat, path in images:
            if excess <= 0:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                excess -= stat.st_size


def image_key(wasm: bytes, options: EngineOptions) -> str:
    """What an image depends on: the program, the compiler, its settings and the processor."""
    digest = hashlib.sha256(wasm)
    digest.update(json.dumps([WASMTIME, options.as_dict(), _processor()]).encode())
    return digest.hexdigest()


@cache
def _processor() -> list[str]:
    """Architecture and instruction sets: an image uses those of the machine it was made on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return [platform.machine(), " ".join(sorted(features.split()))]


def _usable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
        if stat.st_uid != os.geteuid():
            log.warning("the cache %s belongs to another user: compiled programs are not kept", folder)
            return False
        if stat.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        log.warning("the cache %s cannot be used (%s): compiled programs are not kept", folder, error)
        return False
    return True


def _write(path: Path, data: bytes | memoryview) -> None:
    """Whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _touch(image: Path) -> None:
    with suppress(OSError):  # a read-only cache still serves
        os.utime(image)
