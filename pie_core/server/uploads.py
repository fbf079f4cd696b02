"""Content that arrives in chunks: in order, within a size, and checked against its BLAKE3 hash at the end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from blake3 import blake3

from pie_core.errors import InvalidRequest, LimitExceeded
from pie_core.server.messages import CHUNK_BYTES

_IN_MEMORY = 1 << 20  # larger uploads wait on disk
_FORGOTTEN_S = 3600.0
_MAX_OPEN = 16  # unfinished uploads of one owner


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece, and what it says of the whole."""

    file_hash: str
    index: int
    total: int
    data: bytes


class Upload:
    """One content on its way."""

    def __init__(self, total_chunks: int) -> None:
        self.total_chunks = total_chunks
        self.next_chunk = 0
        self.touched = time.monotonic()
        self._digest = blake3()
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  # closed by close()

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.next_chunk += 1
        self.touched = time.monotonic()

    @property
    def is_complete(self) -> bool:
        return self.next_chunk == self.total_chunks

    def content(self, expected: str) -> bytes:
        """Raises InvalidRequest if it is not what was announced."""
        found = self._digest.hexdigest()
        if found != expected:
            raise InvalidRequest(
                f"the content has the BLAKE3 hash {found}, announced was {expected}: send it again"
            )
        self._file.seek(0)
        return self._file.read()

    def close(self) -> None:
        self._file.close()


class Uploads:
    """The unfinished uploads of one owner; they outlive a connection where the owner does."""

    def __init__(self, max_bytes: int, setting: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._setting = setting
        self._clock = clock
        self._open: dict[str, Upload] = {}

    def add(self, chunk: Chunk) -> bytes | None:
        """The whole content once its last chunk has come. Raises InvalidRequest or LimitExceeded; the upload is over
        then, except that a chunk out of place leaves it as it was."""
        upload = self._open.get(chunk.file_hash)
        if upload is None or chunk.index == 0:
            upload = self._begin(chunk)
        if chunk.index != upload.next_chunk or chunk.total != upload.total_chunks:
            raise InvalidRequest(
                f"chunk {chunk.index} of {chunk.total} came, expected was chunk {upload.next_chunk} of"
                f" {upload.total_chunks}: chunks are sent in order, and resume_upload tells where to go on"
            )
        if len(chunk.data) != CHUNK_BYTES and chunk.index != chunk.total - 1:
            size = len(chunk.data)
            raise InvalidRequest(f"chunk {chunk.index} has {size} bytes; all but the last have {CHUNK_BYTES}")
        if chunk.index * CHUNK_BYTES + len(chunk.data) > self._max_bytes:
            self._drop(chunk.file_hash)
            raise LimitExceeded(
                f"more than {self._max_bytes} bytes, the most that is taken ({self._setting})"
            )
        upload.add(chunk.data)
        return self._finish(chunk.file_hash) if upload.is_complete else None

    @property
    def is_open(self) -> bool:
        """Something is unfinished."""
        return bool(self._open)

    def next_chunk(self, file_hash: str) -> int:
        """Where to go on; 0 if there is nothing yet."""
        upload = self._open.get(file_hash)
        return 0 if upload is None else upload.next_chunk

    def close(self) -> None:
        for file_hash in list(self._open):
            self._drop(file_hash)

    def _begin(self, chunk: Chunk) -> Upload:
        self._drop(chunk.file_hash)
        self._forget_old()
        if (chunk.total - 1) * CHUNK_BYTES > self._max_bytes:
            raise LimitExceeded(
                f"{chunk.total} chunks of {CHUNK_BYTES} bytes; at most {self._max_bytes} bytes are taken"
                f" ({self._setting})"
            )
        if chunk.index != 0:
            raise InvalidRequest(
                f"chunk {chunk.index} of something whose chunk 0 has not come: start with that"
            )
        if len(self._open) >= _MAX_OPEN:
            raise LimitExceeded(f"{_MAX_OPEN} uploads are unfinished: finish some first")
        upload = self._open[chunk.file_hash] = Upload(chunk.total)
        return upload

    def _finish(self, file_hash: str) -> bytes:
        try:
            return self._open[file_hash].content(file_hash)
        finally:
            self._drop(file_hash)

    def _forget_old(self) -> None:
        now = self._clock()
        for file_hash in [each for each, upload in self._open.items() if now - upload.touched > _FORGOTTEN_S]:
            self._drop(file_hash)

    def _drop(self, file_hash: str) -> None:
        upload = self._open.pop(file_hash, None)
        if upload is not None:
            upload.close()
