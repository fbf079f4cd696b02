"""`pie serve`: the server, until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pie_core.cli.checking import require_usable
from pie_core.cli.examples import examples
from pie_core.cli.interrupts import run_until_done
from pie_core.cli.logs import LogLevelOption, start_logging
from pie_core.cli.outcomes import UsageProblem, reporting, say
from pie_core.cli.progress import ProgressDisplay
from pie_core.config import Config, Misfit, load_config
from pie_core.processes.garbage import set_survivors_aside

if TYPE_CHECKING:
    from pie_core.server.server import Server, Surroundings

_EXAMPLES = examples("pie serve -c pie.yaml", "pie serve --no-auth", "pie serve --host 0.0.0.0 --port 9000")

_OTHER_FILES = 512  # models, caches, uploads

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="The configuration file; without one, the default model is served.",
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=_EXAMPLES)(serve)


@reporting
def serve(
    context: typer.Context,
    config: ConfigOption = None,
    host: Annotated[
        str | None, typer.Option(help="The address to listen on; goes before `server.host`.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="The port; goes before `server.port`. 0 is any free one."),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody on this machine in; for loopback addresses only.")
    ] = False,
    log_level: LogLevelOption = None,
) -> None:
    """Serve models and programs to clients on the network.

    Ctrl-C or SIGTERM stops it: programs may end by themselves for a while (`server.drain_s`). Again: at once.

    Exit codes: 0 stopped, 1 a model cannot be loaded, 2 wrong usage or configuration, or the port is in use.
    """
    settings = _overridden(load_config(config), host, port, no_auth)
    start_logging(log_level or context.obj or settings.telemetry.log_level, settings.telemetry.log_format)
    # Imported here: they bring in the sandbox, which other commands and a usage error do without.
    from pie_core.plugins import load_plugins
    from pie_core.sandbox.quick_calls import build_if_possible
    from pie_core.server.server import Server, Surroundings

    registry = load_plugins()
    require_usable(settings, registry)
    build_if_possible()  # by the first that serves on this machine: half a second
    surroundings = Surroundings.of(settings)
    _say_who_may_come(settings, surroundings)
    _allow_open_files(settings.server.max_connections)
    display = ProgressDisplay()
    try:
        run_until_done(
            _serve(lambda: Server(settings, surroundings, display, registry), settings.server.drain_s)
        )
    finally:
        display.end()
        surroundings.bound.close()


def _overridden(config: Config, host: str | None, port: int | None, no_auth: bool) -> Config:
    server = replace(
        config.server,
        host=config.server.host if host is None else host,
        port=config.server.port if port is None else port,
    )
    try:
        return replace(
            config, server=server, auth=replace(config.auth, enabled=config.auth.enabled and not no_auth)
        )
    except Misfit as error:
        raise UsageProblem(f"--no-auth, --host: {error}") from None


def _say_who_may_come(config: Config, surroundings: Surroundings) -> None:
    if surroundings.credentials is None:
        say("authentication is off: every program on this machine may connect")
    elif not len(surroundings.credentials):
        say("no key is registered, so nobody can log in yet: `pie auth add USER` registers one, at any time")


def _allow_open_files(connections: int) -> None:
    """Shells allow a process few files; what the system allows it may take by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    if allowed < wanted:
        say(
            f"this process may open {allowed} files, fewer than server.max_connections = {connections} may need"
        )


async def _serve(make: Callable[[], Server], drain_s: float) -> None:
    stop = _StopSignals()
    async with make() as server:
        typer.echo(f"pie listens at {server.url}")
        loading = asyncio.create_task(server.load_models())
        stopping = asyncio.create_task(stop.asked.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            set_survivors_aside()
            typer.echo(f"ready: {', '.join(server.app.models)}")
            await stopping
        else:
            loading.cancel()
            await asyncio.wait((loading,))
        _say_what_runs(server, drain_s)
        stop.then = server.hurry
        await server.stop(drain_s)
        typer.echo("stopped")


def _say_what_runs(server: Server, drain_s: float) -> None:
    running = server.service.processes.num_running
    waiting = f": {running} programs may run for {drain_s:g} s more" if running else ""
    say(f"stopping{waiting}")


class _StopSignals:
    """The first asks to stop, the second to hurry, the third ends the process on the spot."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.then: Callable[[], None] = lambda: None
        self._count = 0
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._came, number)

    def _came(self, number: int) -> None:
        self._count += 1
        self.asked.set()
        if self._count == 2:
            self.then()
        if self._count > 2:
            os._exit(128 + number)
