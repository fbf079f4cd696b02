"""Bytes into messages: every type comes through whole, and nothing else does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_core.server import messages as m
from tests.flow.server.wire import sample


@pytest.mark.parametrize("kind", m.REQUESTS, ids=m.wire_name)
def test_every_request_comes_through(kind: type[m.Request]) -> None:
    request = m.decode_request(msgspec.msgpack.encode(sample(kind)))
    assert type(request) is kind
    assert m.decode_request(m.encode(request)) == request


def test_every_reply_comes_through() -> None:
    text = {"process_id": "p", "file_hash": "0" * 64, "server_name": "s", "method": "m", "params": "{}"}
    fields = {**text, "corr_id": 1, "ok": True, "result": "r", "event": "stdout", "value": "v"}
    fields |= {"chunk_index": 0, "total_chunks": 1, "chunk_data": b"x"}
    for kind in m.REPLIES:
        required = [field.name for field in msgspec.structs.fields(kind) if field.required]
        reply = kind(**{name: fields[name] for name in required})
        assert m.decode_reply(m.encode(reply)) == reply


def test_what_is_at_its_default_is_not_sent() -> None:
    sent = msgspec.msgpack.decode(m.encode(m.Response(corr_id=1, ok=True, result="")))
    assert sent == {"type": "response", "corr_id": 1, "ok": True, "result": ""}


def outcome(data: bytes) -> object:
    try:
        return m.decode_request(data)
    except m.BadMessage as refusal:
        return refusal


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_refusal(data: bytes) -> None:
    assert isinstance(outcome(data), m.Request | m.BadMessage)


@given(st.sampled_from(m.REQUESTS), st.data())
def test_a_message_with_one_wrong_byte_is_a_message_or_a_refusal(
    kind: type[m.Request], data: st.DataObject
) -> None:
    encoded = bytearray(msgspec.msgpack.encode(sample(kind)))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    read = outcome(bytes(encoded))
    assert isinstance(read, m.Request | m.BadMessage)
    assert 0 <= read.corr_id < 2**32


@pytest.mark.parametrize("corr_id", [-1, 2**32, 1.5, "1", None, True, [1]])
def test_a_number_that_is_none_is_not_echoed(corr_id: object) -> None:
    with pytest.raises(m.BadMessage) as refusal:
        m.decode_request(msgspec.msgpack.encode({"type": "ping", "corr_id": corr_id}))
    assert refusal.value.corr_id == 0


def test_chunks_cover_the_whole() -> None:
    for size in (0, 1, m.CHUNK_BYTES, m.CHUNK_BYTES + 1):
        chunks = m.chunks_of(bytes(size))
        assert b"".join(chunks) == bytes(size)
        assert len(chunks) == max(1, -(-size // m.CHUNK_BYTES))
