"""How a command ends: its exit code, and what it says on stderr.

0 done; 1 the program failed, or something it needs did; 2 wrong usage or configuration; 128 + signal for Ctrl-C (130)
and termination (143).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer

from pie_core.errors import ConfigError, GuestError, PieError

FAILED, USAGE, INTERRUPTED = 1, 2, 128 + signal.SIGINT

P = ParamSpec("P")
R = TypeVar("R")


class UsageProblem(PieError):
    """The command line asks for something that does not exist or does not go together."""

    code = "usage"


@contextmanager
def as_usage(*kinds: type[PieError]) -> Iterator[None]:
    """Errors of these kinds are of what the command was given: their words are those of a UsageProblem."""
    try:
        yield
    except kinds as error:
        raise UsageProblem(str(error)) from None


@contextmanager
def making(folder: Path | str) -> Iterator[None]:
    """What keeps a new folder from being made is told as a UsageProblem."""
    try:
        yield
    except FileExistsError:
        raise UsageProblem(f"{folder} exists; choose another name") from None
    except OSError as error:
        raise UsageProblem(f"{folder} cannot be made: {error.strerror}") from None


class Interrupted(Exception):
    """A signal ended the command."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def say(text: str) -> None:
    typer.echo(text, err=True)


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Wraps a command so that every error which has a place in the error tree ends it with words and a code."""

    @functools.wraps(command)
    def reported(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except PieError as error:
            say(_told(error))
            raise typer.Exit(USAGE if isinstance(error, ConfigError | UsageProblem) else FAILED) from None
        except Interrupted as interruption:
            raise typer.Exit(interruption.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return reported


def _told(error: PieError) -> str:
    """A guest's error is its own text, traceback included; ours say that they are errors."""
    text = str(error)
    is_traceback = text.startswith(("Traceback ", "  File "))  # of a program that could not even be loaded
    return text if isinstance(error, GuestError) or is_traceback else f"error: {text}"


@contextmanager
def ending_well() -> Iterator[None]:
    """Around the whole program: no traceback for Ctrl-C or a reader that went away, and none while it shuts down."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(FAILED)
    finally:
        # The outcome is settled; a further Ctrl-C must not turn the interpreter's own ending into a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _discard_stdout() -> None:
    """Or the interpreter's last flush would fail again, with a message."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
