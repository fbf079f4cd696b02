"""`pie install`, `pie uninstall` and `pie list`: the store of programs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pie_core.cli.examples import examples
from pie_core.cli.outcomes import FAILED, reporting, say
from pie_core.program_store import DamagedProgram, InstalledProgram, ProgramStore, split_label


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples("pie install ./mine", "pie install mine-0.1.0.inferlet"))(install)
    app.command(epilog=examples("pie uninstall mine", "pie uninstall mine@0.1.0"))(uninstall)
    app.command("list", epilog=examples("pie list"))(list_installed)


@reporting
def install(
    path: Annotated[
        Path, typer.Argument(metavar="PATH|FILE", help="A folder with a Pie.toml, or an artifact.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the same version if its content is another.")
    ] = False,
) -> None:
    """Copy a program into the store, from where `pie run NAME` and servers take it."""
    program = ProgramStore().add(path, overwrite)
    say(f"installed {program.label}; run it with")
    typer.echo(f"pie run {program.name}")


@reporting
def uninstall(
    program: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION]", help="Without a version, all of them go.")
    ],
) -> None:
    """Remove a program from the store."""
    name, version = split_label(program)
    for removed in ProgramStore().remove(name, version):
        typer.echo(f"uninstalled {name}@{removed}")


@reporting
def list_installed() -> None:
    """List the installed programs; `pie inferlets` lists those that come with pie."""
    entries = ProgramStore().entries()
    if not entries:
        say("no program is installed; `pie install PATH` installs one")
    for entry in entries:
        typer.echo(_row(entry))
    if any(isinstance(entry, DamagedProgram) for entry in entries):
        raise typer.Exit(FAILED)


def _row(entry: InstalledProgram | DamagedProgram) -> str:
    label = f"{entry.name}@{entry.version}"
    if isinstance(entry, DamagedProgram):
        return f"!! {label:<29} {entry.problem}"
    return f"{label:<32} {entry.size / 1024:>9.1f} KiB  {entry.manifest.package.description}"
