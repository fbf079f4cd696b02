"""A whole pie in this Python process, without a server: for scripts, notebooks and tests.

    from pie_core import Pie

    with Pie() as pie:
        print(pie.generate("Name a river."))

Everything runs on an event loop of its own thread, so that it works wherever it is called from, in a notebook too,
whose thread has a running loop already. `Pie` waits for its answers; `AsyncPie` is the same to be awaited.
"""

from __future__ import annotations

import asyncio
import codecs
import concurrent.futures.thread  # noqa: F401 (its ending is to be registered before ours)
import getpass
import json
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from pie_core.app import Application
from pie_core.config import Config, load_config, parse_config, read_config
from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import Cancelled, Unavailable
from pie_core.host_api.guest_state import ProgramState
from pie_core.programs import ENTRY, ProgramSource, PythonProgram, find_program

T = TypeVar("T")

Configuration = Config | Path | str | Mapping[str, Any] | None
Program = str | Path | ProgramSource
Prompt = str | Sequence[Mapping[str, str]]
EventKind = Literal["stdout", "stderr", "message", "file"]

# What `generate` and `stream` run. The turns come as they are; the last word is the model's.
_CONVERSATION = '''
"""Answers a conversation, piece by piece."""

from inferlet import Context, Model, Sampler, session


async def main(input):
    context = Context(Model.load(input["model"]))
    for turn in input["turns"]:
        getattr(context, turn["role"])(turn["content"])
    sampler = Sampler.top_p(input["temperature"], input["top_p"])
    async for piece in context.generate(sampler, max_tokens=input["max_tokens"]).stream():
        session.send(piece)
'''
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a program printed or sent; `data` is bytes for files and text for all else."""

    kind: EventKind
    data: Any

    @property
    def text(self) -> str:
        """What it printed on stdout or sent as a message; empty for the other kinds."""
        return str(self.data) if self.kind in ("stdout", "message") else ""


class _Outbox:
    """The client of one program: keeps its events until they are taken. What it keeps is bounded by output_bytes."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._closed = False
        self._decoders = {
            kind: codecs.getincrementaldecoder("utf-8")("replace") for kind in ("stdout", "stderr")
        }

    def on_message(self, message: str) -> None:
        self._put("message", message)

    def on_file(self, content: bytes) -> None:
        self._put("file", content)

    def on_stdout(self, data: bytes) -> None:
        self._put_text("stdout", data)

    def on_stderr(self, data: bytes) -> None:
        self._put_text("stderr", data)

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def take(self) -> list[Event]:
        """All that has come since; waits for some, and is empty once there will be no more."""
        if not self._closed:
            await self._news.wait()
        taken, self._events = self._events, []
        if not self._closed:
            self._news.clear()
        return taken

    def _put_text(self, kind: Literal["stdout", "stderr"], data: bytes) -> None:
        if text := self._decoders[kind].decode(data):
            self._put(kind, text)

    def _put(self, kind: EventKind, data: str | bytes) -> None:
        self._events.append(Event(kind, data))
        self._news.set()


class _Running:
    """One program on the loop of the thread; only coroutines that run there touch it."""

    def __init__(
        self, app: Application, source: ProgramSource, given: Mapping[str, Any], user: str, priority: int
    ) -> None:
        app.launch_terms(source, given)  # what the manifest forbids is told at once
        self._name = source.name
        self.outbox = _Outbox()
        self.state: ProgramState = app.new_process(user, self.outbox, priority=priority)
        self.task = asyncio.create_task(self._run(app, source, given))

    async def _run(self, app: Application, source: ProgramSource, given: Mapping[str, Any]) -> Any:
        try:
            return await app.run(source, given, self.state)
        finally:
            self.outbox.close()

    async def result(self) -> Any:
        await asyncio.wait((self.task,))
        if self.task.cancelled():
            raise Cancelled(f"the program {self._name!r} was cancelled")
        return self.task.result()

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.wait((self.task,))

    async def send(self, message: str) -> None:
        self.state.messages.put(message)

    async def send_file(self, content: bytes) -> None:
        self.state.files.put(content)

    async def close_input(self) -> None:
        self.state.close_input()


class _Thread:
    """An application on an event loop of its own thread, and the programs that run in it."""

    def __init__(self, config: Config, progress: ProgressCallback) -> None:
        self._config = config
        self._app = Application(config, progress)
        self._loop = asyncio.new_event_loop()
        self._running: set[_Running] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pie", daemon=True)
        self._thread.start()
        self.is_closed = False

    def submit(self, call: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs it over there. Raises Unavailable after the end."""
        if self.is_closed:
            call.close()
            raise Unavailable("this pie is closed; make another one")
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def start(self) -> None:
        await self._app.__aenter__()

    async def launch(self, source: ProgramSource, given: Mapping[str, Any], priority: int) -> _Running:
        running = _Running(self._app, source, given, self._config.auth.user or getpass.getuser(), priority)
        self._running.add(running)
        running.task.add_done_callback(lambda _: self._running.discard(running))
        return running

    def close(self) -> None:
        """Ends every program and the thread. Called once, from another thread, or when the interpreter ends."""
        if self.is_closed:
            return
        ended = self.submit(self._end())
        self.is_closed = True
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        for running in list(self._running):
            await running.cancel()
        await self._app.close()
        await self._loop.shutdown_default_executor()

    def models(self) -> list[str]:
        return list(self._app.models)


def _waited(future: Future[T]) -> T:
    """Its result; Ctrl-C while waiting cancels what it stands for."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


_open: weakref.WeakSet[_Thread] = weakref.WeakSet()


def _close_all() -> None:
    for thread in list(_open):
        thread.close()


# At the interpreter's end, closing needs threads, and those of `atexit` run when none can be started any more.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]


class Run:
    """A running program. Iterating gives its events as they come and ends with the program."""

    def __init__(self, thread: _Thread, running: _Running) -> None:
        self._thread = thread
        self._running = running

    def __iter__(self) -> Iterator[Event]:
        while events := _waited(self._thread.submit(self._running.outbox.take())):
            yield from events

    def result(self) -> Any:
        """What it returns, once it has. Raises GuestError, or what ended it."""
        return _waited(self._thread.submit(self._running.result()))

    def send(self, message: str) -> None:
        """A message, which the program gets from `session.receive()`."""
        _waited(self._thread.submit(self._running.send(message)))

    def send_file(self, content: bytes) -> None:
        _waited(self._thread.submit(self._running.send_file(content)))

    def close_input(self) -> None:
        """There will be no more messages and files."""
        _waited(self._thread.submit(self._running.close_input()))

    def cancel(self) -> None:
        """Ends it; returns when it has gone."""
        _waited(self._thread.submit(self._running.cancel()))


class AsyncRun:
    """`Run`, to be awaited."""

    def __init__(self, thread: _Thread, running: _Running) -> None:
        self._thread = thread
        self._running = running

    async def __aiter__(self) -> AsyncIterator[Event]:
        while events := await self._wait(self._running.outbox.take()):
            for event in events:
                yield event

    async def result(self) -> Any:
        return await self._wait(self._running.result())

    async def send(self, message: str) -> None:
        await self._wait(self._running.send(message))

    async def send_file(self, content: bytes) -> None:
        await self._wait(self._running.send_file(content))

    async def close_input(self) -> None:
        await self._wait(self._running.close_input())

    async def cancel(self) -> None:
        await self._wait(self._running.cancel())

    async def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self._thread.submit(call))


class Pie:
    """Models and programs in this process. Making one loads the models; `close`, or `with`, ends it all.

    `config` is a file, a mapping of what a file would hold, or None for the default one. `progress` is told about
    downloads and loading.
    """

    def __init__(self, config: Configuration = None, progress: ProgressCallback | None = None) -> None:
        self._thread = _Thread(_config_of(config), progress or _ignore)
        try:
            _waited(self._thread.submit(self._thread.start()))
        except BaseException:
            self._thread.close()
            raise
        self._end = weakref.finalize(self, self._thread.close)
        self._end.atexit = False  # `_close_all` comes before
        _open.add(self._thread)

    def __enter__(self) -> Pie:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what still runs and frees the models. Closing twice is allowed."""
        self._end()

    @property
    def models(self) -> list[str]:
        """The names of what is loaded; the first is the default."""
        return self._thread.models()

    def launch(self, program: Program, priority: int = 0, /, **given: Any) -> Run:
        """Starts a program by name or path, or source text of several lines, with `given` as its input.

        Passes of programs with a higher priority go first.
        """
        launched = self._thread.launch(_source_of(program), given, priority)
        return Run(self._thread, _waited(self._thread.submit(launched)))

    def run(self, program: Program, /, **given: Any) -> Any:
        """Runs a program to its end and gives what it returns."""
        return self.launch(program, **given).result()

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """The model's answer in pieces; takes what `generate` takes. To break off ends the generation."""
        return _pieces(self.launch(_CONVERSATION, **_conversation(prompt, **options)))

    def generate(self, prompt: Prompt, **options: Any) -> str:
        """The model's answer to a prompt, or to a conversation: [{"role": "user", "content": "…"}, …].

        Options: system, model, max_tokens (256), temperature (0.6; 0 is greedy), top_p (0.95).
        """
        return "".join(self.stream(prompt, **options))


class AsyncPie:
    """`Pie`, to be awaited: `async with AsyncPie() as pie: print(await pie.generate("Name a river."))`."""

    def __init__(self, config: Configuration = None, progress: ProgressCallback | None = None) -> None:
        self._config = config
        self._progress = progress
        self._pie: Pie | None = None

    async def __aenter__(self) -> AsyncPie:
        self._pie = await asyncio.to_thread(Pie, self._config, self._progress)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._pie is not None:
            await asyncio.to_thread(self._pie.close)

    @property
    def models(self) -> list[str]:
        return self._thread.models()

    async def launch(self, program: Program, priority: int = 0, /, **given: Any) -> AsyncRun:
        source = await asyncio.to_thread(_source_of, program)
        running = await asyncio.wrap_future(self._thread.submit(self._thread.launch(source, given, priority)))
        return AsyncRun(self._thread, running)

    async def run(self, program: Program, /, **given: Any) -> Any:
        return await (await self.launch(program, **given)).result()

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncIterator[str]:
        run = await self.launch(_CONVERSATION, **_conversation(prompt, **options))
        try:
            async for event in run:
                yield event.text
            await run.result()
        finally:
            await run.cancel()

    async def generate(self, prompt: Prompt, **options: Any) -> str:
        return "".join([piece async for piece in self.stream(prompt, **options)])

    @property
    def _thread(self) -> _Thread:
        if self._pie is None:
            raise Unavailable("this pie has not started: use `async with AsyncPie() as pie:`")
        return self._pie._thread


def _pieces(run: Run) -> Iterator[str]:
    try:
        for event in run:
            yield event.text
        run.result()
    finally:
        run.cancel()


def _conversation(
    prompt: Prompt,
    *,
    system: str | None = None,
    model: str = "",
    max_tokens: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.95,
) -> dict[str, Any]:
    """The input of the program that answers. Raises ValueError for turns that are none."""
    turns = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    )
    for turn in turns:
        if turn.keys() != {"role", "content"} or turn["role"] not in _ROLES:
            raise ValueError(f"a turn has a role ({', '.join(_ROLES)}) and a content; found {turn}")
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    return {
        "turns": turns,
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }


def _source_of(program: Program) -> ProgramSource:
    """Raises ProgramError for a name or path that leads nowhere."""
    if isinstance(program, str) and "\n" in program:
        return PythonProgram("the source text", ((ENTRY, program),), ENTRY)
    return find_program(str(program)) if isinstance(program, str | Path) else program


def _config_of(config: Configuration) -> Config:
    """Raises ConfigError."""
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return parse_config(
            json.dumps(dict(config), default=str), "the configuration", Path.cwd()
        )  # JSON is YAML
    return load_config() if config is None else read_config(Path(config))


def _ignore(progress: Progress) -> None:
    """Nobody watches."""
