"""A program's client that keeps what it hears."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RecordingClient:
    """Satisfies `host_api.guest_state.ClientLink` and never holds a program back."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    messages: list[str] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    def on_file(self, content: bytes) -> None:
        self.files.append(content)

    def on_stdout(self, data: bytes) -> None:
        self.stdout += data

    def on_stderr(self, data: bytes) -> None:
        self.stderr += data
