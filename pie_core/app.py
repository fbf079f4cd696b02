"""Puts the parts together: plugins, models with their engines, and the sandbox in which programs run beside them.

client ── ProgramState ── sandbox ── host_api ── EngineClient ── EnginePort ── Engine ── Driver
"""

from __future__ import annotations

import asyncio
import getpass
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from pie_core.config import Config, ModelConfig, RuntimeConfig, parse_options
from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest, Progress, ProgressCallback
from pie_core.engine.engine import Engine
from pie_core.engine.local_port import LocalPort
from pie_core.engine.options import EngineOptions
from pie_core.errors import LoadError
from pie_core.guests import python_guest
from pie_core.host_api.engine_client import EngineClient
from pie_core.host_api.guest_state import ClientLink, ProgramState, ServedModel
from pie_core.host_api.interfaces import INTERFACES
from pie_core.ids import ModelName, ProcessId, Tenant
from pie_core.manifest import AskedLimits, Grants, checked_input, require_granted
from pie_core.models import with_paths
from pie_core.paths import programs_cache_dir, snapshots_dir
from pie_core.plugins import PluginRegistry, load_plugins
from pie_core.processes.messages import LoadModel
from pie_core.processes.remote_port import RemotePort
from pie_core.programs import ComponentProgram, ProgramSource, PythonProgram, find_program
from pie_core.sandbox.compilation import CompileLimits
from pie_core.sandbox.limits import MIB, Limits
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from pie_core.text.text_model import TextModel, load_text

T = TypeVar("T")

_KEPT_PROGRAMS = 256  # compiled and ready to start


class ProgramClient(ClientLink, Protocol):
    """A client that also has lines to say."""

    def progress(self, progress: Progress) -> None: ...

    async def next_line(self) -> str | None:
        """The next message for the program; None when there will be no more."""
        ...


class Application:
    """Models loaded and the sandbox ready. `async with Application(config, …) as app: await app.run(…)`."""

    def __init__(
        self, config: Config, progress: ProgressCallback, registry: PluginRegistry | None = None
    ) -> None:
        self._config = config
        self._progress = progress
        self._registry = registry or load_plugins()
        self._stack = AsyncExitStack()
        self._programs: dict[Path | None, asyncio.Task[Program]] = {}
        self._ports: dict[ModelName, LocalPort | RemotePort] = {}
        self._limits = _guest_limits(config.runtime)
        self.models: dict[ModelName, ServedModel] = {}
        self.runtime: Runtime

    async def __aenter__(self) -> Application:
        async with self._stack:
            self.start()
            for model in self._config.models:
                await self.load_model(model)
            self._stack = self._stack.pop_all()
        return self

    def start(self) -> None:
        """Makes the sandbox ready; models come by `load_model`, and `close` ends it all."""
        self.runtime = _new_runtime(self._config.runtime)
        self._stack.callback(self.runtime.close)
        self._stack.push_async_callback(self._unload_all)
        self._stack.push_async_callback(self._give_up_loading)

    async def close(self) -> None:
        await self._stack.aclose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def new_process(self, username: str, client: ClientLink, tenant: Tenant | None = None) -> ProgramState:
        """The state of a program that is about to run; without a tenant, the configuration's or the user's own."""
        tenant = tenant or Tenant(self._config.auth.tenant or username)
        process = ProcessId(secrets.token_hex(8))
        return ProgramState(process, username, tenant, self.models, client, self._limits.output_bytes)

    async def run(self, source: ProgramSource, arguments: Mapping[str, Any], state: ProgramState) -> Any:
        """Runs a program to its end and returns its value. Raises GuestError or what the program let through."""
        inputs, limits = self.launch_terms(source, arguments)
        program = await self._program(source)
        async with program.start(state, limits) as guest:
            if isinstance(source, PythonProgram):
                await guest.call("load", list(source.files), source.entry)
            returned = await guest.call("run", json.dumps(inputs))
        return None if returned is None else json.loads(returned)

    def launch_terms(
        self, source: ProgramSource, arguments: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Limits]:
        """The input with its defaults, and the limits. Raises RequestError where the manifest forbids the launch."""
        if source.manifest is None:
            return arguments, self._limits
        require_granted(source.manifest, _grants(self._config.runtime))
        inputs = checked_input(source.manifest, arguments)
        return inputs, _narrowed(self._limits, source.manifest.capabilities.limits)

    async def prepare(self) -> None:
        """Loads the Python guest before the first program needs it."""
        await self._loaded(None, "the Python guest")

    async def _program(self, source: ProgramSource) -> Program:
        if isinstance(source, ComponentProgram):
            return await self._loaded(source.path, source.name)
        return await self._loaded(None, "the Python guest")

    async def _loaded(self, path: Path | None, label: str) -> Program:
        """Of the component at `path`; None is the Python guest, whose file is looked for once only."""
        task = self._programs.get(path)
        if task is None or _has_failed(task):
            if len(self._programs) >= _KEPT_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))  # running guests keep theirs
            task = self._programs[path] = asyncio.ensure_future(self._load_program(path, label))
            task.add_done_callback(_has_failed)
        return await asyncio.shield(task)  # several may wait for it: one that gives up ends no other

    async def _load_program(self, path: Path | None, label: str) -> Program:
        def report(what: str, seconds: float) -> None:
            self._progress(Progress(what, int(seconds), 0, "s"))

        file = path if path is not None else await _in_thread(python_guest)
        return await Program.load(self.runtime, file, label, report)

    async def load_model(self, model: ModelConfig) -> None:
        """Programs find the model from now on, those that run already as well. Downloads it if need be."""
        served, port = await self._serve(await _in_thread(lambda: self._with_path(model)))
        self.models[served.name] = served
        self._ports[served.name] = port

    async def unload_model(self, name: ModelName) -> None:
        """Programs that use it get EngineLost."""
        self.models.pop(name, None)
        port = self._ports.pop(name, None)
        if port is not None:
            await port.close()

    async def _give_up_loading(self) -> None:
        for task in self._programs.values():
            if not task.done():
                await _cancelled(task)

    async def _unload_all(self) -> None:
        for name in list(self._ports):
            await self.unload_model(name)

    def has_engine(self, name: ModelName) -> bool:
        """Whether a loaded model can compute: an engine that was lost may be on its way back."""
        return name in self._ports and self._ports[name].is_ready

    def engine_pid(self, name: ModelName) -> int | None:
        """Of the process that a model runs in; None: this one, or none at the moment."""
        port = self._ports.get(name)
        return port.pid if isinstance(port, RemotePort) else None

    async def _serve(self, model: ModelConfig) -> tuple[ServedModel, LocalPort | RemotePort]:
        declaration = self._registry.driver(model.driver.type)
        port = await self._open_port(declaration, model)
        try:
            text = await _in_thread(lambda: _load_text(model, declaration, port.info.vocab_size))
        except BaseException:
            await port.close()
            raise
        return ServedModel(ModelName(model.name), EngineClient(port), text), port

    async def _open_port(self, declaration: DriverDeclaration, model: ModelConfig) -> LocalPort | RemotePort:
        if self._config.runtime.engine_process:
            # A wrong option is told here, with its place in the file.
            parse_options(declaration.options, model.driver.options)
            return await RemotePort.start(_load_message(model), self._progress)
        driver = await _in_thread(lambda: self._load_driver(declaration, model))
        return LocalPort(Engine(driver, _engine_options(model), model.name))

    def _with_path(self, model: ModelConfig) -> ModelConfig:
        alone = replace(self._config, models=(model,))
        return with_paths(alone, self._registry.drivers, self._progress).models[0]

    def _load_driver(self, declaration: DriverDeclaration, model: ModelConfig) -> Driver:
        return declaration.load(
            DriverRequest(
                model_path=model.path,
                device=",".join(model.driver.device),
                options=parse_options(declaration.options, model.driver.options),
                architectures=self._registry.architectures,
                media=self._registry.media,
                progress=self._progress,
            )
        )


async def run_program(
    config: Config, program: str, arguments: Mapping[str, Any], client: ProgramClient
) -> Any:
    """What `pie run` does: starts everything, runs one program with `client` as its client, ends everything."""
    source = find_program(program)
    async with Application(config, client.progress) as app:
        state = app.new_process(config.auth.user or getpass.getuser(), client)
        running = asyncio.create_task(app.run(source, arguments, state))
        reader = asyncio.create_task(_deliver_lines(client, state))
        try:
            await asyncio.wait((running, reader), return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and not running.done():
                reader.result()  # a client that cannot be read ends its program
            return await running
        finally:
            reader.cancel()
            await _cancelled(running)


async def _deliver_lines(client: ProgramClient, state: ProgramState) -> None:
    """Reads the client only when the program waits for it: lines that nobody asks for stay where they are."""
    await state.messages.wanted()
    while (line := await client.next_line()) is not None:
        state.messages.put(line)
        await state.messages.wanted()
    state.close_input()


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Ends a task and waits until it has cleaned up."""
    task.cancel()
    await asyncio.wait((task,))


def _load_text(model: ModelConfig, declaration: DriverDeclaration, vocab_size: int) -> TextModel:
    source = model.path or declaration.default_checkpoint
    if source is None:
        raise LoadError(f"model {model.name!r} has no checkpoint: set its `path` or `repo`")
    return load_text(source, vocab_size)


def _has_failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _new_runtime(config: RuntimeConfig) -> Runtime:
    limits = CompileLimits(
        wasm_bytes=config.max_program_bytes,
        memory_bytes=config.compile_memory_mb * MIB,
        seconds=config.compile_s,
    )
    return Runtime(INTERFACES, config.program_cache or programs_cache_dir(), compile_limits=limits)


def _guest_limits(config: RuntimeConfig) -> Limits:
    return Limits(
        memory_bytes=config.memory_mb * MIB,
        cpu_seconds_per_resume=config.cpu_s,
        wall_seconds=config.wall_s,
        output_bytes=config.output_bytes,
    )


def _grants(config: RuntimeConfig) -> Grants:
    return Grants(
        limits=AskedLimits(
            memory_mb=config.memory_mb,
            cpu_s=config.cpu_s,
            wall_s=config.wall_s,
            output_bytes=config.output_bytes,
        )
    )


def _narrowed(limits: Limits, asked: AskedLimits) -> Limits:
    """A program that asks for less than it could have gets no more than that."""
    chosen: dict[str, Any] = {
        "memory_bytes": asked.memory_mb and asked.memory_mb * MIB,
        "cpu_seconds_per_resume": asked.cpu_s,
        "wall_seconds": asked.wall_s,
        "output_bytes": asked.output_bytes,
    }
    return replace(limits, **{name: value for name, value in chosen.items() if value is not None})


def _load_message(model: ModelConfig) -> LoadModel:
    return LoadModel(
        model=model.name,
        driver=model.driver.type,
        path=None if model.path is None else str(model.path),
        device=",".join(model.driver.device),
        driver_options=dict(model.driver.options),
        engine_options=_engine_options(model),
        log_level=logging.getLogger().getEffectiveLevel(),
    )


def _engine_options(model: ModelConfig) -> EngineOptions:
    scheduler, limits = model.scheduler, model.limits
    chosen: dict[str, Any] = {
        "speculation_depth": scheduler.speculation_depth,
        "prefix_cache": scheduler.prefix_cache,
        "request_timeout_s": scheduler.request_timeout_s,
        "max_batch_tokens": scheduler.max_batch_tokens,
        "max_batch_requests": scheduler.max_batch_requests,
        "max_contexts_per_process": limits.contexts_per_program,
        "max_contexts_per_tenant": limits.contexts_per_tenant,
        "max_requests_per_process": limits.requests_per_program,
        "max_requests_per_tenant": limits.requests_per_tenant,
        "max_tokens_per_process": limits.tokens_per_program,
        "max_page_share_per_process": limits.page_share_per_program,
        "max_page_share_per_tenant": limits.page_share_per_tenant,
        "max_snapshots": limits.snapshots_per_tenant,
        "snapshot_folder": str(snapshots_dir(model.name)) if model.persist_snapshots else None,
        "snapshot_ttl_s": model.snapshot_ttl_s,
    }
    return replace(EngineOptions(), **{name: value for name, value in chosen.items() if value is not None})


async def _in_thread(call: Callable[[], T]) -> T:
    """Like asyncio.to_thread, with a daemon thread: Ctrl-C while a model loads does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_result: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_result(value)

    def work() -> None:
        try:
            value = call()
        except BaseException as error:  # carried to the loop, which raises it where it is awaited
            loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, future.set_result, value)

    threading.Thread(target=work, name="pie-load", daemon=True).start()
    return await future
