"""Every setting of pie: one tree of frozen dataclasses, each key with its type, bounds, default and help.

The file's checks, `docs/configuration.md`, the template of `pie config init` and the editors' schema are all
made from these annotations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pie_core.config.annotations import Expects
from pie_core.config.options import Options
from pie_core.config.validation import Misfit
from pie_core.telemetry.log_lines import LogFormat

DEFAULT_MODEL = "default"

Text = Annotated[str, Field(min_length=1)]
LogLevel = Literal["debug", "info", "warning", "error"]


def _as_devices(value: object) -> object:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where `pie serve` listens, and what it takes from clients."""

    host: Annotated[
        Text, Field(description="The address to listen on; 0.0.0.0 is every IPv4 address of this machine.")
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="The port to listen on; 0 is any free one.")] = (
        8080
    )
    tls_cert: Annotated[
        Path | None,
        Field(
            description="The server's certificate with its chain, in PEM; with it, clients come by wss and https."
        ),
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="The certificate's private key; null where `tls_cert` holds it, too.")
    ] = None
    allowed_origins: Annotated[
        tuple[Text, ...],
        Field(
            description="Web pages that may connect, such as https://chat.example.org, besides this machine's own."
        ),
    ] = ()
    max_message_bytes: Annotated[
        int,
        Field(
            ge=1, le=1 << 30, description="The longest message that a client may send to a program, in bytes."
        ),
    ] = 1 << 20
    max_request_bytes: Annotated[
        int,
        Field(
            ge=1 << 19,
            le=1 << 30,
            description="The longest message that a client may send to the server, in bytes.",
        ),
    ] = 8 << 20
    max_file_bytes: Annotated[
        int,
        Field(
            ge=1, le=1 << 32, description="The largest file that a client may send to a program, in bytes."
        ),
    ] = 64 << 20
    max_connections: Annotated[
        int, Field(ge=1, description="Open connections; one more is refused with status 503.")
    ] = 16384
    max_processes: Annotated[
        int, Field(ge=1, description="Programs that may run at once; one more is refused.")
    ] = 1024
    max_processes_per_user: Annotated[
        int, Field(ge=1, description="How many of them may be of one user.")
    ] = 512
    max_priority: Annotated[
        int,
        Field(
            description="The highest priority with which clients may launch programs; passes of higher ones go first."
        ),
    ] = 0
    requests_per_s: Annotated[
        float,
        Field(
            gt=0,
            description="Messages that one connection may send in a second, on average; more are refused.",
        ),
    ] = 1000.0
    pings_per_s: Annotated[
        float,
        Field(
            gt=0,
            description="WebSocket pings that one connection may send in a second; beyond, it is closed.",
        ),
    ] = 20.0
    login_s: Annotated[
        float, Field(gt=0, le=3600, description="How long a connection may take to log in, in seconds.")
    ] = 10.0
    ping_interval_s: Annotated[
        float,
        Field(
            gt=0,
            description="How often the server pings; a client that does not answer in half of it is gone.",
        ),
    ] = 30.0
    idle_s: Annotated[
        float | None,
        Field(gt=0, description="When a connection without messages and processes is closed; null is never."),
    ] = 3600.0
    slow_client_s: Annotated[
        float,
        Field(
            gt=0,
            description="How long a client may leave what was sent to it unread; then it is disconnected.",
        ),
    ] = 10.0
    buffered_events: Annotated[
        int, Field(ge=1, description="Events of a process that are kept for a client that attaches later.")
    ] = 4096
    buffered_bytes: Annotated[
        int,
        Field(
            ge=1, description="The same in bytes; the oldest go first, and the client learns how many went."
        ),
    ] = 4 << 20
    keep_ended_s: Annotated[
        float,
        Field(ge=0, description="How long the last events of a process that ended are kept, in seconds."),
    ] = 300.0
    drain_s: Annotated[
        float,
        Field(ge=0, description="How long programs may go on when the server is told to stop, in seconds."),
    ] = 30.0

    def __post_init__(self) -> None:
        if self.tls_key is not None and self.tls_cert is None:
            raise Misfit(f"expected `tls_cert` beside it, but found {self.tls_key} alone", "tls_key")

    @property
    def is_local(self) -> bool:
        """Only this machine can connect."""
        return self.host in ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """Who may use the server, and whose programs run."""

    enabled: Annotated[
        bool,
        Field(
            description="Whether clients must log in with a key that `pie auth add` has registered; "
            "only a server on a loopback address can do without."
        ),
    ] = True
    file: Annotated[
        Path | None,
        Field(description="Where the keys are registered; null is `authorized.yaml` in PIE_HOME."),
    ] = None
    challenge_s: Annotated[
        float,
        Field(gt=0, le=3600, description="How long a client may take to sign its challenge, in seconds."),
    ] = 60.0
    failures_per_minute: Annotated[
        int, Field(ge=1, description="Failed attempts to log in that one address may make in a minute.")
    ] = 30
    user: Annotated[
        Text | None,
        Field(description="Whose the programs of `pie run` are; null is your login name."),
    ] = None
    tenant: Annotated[
        Text | None,
        Field(
            description="Who shares snapshots and cached prefixes, where keys do not say; null is the user alone."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TracesConfig:
    """Spans of requests, by OpenTelemetry; exporting them needs the extra `telemetry`."""

    exporter: Annotated[
        Literal["none", "otlp", "console", "file"],
        Field(
            description="Where spans go: nowhere, to a collector by OTLP over HTTP, to stderr, or to `file`; "
            "the last two write a line of JSON for each."
        ),
    ] = "none"
    endpoint: Annotated[Text, Field(description="The collector that `otlp` sends to, with the path.")] = (
        "http://127.0.0.1:4318/v1/traces"
    )
    file: Annotated[Path | None, Field(description="The file that `file` appends to.")] = None
    sample_ratio: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="The part of traces that begin here which is recorded; a client's own say so themselves.",
        ),
    ] = 1.0

    def __post_init__(self) -> None:
        if self.exporter == "file" and self.file is None:
            raise Misfit("expected a path, because `exporter` is file", "file")


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """What pie tells about its own work."""

    log_level: Annotated[
        LogLevel,
        Field(description="The least important log lines to write to stderr; `--log-level` goes before it."),
    ] = "warning"
    log_format: Annotated[
        LogFormat,
        Field(
            description="Log lines for people, or as JSON with program and trace for those who collect them."
        ),
    ] = "text"
    traces: Annotated[TracesConfig, Field(description="Spans of requests.")] = field(
        default_factory=TracesConfig
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Limits of every running program, and of compiling one."""

    workers: Annotated[
        Annotated[int, Field(ge=0, le=1024)] | Literal["auto"],
        Field(
            description="Processes that run programs; 0 is this process itself, auto is one for each processor "
            "that one for the server and one for each engine leave free, at least 1 and at most 32. "
            "With workers, models run in processes of their own, too."
        ),
    ] = 0
    engine_process: Annotated[
        bool,
        Field(
            description="Whether each model runs in a process of its own: if it dies or hangs, "
            "it is started again and the programs that use it get `engine-lost`."
        ),
    ] = False
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
        int,
        Field(
            ge=1,
            description="What a program may print, and again what it may send, in bytes; it ends beyond.",
        ),
    ] = 16 << 20
    calls_per_s_per_program: Annotated[
        float | None,
        Field(
            gt=0,
            description="Host calls that a program may make in a second, on average; null is no limit.",
        ),
    ] = None
    calls_per_s_per_tenant: Annotated[
        float | None,
        Field(
            gt=0,
            description="... and the programs of a tenant together; with workers, each of them gives its part.",
        ),
    ] = None
    children_per_program: Annotated[
        int,
        Field(
            ge=0,
            description="Programs that a program may run at a time, if its manifest does not ask for fewer.",
        ),
    ] = 256
    children_per_tenant: Annotated[
        int | None,
        Field(ge=0, description="... and the programs of a tenant together; null is no limit."),
    ] = 1024
    children_depth: Annotated[
        int,
        Field(
            ge=0, description="How deep launches may nest: 1 lets programs launch some that launch no more."
        ),
    ] = 16
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
class LimitsConfig:
    """What one program, and the programs of one tenant together, may have of a model; null is no limit.

    Each replica of a model counts for itself.
    """

    contexts_per_program: Annotated[int | None, Field(ge=1, description="Contexts at a time.")] = None
    contexts_per_tenant: Annotated[int | None, Field(ge=1, description="Contexts at a time.")] = None
    requests_per_program: Annotated[
        int | None, Field(ge=1, description="Open passes and generations at a time.")
    ] = None
    requests_per_tenant: Annotated[
        int | None, Field(ge=1, description="Open passes and generations at a time.")
    ] = None
    tokens_per_program: Annotated[
        int | None, Field(ge=1, description="Tokens that a program may feed and draw in its life.")
    ] = None
    tokens_per_minute_per_tenant: Annotated[
        int | None,
        Field(ge=1, description="Tokens that they may feed and draw in a minute; what runs then goes on."),
    ] = None
    page_share_per_program: Annotated[
        float, Field(gt=0, le=1, description="The part of the KV pages that its contexts may fill.")
    ] = 1.0
    page_share_per_tenant: Annotated[
        float, Field(gt=0, le=1, description="The part of the KV pages that their contexts may fill.")
    ] = 1.0
    snapshots_per_tenant: Annotated[int, Field(ge=0, description="Named snapshots.")] = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How the passes of many programs become batches."""

    speculation_depth: Annotated[
        int,
        Field(
            ge=0,
            le=64,
            description="Passes of each context to run before a program asks for them; 0 is none. Same tokens.",
        ),
    ] = 1
    prefix_cache: Annotated[
        bool,
        Field(description="Whether what one context of a tenant has computed is shared with its others."),
    ] = True
    request_timeout_s: Annotated[
        float | None,
        Field(
            gt=0, description="How long a pass or generation may take, waiting included; null is no limit."
        ),
    ] = None
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
    replicas: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="Engines that serve the model, each program by one; more than one are each in a process of "
            "its own. Devices are dealt out among them in order, a single one is shared.",
        ),
    ] = 1
    scheduler: Annotated[SchedulerConfig, Field(description="How its batches are made.")] = field(
        default_factory=SchedulerConfig
    )
    limits: Annotated[LimitsConfig, Field(description="What programs and tenants may have of it.")] = field(
        default_factory=LimitsConfig
    )
    persist_snapshots: Annotated[
        bool,
        Field(description="Whether saved contexts outlive a restart, in `snapshots` in PIE_HOME."),
    ] = False
    swap_memory_mb: Annotated[
        int,
        Field(
            ge=0,
            description="Host memory for contexts whose KV pages others need, in MiB; "
            "where it is full, and if it is 0, their rows are computed again.",
        ),
    ] = 1024
    swap_gb_per_s: Annotated[
        float,
        Field(
            gt=0,
            description="How fast KV pages are copied to host memory and back; a context is swapped "
            "if that takes no longer than to compute its rows again.",
        ),
    ] = 8.0
    snapshot_ttl_s: Annotated[
        float | None,
        Field(gt=0, description="How long a saved context is kept, in seconds; null is for ever."),
    ] = None

    def __post_init__(self) -> None:
        if self.path is not None and self.repo is not None:
            raise Misfit(
                f"expected one of `path` and `repo`, but found both ({self.path} and {self.repo})", "repo"
            )
        if self.revision is not None and self.repo is None:
            raise Misfit(
                f"expected `repo` beside it, because a revision ({self.revision}) is a version of a repository",
                "revision",
            )
        devices = len(self.driver.device)
        if devices > 1 and devices % self.replicas:
            raise Misfit(
                f"expected a number by which the {devices} devices of `driver.device` can be divided",
                "replicas",
            )

    @property
    def devices_of_replicas(self) -> tuple[tuple[str, ...], ...]:
        """What each replica runs on."""
        devices = self.driver.device
        if len(devices) == 1:
            return (devices,) * self.replicas
        each = len(devices) // self.replicas
        return tuple(devices[start : start + each] for start in range(0, len(devices), each))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it."""

    server: Annotated[
        ServerConfig, Field(description="Where `pie serve` listens, and what it takes from clients.")
    ] = field(default_factory=ServerConfig)
    auth: Annotated[AuthConfig, Field(description="Who may use the server, and whose programs run.")] = field(
        default_factory=AuthConfig
    )
    telemetry: Annotated[TelemetryConfig, Field(description="What pie tells about its own work.")] = field(
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
        if not self.auth.enabled and not self.server.is_local:
            raise Misfit(
                f"expected true, because `server.host` is {self.server.host}: "
                "without authentication a server listens on a loopback address such as 127.0.0.1",
                "auth",
                "enabled",
            )
        names = [model.name for model in self.models]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise Misfit(
                    f"the name `{name}` is taken by models[{names.index(name)}]; give each model its own",
                    "models",
                    index,
                    "name",
                )
