"""`pie model`: what is in the store of models, how something gets into it, and what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pie_core.cli import checkpoint
from pie_core.cli.examples import examples
from pie_core.cli.outcomes import reporting, say
from pie_core.cli.progress import ProgressDisplay
from pie_core.config.tree import DEFAULT_MODEL

if TYPE_CHECKING:
    from pie_core.models.store import StoredModel

commands = typer.Typer(
    no_args_is_help=True,
    help="See and fill the store of models; examine a checkpoint.",
    epilog=examples("pie model list", "pie model fetch", "pie model import ~/models/Qwen3-0.6B"),
)


def add_to(app: typer.Typer) -> None:
    checkpoint.add_to(commands)
    app.add_typer(commands, name="model")


@commands.command("list", epilog=examples("pie model list"))
@reporting
def list_models() -> None:
    """List the models that are here; a configuration names them with `name` alone."""
    from pie_core.models.store import stored_models

    models = stored_models()
    for model in models:
        typer.echo(_row(model))
    if DEFAULT_MODEL not in [model.name for model in models]:
        say(f"{DEFAULT_MODEL} is not here yet: it is fetched on first use, or now with `pie model fetch`")


@commands.command(
    "import",
    epilog=examples("pie model import ./Qwen3-0.6B", "pie model import tiny.gguf --name tiny --link"),
)
@reporting
def import_model(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A Hugging Face folder or a GGUF file.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Its name in the store; by default the file's own.")
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="Link to it instead of copying.")] = False,
) -> None:
    """Copy or link a model into the store, so that configurations can name it."""
    from pie_core.models import store

    progress = ProgressDisplay()
    try:
        model = store.import_model(path, name, link, progress)
    finally:
        progress.close()
    typer.echo(_row(model))


@commands.command(epilog=examples("pie model fetch"))
@reporting
def fetch() -> None:
    """Fetch the default model now, and check the whole file if it is here already."""
    from pie_core.models.fetch import refetched_default_model

    progress = ProgressDisplay()
    try:
        path = refetched_default_model(progress)
    finally:
        progress.close()
    typer.echo(path)


def _row(model: StoredModel) -> str:
    link = " (link)" if model.linked else ""
    return f"{model.name:<24} {model.size_bytes / (1 << 20):>9.1f} MiB  {model.path}{link}"
