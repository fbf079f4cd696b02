"""One loaded program: its `main`, called with the input, and its result as JSON."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from inferlet import event_loop
from inferlet.errors import Deadlock, InferletError
from inferlet.return_value import get_return_value

from inferlet_guest.source_finder import SourceFinder
from inferlet_guest.tracebacks import describe


class ProgramFailed(Exception):
    """What goes to whoever runs the program: a code and a text for people."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Program:
    """The source files of one inferlet."""

    def __init__(self, files: Iterable[tuple[str, str]], entry: str) -> None:
        try:
            self._finder = SourceFinder(dict(files), entry)
        except InferletError as error:
            raise ProgramFailed(error.code, error.message) from None
        self._main: Callable[..., Any] | None = None

    def load(self) -> None:
        """Executes the entry file, which imports the others."""
        sys.meta_path.insert(0, self._finder)
        try:
            self._main = self._find_main(self._finder.execute_entry())
        except BaseException as error:
            raise self._failure(error) from None

    def run(self, text: str) -> str | None:
        """Calls `main` with the JSON input; None if the program returns nothing."""
        try:
            value = self._value(_parsed(text))
            return None if value is None else _as_json(value)
        except ProgramFailed:
            raise
        except BaseException as error:
            raise self._failure(error) from None
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _find_main(self, module: Any) -> Callable[..., Any]:
        main = getattr(module, "main", None)
        if not callable(main):
            raise InferletError(f"{self._finder.entry} defines no function main(input)", "program")
        found: Callable[..., Any] = main
        return found

    def _value(self, given: Any) -> Any:
        assert self._main is not None, "run before load"
        try:
            value = self._main(given) if _takes_input(self._main) else self._main()
            if inspect.isawaitable(value):
                value = event_loop.run(_awaited(value))
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                raise
            value = None
        return get_return_value() if value is None else value

    def _failure(self, error: BaseException) -> ProgramFailed:
        if isinstance(error, SystemExit):
            return ProgramFailed("guest", _last_words(error))
        return ProgramFailed(_code_of(error), describe(error, self._finder.paths))


def _code_of(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return "program"
    if isinstance(error, InferletError) and not isinstance(error, Deadlock):
        return error.code
    return "guest"


def _last_words(leaving: SystemExit) -> str:
    """As Python itself shows them: `sys.exit("text")` is an error for people, without a traceback."""
    return leaving.code if isinstance(leaving.code, str) else f"the program left with status {leaving.code}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ProgramFailed("invalid-request", f"the input is not JSON: {error}") from None


async def _awaited(value: Any) -> Any:
    return await value


def _takes_input(main: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(main).parameters.values()
    return any(parameter.kind in (*kinds, inspect.Parameter.VAR_POSITIONAL) for parameter in parameters)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=_refuse)
    except (TypeError, ValueError) as error:  # ValueError: it contains itself
        places = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        raise ProgramFailed(
            "guest", f"TypeError: main returned what JSON cannot hold: {error}{places}"
        ) from None


def _refuse(value: Any) -> Any:
    raise TypeError(
        f"a {type(value).__qualname__}; return text, numbers, booleans, None, lists and dicts of them"
    )
