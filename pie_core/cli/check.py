"""`pie check`: tries a configuration file without running anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pie_core.cli.checking import require_usable
from pie_core.cli.examples import examples
from pie_core.cli.outcomes import reporting
from pie_core.config import ModelConfig, read_config
from pie_core.config.tree import DEFAULT_MODEL


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples("pie check pie.yaml"))(check)


@reporting
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration file.")],
) -> None:
    """Read a configuration file, ask the drivers about their options, look for the models; load nothing."""
    from pie_core.plugins import load_plugins

    config = read_config(file)
    registry = load_plugins()
    require_usable(config, registry)
    for model in config.models:
        source = (
            _source(model) if registry.driver(model.driver.type).needs_checkpoint else "needs no checkpoint"
        )
        typer.echo(f"{model.name}: {source}, driver {model.driver.type} on {', '.join(model.driver.device)}")
    typer.echo(f"{file} is a good configuration")


def _source(model: ModelConfig) -> str:
    """Where the weights are or will come from. Raises LoadError when they are to be here and are not."""
    from pie_core.models import resolve_model

    if model.repo is not None:
        return f"repository {model.repo}, downloaded on first use"
    if model.path is None and model.name == DEFAULT_MODEL:
        return "the default model, fetched on first use"
    return str(resolve_model(model, lambda _: None))
