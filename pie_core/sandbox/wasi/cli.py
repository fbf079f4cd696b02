"""wasi:cli: standard streams and exit. The environment and the arguments are empty, and nothing is a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pie_core.sandbox.converters import Refused
from pie_core.sandbox.hosting import Interface
from pie_core.sandbox.wasi.streams import ByteSource, OutputStream

if TYPE_CHECKING:
    from pie_core.sandbox.guest import Guest

WIT = """
package wasi:cli@0.2.0;

interface environment {
  get-environment: func() -> list<tuple<string, string>>;
  get-arguments: func() -> list<string>;
  initial-cwd: func() -> option<string>;
}

interface exit {
  exit: func(status: result);
  exit-with-code: func(status-code: u8);
}

interface stdin {
  use wasi:io/streams@0.2.0.{input-stream};
  get-stdin: func() -> input-stream;
}

interface stdout {
  use wasi:io/streams@0.2.0.{output-stream};
  get-stdout: func() -> output-stream;
}

interface stderr {
  use wasi:io/streams@0.2.0.{output-stream};
  get-stderr: func() -> output-stream;
}

interface terminal-input { resource terminal-input; }

interface terminal-output { resource terminal-output; }

interface terminal-stdin {
  use terminal-input.{terminal-input};
  get-terminal-stdin: func() -> option<terminal-input>;
}

interface terminal-stdout {
  use terminal-output.{terminal-output};
  get-terminal-stdout: func() -> option<terminal-output>;
}

interface terminal-stderr {
  use terminal-output.{terminal-output};
  get-terminal-stderr: func() -> option<terminal-output>;
}
"""


class Terminal:
    """No guest ever holds one."""


class ProgramExited(Exception):
    """Raised behind `exit` to unwind the guest."""


environment = Interface("environment", "wasi:cli")
exit_interface = Interface("exit", "wasi:cli")
stdin = Interface("stdin", "wasi:cli")
stdout = Interface("stdout", "wasi:cli")
stderr = Interface("stderr", "wasi:cli")
terminal_input = Interface("terminal-input", "wasi:cli")
terminal_output = Interface("terminal-output", "wasi:cli")
terminal_stdin = Interface("terminal-stdin", "wasi:cli")
terminal_stdout = Interface("terminal-stdout", "wasi:cli")
terminal_stderr = Interface("terminal-stderr", "wasi:cli")

terminal_input.resource("terminal-input", Terminal)
terminal_output.resource("terminal-output", Terminal)


@environment.function("get-environment")
def get_environment(guest: Guest) -> list[tuple[str, str]]:
    return []


@environment.function("get-arguments")
def get_arguments(guest: Guest) -> list[str]:
    return []


@environment.function("initial-cwd")
def initial_cwd(guest: Guest) -> str | None:
    return None


@exit_interface.function("exit")
def exit_program(guest: Guest, status: Refused | None) -> None:
    exit_with_code(guest, 0 if status is None else 1)


@exit_interface.function("exit-with-code")
def exit_with_code(guest: Guest, status: int) -> None:
    guest.exit(status)
    raise ProgramExited


@stdin.function("get-stdin")
def get_stdin(guest: Guest) -> ByteSource:
    return guest.stdin


@stdout.function("get-stdout")
def get_stdout(guest: Guest) -> OutputStream:
    return OutputStream(guest.state.write_stdout, guest.output)


@stderr.function("get-stderr")
def get_stderr(guest: Guest) -> OutputStream:
    return OutputStream(guest.state.write_stderr, guest.output)


@terminal_stdin.function("get-terminal-stdin")
@terminal_stdout.function("get-terminal-stdout")
@terminal_stderr.function("get-terminal-stderr")
def no_terminal(guest: Guest) -> None:
    return None
