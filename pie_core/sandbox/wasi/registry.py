"""Which WASI interfaces a component may import, and what answers them.

`IMPLEMENTED` are ours; whole packages in `REFUSED` link, and every operation in them fails with the package's own
error code, so that a guest's standard library starts and reports "permission denied" when it is asked for files or
sockets. A later file system or `wasi:http` becomes a module beside `io.py` and moves into `IMPLEMENTED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from pie_core.sandbox.hosting import Interface
from pie_core.sandbox.signatures import read_wit
from pie_core.sandbox.wasi import cli, clocks, io, random
from pie_core.sandbox.wit_types import InterfaceSignature

IMPLEMENTED: tuple[Interface, ...] = (
    io.error,
    io.poll,
    io.streams,
    clocks.monotonic_clock,
    clocks.wall_clock,
    cli.environment,
    cli.exit_interface,
    cli.stdin,
    cli.stdout,
    cli.stderr,
    cli.terminal_input,
    cli.terminal_output,
    cli.terminal_stdin,
    cli.terminal_stdout,
    cli.terminal_stderr,
    random.random,
    random.insecure,
    random.insecure_seed,
)

REFUSED = ("wasi:filesystem", "wasi:sockets")
REFUSAL_CODES = ("access-denied", "access", "not-supported", "unsupported", "not-permitted")


@cache
def wasi_interfaces() -> Mapping[str, InterfaceSignature]:
    """The signatures of IMPLEMENTED by path."""
    return read_wit((io.WIT, clocks.WIT, cli.WIT, random.WIT))


@cache
def wasi_resources() -> Mapping[str, str]:
    """Resource name -> key, for refused interfaces that pass streams and pollables on."""
    return {
        name: key for signature in wasi_interfaces().values() for name, key in signature.resources.items()
    }
