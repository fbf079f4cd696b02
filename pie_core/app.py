"""Puts the parts together: plugins, models with their engines, and the sandbox in which programs run beside them.

client ── ProgramState ── sandbox ── host_api ── EngineClient ── EnginePort ── Engine ── Driver
"""

from __future__ import annotations

import asyncio
import getpass
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from pie_core.config import Config, ModelConfig, RuntimeConfig, TelemetryConfig, parse_options
from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest, Progress, ProgressCallback
from pie_core.engine.local_port import LocalPort
from pie_core.engine.options import EngineOptions
from pie_core.engine.traced_engine import engine_of
from pie_core.errors import LoadError
from pie_core.host_api.engine_client import EngineClient
from pie_core.host_api.guest_state import ClientLink, ProgramState, ServedModel, Standing, served_model
from pie_core.host_api.interfaces import INTERFACES
from pie_core.ids import ModelName, ProcessId, Tenant
from pie_core.manifest import AskedLimits, Grants, checked_input, require_granted
from pie_core.models import with_paths
from pie_core.paths import programs_cache_dir, snapshots_dir
from pie_core.plugins import PluginRegistry, load_plugins
from pie_core.processes.daemon_threads import in_daemon_thread
from pie_core.processes.launches import Launches, OwnPrograms
from pie_core.processes.messages import LoadModel
from pie_core.processes.processors import automatic_workers, usable_processors
from pie_core.processes.program_runner import ProgramRunner
from pie_core.processes.remote_port import RemotePort
from pie_core.processes.worker_messages import AddModel, Counts, StartWorker
from pie_core.processes.workers import Workers
from pie_core.programs import ProgramSource, find_program
from pie_core.sandbox.compilation import CompileLimits
from pie_core.sandbox.limits import MIB, Limits
from pie_core.sandbox.quick_calls import built_library
from pie_core.sandbox.runtime import Runtime
from pie_core.telemetry.exporting import start_tracing
from pie_core.telemetry.tracing import TraceSettings, Tracing, spanning
from pie_core.text.text_model import TextModel, load_text


class ProgramClient(ClientLink, Protocol):
    """A client that also has lines to say."""

    def progress(self, progress: Progress) -> None: ...

    async def next_line(self) -> str | None:
        """The next message for the program; None when there will be no more."""
        ...


Port = LocalPort | RemotePort
Ports = Sequence[Port]  # of one model: one for each replica


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine of a model."""

    is_ready: bool  # False from its loss until it has loaded the model again, and all workers know
    pid: int | None  # of its process; None: it has none of its own, or none at the moment
    restarts: int


class Application:
    """Models loaded and the sandbox ready. `async with Application(config, …) as app: await app.run(…)`."""

    def __init__(
        self,
        config: Config,
        progress: ProgressCallback,
        registry: PluginRegistry | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`tracing` gets this process's spans instead of what the configuration names."""
        self._config = config
        self._progress = progress
        self._registry = registry or load_plugins()
        self._tracing = tracing or _tracing(config)
        self._stack = AsyncExitStack()
        self._ports: dict[ModelName, Ports] = {}
        self._limits = _guest_limits(config.runtime, _num_workers(config))
        self.launches = Launches(config.runtime, OwnPrograms(self))
        self.models: dict[ModelName, ServedModel] = {}
        self.load_seconds: dict[ModelName, float] = {}  # how long the models that are loaded took
        self.runtime: Runtime
        self._runner: ProgramRunner
        self._workers: Workers | None = None

    async def __aenter__(self) -> Self:
        async with self._stack:
            self.start()
            for model in self._config.models:
                await self.load_model(model)
            self._stack = self._stack.pop_all()
        return self

    def start(self) -> None:
        """Makes the sandbox ready; models come by `load_model`, and `close` ends it all."""
        if self._tracing is not None:
            self._stack.push_async_callback(self._tracing.close)
        self.runtime = _new_runtime(self._config.runtime)
        self._stack.callback(self.runtime.close)
        self._stack.push_async_callback(self._unload_all)
        self._runner = ProgramRunner(self.runtime, self._progress, self._tracing)
        self._stack.push_async_callback(self._runner.close)
        workers = _num_workers(self._config)
        if workers:
            self._workers = Workers(workers, _start_message(self._config), self._progress)
            self._stack.push_async_callback(self._workers.close)
        self._stack.push_async_callback(self.launches.close)

    async def close(self) -> None:
        await self._stack.aclose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def new_process(
        self,
        username: str,
        client: ClientLink,
        tenant: Tenant | None = None,
        priority: int = 0,
        traceparent: str | None = None,
        parent: ProgramState | None = None,
    ) -> ProgramState:
        """The state of a program that is about to run; without a tenant, the configuration's or the user's own."""
        return ProgramState(
            ProcessId(secrets.token_hex(8)),
            username,
            tenant or Tenant(self._config.auth.tenant or username),
            self.models,
            client,
            self._limits.output_bytes,
            priority=priority,
            traceparent=traceparent,
            launcher=self.launches,
            parent=parent,
        )

    async def run(self, source: ProgramSource, arguments: Mapping[str, Any], state: ProgramState) -> Any:
        """Runs a program to its end and returns its value. Raises GuestError or what the program let through."""
        inputs, standing = self.launch_terms(source, arguments, state.inherited)
        state.standing = standing
        runner = self._workers or self._runner
        with self._traced(source, state):
            returned = await runner.run(source, json.dumps(inputs), standing.limits, state)
        return None if returned is None else json.loads(returned)

    @contextmanager
    def _traced(self, source: ProgramSource, state: ProgramState) -> Iterator[None]:
        """Whatever the program does belongs to its span, in whatever process it is done."""
        known = {"pie.process": state.process, "pie.program": source.name, "pie.user": state.username}
        with spanning(self._tracing, f"program {source.name}", state.traceparent, known, "server") as span:
            if span is not None:
                state.traceparent = span.traceparent
            yield

    def launch_terms(
        self, source: ProgramSource, arguments: Mapping[str, Any], inherited: Standing | None = None
    ) -> tuple[Mapping[str, Any], Standing]:
        """The input with its defaults, and what the program may do: at most what the one that launches it may.

        Raises RequestError where the manifest forbids the launch.
        """
        limits, manifest = self._limits if inherited is None else inherited.limits, source.manifest
        children = self._config.runtime.children_per_program
        if manifest is None:
            return arguments, Standing(limits, children, "runtime.children_per_program")
        require_granted(manifest, Grants(children=children, limits=_most(limits)))
        inputs = checked_input(manifest, arguments)
        asked = manifest.capabilities
        option = f"children under [capabilities] in the Pie.toml of {manifest.label}"
        return inputs, Standing(_narrowed(limits, asked.limits), asked.children, option)

    async def prepare(self) -> None:
        """Loads the Python guest before the first program needs it."""
        await (self._workers or self._runner).prepare()

    @property
    def live_guests(self) -> int:
        """Programs that run, in this process and in workers."""
        return self.runtime.live_guests + (0 if self._workers is None else self._workers.live_guests)

    @property
    def worker_pids(self) -> list[int]:
        return [] if self._workers is None else self._workers.pids

    @property
    def runs_programs(self) -> bool:
        """False while every worker is lost: new programs wait for the next one."""
        return self._workers is None or bool(self._workers.pids) or not self.models

    @property
    def worker_restarts(self) -> int:
        return 0 if self._workers is None else self._workers.restarts

    @property
    def registry(self) -> PluginRegistry:
        return self._registry

    async def guest_counts(self, patience_s: float) -> list[tuple[int, int, Counts | None]]:
        """Of each process that runs programs its id, how many these are, and its counts if it answers in time."""
        if self._workers is not None:
            return await self._workers.counts(patience_s)
        return [(os.getpid(), self.runtime.live_guests, Counts.of(self.runtime))]

    async def load_model(self, model: ModelConfig) -> None:
        """Programs find the model from now on, those that run already as well. Downloads it if need be."""
        started = time.monotonic()
        model = await in_daemon_thread(lambda: self._with_path(model))
        declaration = self._registry.driver(model.driver.type)
        ports = await self._open_ports(declaration, model)
        try:
            text = await in_daemon_thread(lambda: _load_text(model, declaration, ports[0].info.vocab_size))
            await self._serve_in_workers(model, ports)
        except BaseException:
            await _close_all(ports)
            raise
        name = ModelName(model.name)
        self.models[name] = served_model(
            name, [EngineClient(port, programs=self.runtime.pump) for port in ports], text
        )
        self._ports[name] = ports
        self.load_seconds[name] = time.monotonic() - started

    async def unload_model(self, name: ModelName) -> None:
        """Programs that use it get EngineLost."""
        self.models.pop(name, None)
        self.load_seconds.pop(name, None)
        if self._workers is not None:
            self._workers.remove_model(name)
        await _close_all(self._ports.pop(name, ()))

    async def _unload_all(self) -> None:
        for name in list(self._ports):
            await self.unload_model(name)

    def replicas(self, name: ModelName) -> tuple[Replica, ...]:
        """How the engines of a loaded model do; none of one that is not loaded."""
        return tuple(
            Replica(self._is_reached(port), *_process_of(port)) for port in self._ports.get(name, ())
        )

    def _is_reached(self, port: Port) -> bool:
        """By programs, wherever they run."""
        if self._workers is None or not isinstance(port, RemotePort) or port.listens_at is None:
            return port.is_ready
        return port.is_ready and self._workers.reach(port.listens_at, port.pid)

    def has_engine(self, name: ModelName) -> bool:
        """Whether a loaded model can compute: engines that were lost may be on their way back."""
        return any(replica.is_ready for replica in self.replicas(name))

    def engine_pid(self, name: ModelName) -> int | None:
        """Of the process of a loaded model's first engine; None: this one, or none at the moment."""
        return next((replica.pid for replica in self.replicas(name)), None)

    async def _open_ports(self, declaration: DriverDeclaration, model: ModelConfig) -> Ports:
        if self._config.runtime.engine_process or self._workers is not None or model.replicas > 1:
            # A wrong option is told here, with its place in the file.
            parse_options(declaration.options, model.driver.options)
            return await _started(self._load_messages(model), self._progress)
        driver = await in_daemon_thread(lambda: self._load_driver(declaration, model))
        engine = engine_of(driver, _engine_options(model), model.name, self._tracing)
        return (LocalPort(engine),)

    def _load_messages(self, model: ModelConfig) -> list[LoadModel]:
        """One for each replica."""
        sockets = self._workers.new_socket if self._workers is not None else lambda: None
        telemetry = self._config.telemetry
        return [_load_message(model, devices, sockets(), telemetry) for devices in model.devices_of_replicas]

    async def _serve_in_workers(self, model: ModelConfig, ports: Ports) -> None:
        if self._workers is None:
            return
        engines = [port.listens_at for port in ports if isinstance(port, RemotePort)]
        engines_at = tuple(path for path in engines if path is not None)
        checkpoint = _text_checkpoint(model, self._registry.driver(model.driver.type))
        await self._workers.add_model(AddModel(ModelName(model.name), engines_at, str(checkpoint)))

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
                swap_bytes=model.swap_memory_mb * MIB,
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


def _process_of(port: Port) -> tuple[int | None, int]:
    """Its id, and how many were before it."""
    return (port.pid, port.restarts) if isinstance(port, RemotePort) else (None, 0)


async def _started(asked: Sequence[LoadModel], progress: ProgressCallback) -> Ports:
    """All engines at once. Raises what the first one fails with that does; none is left then."""
    starting = [asyncio.ensure_future(RemotePort.start(each, progress)) for each in asked]
    try:
        return tuple(await asyncio.gather(*starting))
    except BaseException:
        for each in starting:
            each.cancel()
        ended = await asyncio.gather(*starting, return_exceptions=True)
        await _close_all([port for port in ended if isinstance(port, RemotePort)])
        raise


async def _close_all(ports: Sequence[Port]) -> None:
    await asyncio.gather(*(port.close() for port in ports))


def _load_text(model: ModelConfig, declaration: DriverDeclaration, vocab_size: int) -> TextModel:
    return load_text(_text_checkpoint(model, declaration), vocab_size)


def _text_checkpoint(model: ModelConfig, declaration: DriverDeclaration) -> Path:
    source = model.path or declaration.default_checkpoint
    if source is None:
        raise LoadError(f"model {model.name!r} has no checkpoint: set its `path` or `repo`")
    return source


def _tracing(config: Config) -> Tracing | None:
    settings = _trace_settings(config.telemetry)
    return None if settings is None else start_tracing(settings, "server")


def _trace_settings(config: TelemetryConfig) -> TraceSettings | None:
    traces = config.traces
    if traces.exporter == "none":
        return None
    file = None if traces.file is None else str(traces.file)
    return TraceSettings(traces.exporter, traces.endpoint, file, traces.sample_ratio)


def _new_runtime(config: RuntimeConfig) -> Runtime:
    cache = config.program_cache or programs_cache_dir()
    return Runtime(INTERFACES, cache, compile_limits=_compile_limits(config), quick_calls=built_library())


def _compile_limits(config: RuntimeConfig) -> CompileLimits:
    return CompileLimits(
        wasm_bytes=config.max_program_bytes,
        memory_bytes=config.compile_memory_mb * MIB,
        seconds=config.compile_s,
    )


def _start_message(config: Config) -> StartWorker:
    runtime = config.runtime
    return StartWorker(
        worker=0,
        cache_folder=str(runtime.program_cache or programs_cache_dir()),
        compile_limits=_compile_limits(runtime),
        output_bytes=runtime.output_bytes,
        log_level=logging.getLogger().getEffectiveLevel(),
        log_format=config.telemetry.log_format,
        traces=_trace_settings(config.telemetry),
    )


def _num_workers(config: Config) -> int:
    asked = config.runtime.workers
    if asked != "auto":
        return asked
    return automatic_workers(usable_processors(), sum(model.replicas for model in config.models))


def _guest_limits(config: RuntimeConfig, num_workers: int) -> Limits:
    tenant = config.calls_per_s_per_tenant
    return Limits(
        memory_bytes=config.memory_mb * MIB,
        cpu_seconds_per_resume=config.cpu_s,
        wall_seconds=config.wall_s,
        output_bytes=config.output_bytes,
        calls_per_second=config.calls_per_s_per_program,
        tenant_calls_per_second=None if tenant is None else tenant / max(num_workers, 1),
    )


def _most(limits: Limits) -> AskedLimits:
    return AskedLimits(
        memory_mb=limits.memory_bytes // MIB,
        cpu_s=limits.cpu_seconds_per_resume,
        wall_s=limits.wall_seconds,
        output_bytes=limits.output_bytes,
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


def _load_message(
    model: ModelConfig, devices: Sequence[str], listen_at: str | None, telemetry: TelemetryConfig
) -> LoadModel:
    return LoadModel(
        model=model.name,
        driver=model.driver.type,
        path=None if model.path is None else str(model.path),
        device=",".join(devices),
        driver_options=dict(model.driver.options),
        engine_options=_engine_options(model),
        log_level=logging.getLogger().getEffectiveLevel(),
        listen_at=listen_at,
        log_format=telemetry.log_format,
        traces=_trace_settings(telemetry),
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
        "max_tokens_per_minute_per_tenant": limits.tokens_per_minute_per_tenant,
        "max_page_share_per_process": limits.page_share_per_program,
        "max_page_share_per_tenant": limits.page_share_per_tenant,
        "max_snapshots": limits.snapshots_per_tenant,
        "snapshot_folder": str(snapshots_dir(model.name)) if model.persist_snapshots else None,
        "shares_snapshot_folder": model.replicas > 1,
        "snapshot_ttl_s": model.snapshot_ttl_s,
        "swap_bytes": model.swap_memory_mb * MIB,
        "swap_gb_per_s": model.swap_gb_per_s,
    }
    return replace(EngineOptions(), **{name: value for name, value in chosen.items() if value is not None})
