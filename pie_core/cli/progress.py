"""How far a long operation is, on stderr: a bar on a terminal, a line per operation elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pie_core.cli.outcomes import say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from pie_core.contracts.driver import Progress


class ProgressDisplay:
    """A ProgressCallback. It draws when it is called and at no other time: no thread of its own."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._label = ""
        self._ended = False

    def __call__(self, progress: Progress) -> None:
        if self._ended:
            return
        if not sys.stderr.isatty():
            self._say_label(progress)
            return
        if progress.label != self._label:
            self.close()
            self._open(progress)
        assert self._bar is not None
        self._bar.update(
            self._bar.task_ids[0], completed=progress.done, total=progress.total or None, refresh=True
        )

    def close(self) -> None:
        """Takes the bar off the screen, so that other output can follow."""
        self._label = ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def end(self) -> None:
        """Takes the bar off for good: a thread that still loads a model may report after the command has ended."""
        self._ended = True
        self.close()

    def _say_label(self, progress: Progress) -> None:
        if progress.label != self._label:
            self._label = progress.label
            size = (
                f" ({progress.total / (1 << 20):.0f} MiB)" if progress.unit == "B" and progress.total else ""
            )
            say(f"{progress.label}{size}")

    def _open(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        amount: ProgressColumn = DownloadColumn() if progress.unit == "B" else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), amount)
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
        self._bar.add_task(progress.label, total=progress.total or None)
        self._bar.start()
        self._label = progress.label
