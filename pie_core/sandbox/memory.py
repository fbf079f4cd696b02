"""This process's memory as one view: what wasmtime lays down is read and written in place, by address.

`ctypes.memmove` and `string_at` take 250 ns a call, an index into a view 20 to 40. An address that is not mapped ends
the process, as it does with them: only addresses that wasmtime has just given may be used.
"""

from __future__ import annotations

import ctypes

USER_ADDRESSES = 1 << 47  # a process has no memory beyond on any machine that wasmtime runs on

MEMORY: memoryview = memoryview((ctypes.c_uint64 * (USER_ADDRESSES // 8)).from_address(0)).cast("B")
WORDS: memoryview = MEMORY.cast("Q")  # by address // 8; wasmtime aligns values to 8
