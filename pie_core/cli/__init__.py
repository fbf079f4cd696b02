"""The command `pie`: each module parses one command's arguments, calls, and prints.

Nothing heavy is imported before a command runs that needs it: `pie --help` loads neither torch nor wasmtime.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pie_core import __version__
from pie_core.cli import (
    auth,
    build,
    check,
    config,
    doctor,
    inferlets,
    install,
    model,
    new,
    plugins,
    run,
    serve,
    top,
)
from pie_core.cli.examples import examples
from pie_core.cli.logs import LogLevelOption, start_logging
from pie_core.cli.outcomes import ending_well

app = typer.Typer(
    name="pie",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        'pie run text-completion -- --prompt "What is the capital of France?"',
        "pie new mine && pie run ./mine",
        "pie doctor",
    ),
    rich_markup_mode=None,  # plain text: it reads the same in a pipe, and no [key] is taken for markup
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pie {__version__}")
        raise typer.Exit


@app.callback()
def pie(
    context: typer.Context,
    log_level: LogLevelOption = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Run small WebAssembly programs (inferlets) right beside a language model, and let them drive it."""
    context.obj = log_level  # for `pie run`, where the configuration may name another one
    start_logging(log_level or "warning")


run.add_to(app)
serve.add_to(app)
top.add_to(app)
auth.add_to(app)
new.add_to(app)
inferlets.add_to(app)
build.add_to(app)
install.add_to(app)
model.add_to(app)
plugins.add_to(app)
config.add_to(app)
check.add_to(app)
doctor.add_to(app)


def main() -> None:
    """The console script."""
    with ending_well():
        app()
