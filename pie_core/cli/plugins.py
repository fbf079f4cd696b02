"""`pie plugins`: what is installed, whether it is sound, and the beginning of one's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pie_core.cli.diagnosis import Finding, Verdict
from pie_core.cli.examples import examples
from pie_core.cli.outcomes import FAILED, UsageProblem, making, reporting, say

if TYPE_CHECKING:
    from pie_core.plugins import LoadedPlugin, PluginRegistry

TEMPLATES = Path(__file__).parent / "plugin_templates"
SLOW_S = 0.5  # declaring costs next to nothing; a plugin above this imports something heavy

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class Kind(StrEnum):
    DRIVER = "driver"
    ARCHITECTURE = "architecture"
    MEDIA = "media"


commands = typer.Typer(
    no_args_is_help=True,
    help="See the installed plugins, examine them, begin a new one.",
    epilog=examples("pie plugins list", "pie plugins doctor", "pie plugins new driver mine"),
)


def add_to(app: typer.Typer) -> None:
    app.add_typer(commands, name="plugins")


@commands.command("list", epilog=examples("pie plugins list"))
@reporting
def list_plugins() -> None:
    """List every plugin: its distribution, what it provides, how long it took to load, the API it was written for."""
    from pie_core.plugins import inspect_plugins

    registry = inspect_plugins()
    for plugin in registry.plugins:
        typer.echo(_row(plugin))
    for broken in registry.broken:
        typer.echo(f"!! {broken.name} ({broken.distribution} {broken.version}) is broken: {broken.cause}")
    for conflict in registry.conflicts:
        typer.echo(f"!! {conflict}")


@commands.command(epilog=examples("pie plugins doctor"))
@reporting
def doctor() -> None:
    """Examine every plugin; ends with 1 if one is broken or two claim the same name."""
    from pie_core.plugins import inspect_plugins

    found = list(_findings(inspect_plugins()))
    for finding in found:
        typer.echo(f"{finding.verdict}  {finding.subject:<16} {finding.text}")
    if any(finding.verdict is Verdict.BAD for finding in found):
        raise typer.Exit(FAILED)


@commands.command(epilog=examples("pie plugins new driver mine", "pie plugins new architecture my-model"))
@reporting
def new(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="driver, architecture or media.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the plugin is called; also its folder.")],
) -> None:
    """Make a folder with a plugin to start from: a package of its own whose tests run pie's contract suite."""
    if not _NAME.fullmatch(name):
        raise UsageProblem(
            f"`{name}` cannot name a plugin: begin with a small letter, go on with small letters, digits, - and _"
        )
    if find_spec(_module(name)) is not None:
        raise UsageProblem(f"the package {_module(name)} is already installed here; choose another name")
    with making(name):
        write_plugin(kind, name, Path(name))
    say(f"made {name}; install and test it with")
    typer.echo(f"pip install -e './{name}[test]' && pytest {name}")


def write_plugin(kind: Kind, name: str, folder: Path) -> None:
    """Fills the template in. Raises OSError, FileExistsError if the folder is there."""
    module = _module(name)
    words = {"@NAME@": name, "@MODULE@": module, "@DISTRIBUTION@": module.replace("_", "-")}
    folder.mkdir(parents=True)
    for template in sorted((TEMPLATES / kind).rglob("*.template")):
        relative = template.relative_to(TEMPLATES / kind).as_posix().removesuffix(".template")
        file = folder / re.sub("^module/", f"{module}/", relative)
        file.parent.mkdir(exist_ok=True)
        file.write_text(_filled(template.read_text(encoding="utf-8"), words), encoding="utf-8")


def _module(name: str) -> str:
    return f"pie_{name.replace('-', '_')}"


def _filled(text: str, words: dict[str, str]) -> str:
    for word, meaning in words.items():
        text = text.replace(word, meaning)
    return text


def _row(plugin: LoadedPlugin) -> str:
    provides = ", ".join(plugin.provides)
    source = f"{plugin.distribution} {plugin.version}"
    return f"{plugin.name:<16} {provides:<28} {source:<20} API {plugin.api_version}  {plugin.load_s * 1000:6.1f} ms"


def _findings(registry: PluginRegistry) -> Iterator[Finding]:
    for plugin in registry.plugins:
        slow = plugin.load_s > SLOW_S
        text = f"{', '.join(plugin.provides) or 'nothing that is not taken'} ({plugin.distribution} {plugin.version})"
        why = (
            f"; took {plugin.load_s:.1f} s to declare itself: import what is heavy in `load`" if slow else ""
        )
        yield Finding(Verdict.MISSING if slow else Verdict.GOOD, plugin.name, text + why)
    yield from _driver_findings(registry)
    for broken in registry.broken:
        text = f"broken ({broken.distribution} {broken.version}, {broken.module}): {broken.cause}"
        yield Finding(Verdict.BAD, broken.name, text)
    for conflict in registry.conflicts:
        yield Finding(Verdict.BAD, "conflict", conflict)


def _driver_findings(registry: PluginRegistry) -> Iterator[Finding]:
    """What only a configuration would find out: options that cannot be read, modules that are not here."""
    from pie_core.cli.checking import missing_modules
    from pie_core.config import parse_options

    for name, declaration in sorted(registry.drivers.items()):
        if missing := missing_modules(declaration):
            yield Finding(Verdict.MISSING, name, f"cannot load here: {', '.join(missing)} not installed")
        try:
            parse_options(declaration.options, {})
        except Exception as error:  # a third party's class may raise anything
            yield Finding(Verdict.BAD, name, f"its options have no defaults that hold: {error}")
