"""`pie run`: one program, in this process, with the terminal as its client."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from pie_core.cli.arguments import program_input
from pie_core.cli.checking import require_usable
from pie_core.cli.examples import examples
from pie_core.cli.interrupts import run_until_done
from pie_core.cli.logs import LogLevelOption, start_logging
from pie_core.cli.outcomes import as_usage, reporting
from pie_core.cli.terminal import Terminal
from pie_core.config import Config, load_config
from pie_core.errors import ProgramError, RequestError
from pie_core.manifest import Grants, checked_input, require_granted
from pie_core.programs import ProgramSource, find_program

_EXAMPLES = examples(
    'pie run text-completion -- --prompt "Once upon a time" --max-tokens 64',
    'pie run ./mine --input \'{"question": "Why?"}\'',
    "pie run chat -c pie.yaml",
    "pie run best-of-n --quiet > answer.txt",
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="The configuration file; without one, the default model runs."
    ),
]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=_EXAMPLES)(run)


@reporting
def run(
    context: typer.Context,
    program: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PATH",
            help="A shipped (`pie inferlets`) or installed (`pie list`) program, or a .py file, folder or .wasm.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- --KEY VALUE",
            help="The program's own input; laid over `--input`.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    given: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="JSON", help="The program's input, a JSON object, or @FILE with one."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the return value only.")] = False,
    log_level: LogLevelOption = None,
) -> None:
    """Run a program beside the model and stream what it says; its return value comes last.

    Lines of standard input reach the program as messages.

    Exit codes: 0 done, 1 the program failed, 2 wrong usage or configuration, 130 Ctrl-C.
    """
    with as_usage(ProgramError):
        source = find_program(program)
    inputs = program_input(given, arguments or (), _parameter_types(source))
    settings = load_config(config)
    inputs = _checked(source, inputs, settings)
    start_logging(log_level or context.obj or settings.telemetry.log_level, settings.telemetry.log_format)
    terminal = Terminal(Path(program).stem, settings.server, quiet)
    try:
        value = run_until_done(_prepared(settings, program, inputs, terminal))
        terminal.show_return_value(value)
    finally:
        terminal.close()


def _parameter_types(source: ProgramSource) -> dict[str, str]:
    parameters = source.manifest.parameters if source.manifest is not None else {}
    return {name: parameter.type for name, parameter in parameters.items()}


def _checked(source: ProgramSource, inputs: dict[str, Any], settings: Config) -> dict[str, Any]:
    """Before a model is loaded for nothing."""
    if source.manifest is None:
        return inputs
    with as_usage(RequestError):
        require_granted(source.manifest, Grants(children=settings.runtime.children_per_program))
        return checked_input(source.manifest, inputs)


def _prepared(
    settings: Config, program: str, inputs: dict[str, Any], terminal: Terminal
) -> Coroutine[Any, Any, Any]:
    """The run, ready to start: whatever blocks for long (plugins, a download) is done before the loop runs."""
    # Imported here: they bring in the sandbox, which other commands and a usage error do without.
    from pie_core.app import run_program
    from pie_core.models import with_paths
    from pie_core.plugins import load_plugins

    registry = load_plugins()
    require_usable(settings, registry)
    ready = with_paths(settings, registry.drivers, terminal.progress)
    started: Coroutine[Any, Any, Any] = run_program(ready, program, inputs, terminal)
    return started
