"""Messages over a socket pair arrive whole and in order, however the bytes are cut."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.processes.frames import FrameStream
from pie_core.processes.heartbeat import last_beat


class Note(msgspec.Struct, frozen=True, tag=True):
    text: bytes


def stream(heard: list[Note]) -> FrameStream[Note]:
    return FrameStream(Note, heard.append, lambda: None)


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 50), min_size=1))
def test_messages_are_whole_however_the_bytes_arrive(texts: list[bytes], cuts: list[int]) -> None:
    wire, heard = Wire(), list[Note]()
    sender, receiver = stream([]), stream(heard)
    sender.connection_made(wire)
    for text in texts:
        sender.send(Note(text))
    rest = bytes(wire.written)
    while rest:
        for cut in cuts:
            receiver.data_received(rest[:cut])
            rest = rest[cut:]
    assert heard == [Note(text) for text in texts]


def test_large_messages_pass_and_the_end_is_told_once() -> None:
    async def main() -> None:
        one, other = socket.socketpair()
        heard: list[Note] = []
        ended = asyncio.Event()
        sender, receiver = stream([]), FrameStream(Note, heard.append, ended.set)
        await sender.open(one)
        await receiver.open(other)
        for size in (0, 1, 1 << 22):
            sender.send(Note(bytes(size)))
        sender.finish()
        await asyncio.wait_for(ended.wait(), 10)
        assert [len(note.text) for note in heard] == [0, 1, 1 << 22]
        sender.send(Note(b"after the end"))

    asyncio.run(main())


def test_the_last_whole_beat_counts() -> None:
    beats = b"".join(silent_ms.to_bytes(4, "little") for silent_ms in (3, 1500))
    assert last_beat(b"") is None
    assert last_beat(beats[:4]) == 0.003
    assert last_beat(beats) == 1.5
    assert last_beat(beats + b"\0") == 1.5
