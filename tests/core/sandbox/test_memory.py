"""Memory by address is the memory that ctypes sees."""

from __future__ import annotations

import ctypes

import pytest

from pie_core.sandbox.memory import MEMORY, USER_ADDRESSES, WORDS


def test_what_is_written_by_address_is_there() -> None:
    buffer = (ctypes.c_uint64 * 3)(1, 2, 3)
    address = ctypes.addressof(buffer)
    assert WORDS[(address >> 3) + 2] == 3
    WORDS[(address >> 3) + 1] = (1 << 64) - 1
    MEMORY[address : address + 4] = b"\1\2\3\4"
    assert list(buffer) == [0x04030201, (1 << 64) - 1, 3]


def test_what_cannot_be_an_address_of_a_process_is_refused() -> None:
    with pytest.raises(IndexError):
        MEMORY[USER_ADDRESSES]
