"""The terminal as the client of a program: its output appears as it comes, what is typed reaches it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pie_core.cli.outcomes import say
from pie_core.cli.progress import ProgressDisplay
from pie_core.cli.stdin_lines import StdinLines
from pie_core.errors import RequestError

if TYPE_CHECKING:
    from pie_core.config import ServerConfig
    from pie_core.contracts.driver import Progress


class Terminal:
    """Callbacks for what a program sends and prints, and `next_line` for what it receives."""

    def __init__(self, program: str, server: ServerConfig, quiet: bool = False) -> None:
        self._program = program
        self._quiet = quiet
        self._progress = ProgressDisplay()
        self._lines = StdinLines(_descriptor_of_stdin(), server.max_message_bytes)
        self._at_line_start = True
        self._stdout_gone = False
        self._files = 0

    def progress(self, progress: Progress) -> None:
        """A ProgressCallback for everything that takes its time before the program runs."""
        if not self._quiet:
            self._progress(progress)

    def on_message(self, message: str) -> None:
        """What the program sends appears as it is: line ends are the program's own."""
        self.on_stdout(message.encode("utf-8", errors="replace"))

    def on_stdout(self, data: bytes) -> None:
        if not self._quiet:
            self._write(data)

    def on_stderr(self, data: bytes) -> None:
        self._progress.close()
        _write_through(sys.stderr.buffer, data)

    def on_file(self, content: bytes) -> None:
        """Stores the file beside where the command was given, and says where."""
        path = self._free_path()
        try:
            with path.open("xb") as stream:
                stream.write(content)
        except OSError as error:
            raise RequestError(f"the client cannot store a file as {path}: {error.strerror}") from None
        say(f"{self._program} sent a file: {path}")

    async def next_line(self) -> str | None:
        """The next line of standard input, read only now; None at its end."""
        return await self._lines.next_line()

    def show_return_value(self, value: object) -> None:
        """Last on stdout: text as it is, anything else as one line of JSON, nothing for None."""
        self._progress.close()
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            self._end_line()
            self._write(text.encode("utf-8", errors="replace"))
        self._end_line()

    def close(self) -> None:
        """Leaves the screen at the start of a line."""
        self._progress.end()
        self._end_line()

    def _end_line(self) -> None:
        if not self._at_line_start:
            self._write(b"\n")

    def _write(self, data: bytes) -> None:
        self._progress.close()
        if not data or self._stdout_gone:
            return
        self._at_line_start = data.endswith(b"\n")
        try:
            _write_through(sys.stdout.buffer, data)
        except BrokenPipeError:
            # The reader has left (`pie run … | head`); the program goes on for its other effects.
            self._stdout_gone = True

    def _free_path(self) -> Path:
        while True:
            self._files += 1
            path = Path(f"{self._program}-{self._files}.bin")
            if not path.exists():
                return path


def _write_through(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()


def _descriptor_of_stdin() -> int | None:
    try:
        return sys.stdin.fileno()
    except (AttributeError, ValueError, OSError):  # closed, or replaced by something without a descriptor
        return None
