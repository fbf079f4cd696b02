"""Chunks become a content: in order, bounded, checked, and gone afterwards."""

from __future__ import annotations

import pytest
from blake3 import blake3

from pie_core.errors import InvalidRequest, LimitExceeded
from pie_core.server.messages import CHUNK_BYTES
from pie_core.server.uploads import Chunk, Uploads

CONTENT = bytes(range(256)) * (CHUNK_BYTES // 256) + b"and the rest"
HASH = blake3(CONTENT).hexdigest()


def chunk(index: int, total: int = 2, content: bytes = CONTENT) -> Chunk:
    data = content[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
    return Chunk(blake3(content).hexdigest(), index, total, data)


def test_the_last_chunk_gives_the_whole() -> None:
    uploads = Uploads(1 << 20, "limit")
    assert uploads.add(chunk(0)) is None
    assert uploads.next_chunk(HASH) == 1
    assert uploads.add(chunk(1)) == CONTENT
    assert uploads.next_chunk(HASH) == 0


def test_a_chunk_out_of_place_leaves_the_upload_as_it_was() -> None:
    uploads = Uploads(1 << 20, "limit")
    uploads.add(chunk(0))
    for wrong in (chunk(2, 3), chunk(1, 3)):
        with pytest.raises(InvalidRequest, match="expected was chunk 1 of 2"):
            uploads.add(wrong)
    assert uploads.add(chunk(1)) == CONTENT


def test_chunk_0_starts_again() -> None:
    uploads = Uploads(1 << 20, "limit")
    uploads.add(chunk(0))
    uploads.add(chunk(0))
    assert uploads.add(chunk(1)) == CONTENT


@pytest.mark.parametrize(
    ("limit", "fits"), [(len(CONTENT), True), (len(CONTENT) - 1, False), (CHUNK_BYTES, False)]
)
def test_the_limit_is_exact(limit: int, fits: bool) -> None:
    uploads = Uploads(limit, "the.setting")
    uploads.add(chunk(0))
    if fits:
        assert uploads.add(chunk(1)) == CONTENT
    else:
        with pytest.raises(LimitExceeded, match=r"the\.setting"):
            uploads.add(chunk(1))
        assert uploads.next_chunk(HASH) == 0


def test_what_is_announced_too_large_never_begins() -> None:
    uploads = Uploads(CHUNK_BYTES - 1, "the.setting")
    with pytest.raises(LimitExceeded, match=r"the\.setting"):
        uploads.add(chunk(0))
    assert uploads.next_chunk(HASH) == 0


def test_unfinished_uploads_are_bounded_in_number_and_time() -> None:
    now = [0.0]
    uploads = Uploads(1 << 20, "limit", lambda: now[0])
    contents = [CONTENT + bytes([number]) for number in range(17)]
    for content in contents[:16]:
        uploads.add(chunk(0, content=content))
    with pytest.raises(LimitExceeded, match="16 uploads are unfinished"):
        uploads.add(chunk(0, content=contents[16]))
    now[0] = 1e9
    uploads.add(chunk(0, content=contents[16]))
    assert uploads.next_chunk(blake3(contents[0]).hexdigest()) == 0
    uploads.close()
