"""Every setting of pie: one tree of frozen dataclasses, each key with its type, bounds, default and help.

The file's checks, `docs/configuration.md`, the template of `pie config init` and the editors' schema are all
made from these annotations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pie_core.config.annotations import Expects
from pie_core.config.options import Options
from pie_core.config.validation import Misfit

DEFAULT_MODEL = "default"

Text = Annotated[str, Field(min_length=1)]
LogLevel = Literal["debug", "info", "warning", "error"]


def _in_this_process(workers: int) -> int:
    if workers != 0:
        raise Misfit(
            f"expected 0, but found {workers}: this version runs programs in one process; "
            "separate worker processes are not built yet"
        )
    return workers


def _no_run_ahead(depth: int) -> int:
    if depth != 0:
        raise Misfit(
            f"expected 0, but found {depth}: this version runs no pass ahead of the program that asks for it"
        )
    return depth


def _as_devices(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Between a program and its client; with `pie run` the client is the terminal."""

    max_message_bytes: Annotated[
        int,
        Field(
            ge=1, le=1 << 30, description="The longest message that a client may send to a program, in bytes."
        ),
    ] = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Whose programs run."""

    user: Annotated[
        Text | None,
        Field(description="Whose the programs of `pie run` are; null is your login name."),
    ] = None
    tenant: Annotated[
        Text | None, Field(description="Who shares snapshots and cached prefixes; null is the user alone.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """What pie tells about its own work."""

    log_level: Annotated[
        LogLevel,
        Field(description="The least important log lines to write to stderr; `--log-level` goes before it."),
    ] = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Limits of every running program, and of compiling one."""

    workers: Annotated[
        int,
        AfterValidator(_in_this_process),
        Field(
            ge=0,
            description="Processes that run programs; 0, so far the only choice, is this process itself.",
            json_schema_extra={"const": 0},
        ),
    ] = 0
    memory_mb: Annotated[
        int, Field(ge=1, le=4096, description="The most memory that one program may have, in MiB.")
    ] = 512
    cpu_s: Annotated[
        float,
        Field(
            gt=0,
            le=86400,
            description="Processor time between two waits of a program, in seconds; it ends beyond.",
        ),
    ] = 10.0
    wall_s: Annotated[
        float | None,
        Field(
            gt=0,
            description="How long a program may run in all, in seconds, waiting included; null is no limit.",
        ),
    ] = None
    output_bytes: Annotated[
        int, Field(ge=1, description="What a program may print, and again what it may send, in bytes; it ends beyond.")
    ] = 16 << 20
    program_cache: Annotated[
        Path | None,
        Field(description="The folder of compiled programs; null is `cache/programs` in PIE_HOME."),
    ] = None
    max_program_bytes: Annotated[
        int, Field(ge=1, description="The largest program accepted, in bytes of source or WebAssembly.")
    ] = 256 << 20
    compile_s: Annotated[
        float, Field(gt=0, le=86400, description="How long compiling a program may take, in seconds.")
    ] = 300.0
    compile_memory_mb: Annotated[
        int, Field(ge=256, description="The most memory that compiling a program may take, in MiB.")
    ] = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverConfig:
    """What runs the model."""

    type: Annotated[Text, Field(description="The driver's name; `pie doctor` lists the installed ones.")] = (
        "portable"
    )
    device: Annotated[
        tuple[Text, ...],
        BeforeValidator(_as_devices, json_schema_input_type=str | list[str]),
        Expects("a device name or a list of them"),
        Field(min_length=1, description="The device or list of devices to run on, as the driver names them."),
    ] = ("cpu",)
    options: Annotated[
        Options, Field(description="The driver's own settings; `pie config options DRIVER` lists them.")
    ] = field(default_factory=Options)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How the passes of many programs become batches."""

    speculation_depth: Annotated[
        int,
        AfterValidator(_no_run_ahead),
        Field(
            ge=0,
            description="Passes to run before a program asks for them; 0, so far the only choice, is none.",
            json_schema_extra={"const": 0},
        ),
    ] = 0
    max_batch_tokens: Annotated[
        int | None, Field(ge=1, description="The most tokens in one batch; null is what the driver takes.")
    ] = None
    max_batch_requests: Annotated[
        int | None,
        Field(ge=1, description="The most forward passes in one batch; null is what the driver takes."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model to serve: weights from a path, from a repository, or from the store of `pie model list`."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
            description="How programs call the model. Without `path` and `repo` it also names the model of the store; "
            f"`{DEFAULT_MODEL}` is fetched into it on first use.",
        ),
    ]
    path: Annotated[
        Path | None,
        Field(
            description="A Hugging Face folder or a GGUF file; relative to the configuration file's folder."
        ),
    ] = None
    repo: Annotated[
        Text | None,
        Field(description="A Hugging Face repository such as `Qwen/Qwen3-0.6B`, downloaded on first use."),
    ] = None
    revision: Annotated[
        Text | None, Field(description="A branch, tag or commit of `repo`; null is its main branch.")
    ] = None
    driver: Annotated[DriverConfig, Field(description="What runs the model.")] = field(
        default_factory=DriverConfig
    )
    scheduler: Annotated[SchedulerConfig, Field(description="How its batches are made.")] = field(
        default_factory=SchedulerConfig
    )

    def __post_init__(self) -> None:
        if self.path is not None and self.repo is not None:
            raise Misfit(
                f"expected one of `path` and `repo`, but found both ({self.path} and {self.repo})", "repo"
            )
        if self.revision is not None and self.repo is None:
            raise Misfit(
                "expected `repo` beside it, because a revision is a version of a repository", "revision"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it."""

    server: Annotated[ServerConfig, Field(description="Messages between clients and programs.")] = field(
        default_factory=ServerConfig
    )
    auth: Annotated[AuthConfig, Field(description="Whose programs run.")] = field(default_factory=AuthConfig)
    telemetry: Annotated[TelemetryConfig, Field(description="Logging.")] = field(
        default_factory=TelemetryConfig
    )
    runtime: Annotated[RuntimeConfig, Field(description="Limits of programs.")] = field(
        default_factory=RuntimeConfig
    )
    models: Annotated[
        tuple[ModelConfig, ...],
        Field(
            min_length=1,
            description="The models to serve; the first is the one a program gets if it names none.",
        ),
    ] = field(default_factory=lambda: (ModelConfig(name=DEFAULT_MODEL),))

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise Misfit(
                    f"the name `{name}` is taken by models[{names.index(name)}]; give each model its own",
                    "models",
                    index,
                    "name",
                )
