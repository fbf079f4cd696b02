"""`pie config`: writes, shows and changes the configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
import yaml

from pie_core.cli.examples import examples
from pie_core.cli.outcomes import UsageProblem, as_usage, reporting, say
from pie_core.config import existing_default_file, load_config
from pie_core.config.documents import as_data, json_schema, option_lines, template
from pie_core.config.editing import set_in_file
from pie_core.errors import PluginError
from pie_core.paths import default_config_file

commands = typer.Typer(
    no_args_is_help=True,
    help="Write, show and change the configuration file.",
    epilog=examples("pie config init", "pie config set models[0].driver.type dummy", "pie config show"),
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Which file; by default config.yaml in PIE_HOME."),
]


def add_to(app: typer.Typer) -> None:
    app.add_typer(commands, name="config")


@commands.command(epilog=examples("pie config init", "pie config init -c pie.yaml"))
@reporting
def init(
    config: ConfigOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write a file with every key, its help and its default, that changes nothing yet."""
    file = config or default_config_file()
    if file.exists() and not force:
        raise UsageProblem(f"{file} exists; `pie config set` changes it, --force overwrites it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(template(), encoding="utf-8")
    except OSError as error:
        raise UsageProblem(f"{file} cannot be written: {error.strerror}") from None
    say(f"wrote {file}")


@commands.command(epilog=examples("pie config show", "pie config show -c pie.yaml"))
@reporting
def show(config: ConfigOption = None) -> None:
    """Print what is in force: the file and, for what it leaves out, the defaults."""
    file = config or existing_default_file()
    say(f"# from {file}" if file else "# the defaults: there is no configuration file")
    typer.echo(yaml.safe_dump(as_data(load_config(config)), sort_keys=False, allow_unicode=True), nl=False)


@commands.command(
    "set",
    epilog=examples(
        "pie config set runtime.memory_mb 1024", "pie config set models[0].driver.device '[cpu]'"
    ),
)
@reporting
def set_key(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Like runtime.memory_mb or models[0].driver.type.")
    ],
    value: Annotated[str, typer.Argument(metavar="VALUE", help="As it would stand in the file.")],
    config: ConfigOption = None,
) -> None:
    """Change one key and leave the rest of the file, comments included, as it is."""
    file = config or default_config_file()
    set_in_file(file, key, value)
    say(f"{file}: {key} is now {value}")


@commands.command(epilog=examples("pie config schema > pie.schema.json"))
@reporting
def schema() -> None:
    """Print a JSON schema, with which editors complete and check configuration files."""
    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@commands.command(epilog=examples("pie config options portable"))
@reporting
def options(
    driver: Annotated[
        str, typer.Argument(metavar="DRIVER", help="A driver's name; `pie doctor` lists them.")
    ],
) -> None:
    """Print the options of a driver with their help and defaults, as they go under `driver.options`."""
    from pie_core.plugins import load_plugins

    with as_usage(PluginError):
        declaration = load_plugins().driver(driver)
    typer.echo(f"# {declaration.summary}")
    for line in option_lines(declaration.options):
        typer.echo(line)
