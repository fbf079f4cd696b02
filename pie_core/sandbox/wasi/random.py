"""wasi:random: the operating system's randomness, for the insecure interfaces too."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pie_core.errors import InvalidRequest
from pie_core.sandbox.hosting import Interface

if TYPE_CHECKING:
    from pie_core.sandbox.guest import Guest

WIT = """
package wasi:random@0.2.0;

interface random {
  get-random-bytes: func(len: u64) -> list<u8>;
  get-random-u64: func() -> u64;
}

interface insecure {
  get-insecure-random-bytes: func(len: u64) -> list<u8>;
  get-insecure-random-u64: func() -> u64;
}

interface insecure-seed {
  insecure-seed: func() -> tuple<u64, u64>;
}
"""

MOST_BYTES = 1 << 20

random = Interface("random", "wasi:random")
insecure = Interface("insecure", "wasi:random")
insecure_seed = Interface("insecure-seed", "wasi:random")


@random.function("get-random-bytes")
@insecure.function("get-insecure-random-bytes")
def get_random_bytes(guest: Guest, count: int) -> bytes:
    if count > MOST_BYTES:
        raise InvalidRequest(f"{count} random bytes were asked for in one call: ask for at most {MOST_BYTES}")
    return os.urandom(count)


@random.function("get-random-u64")
@insecure.function("get-insecure-random-u64")
def get_random_u64(guest: Guest) -> int:
    return int.from_bytes(os.urandom(8), "little")


@insecure_seed.function("insecure-seed")
def seed(guest: Guest) -> tuple[int, int]:
    return get_random_u64(guest), get_random_u64(guest)
