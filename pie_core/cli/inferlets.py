"""`pie inferlets`: the programs that come with pie."""

from __future__ import annotations

import ast
from pathlib import Path

import typer

from pie_core.cli.examples import examples
from pie_core.cli.outcomes import reporting
from pie_core.programs import ENTRY, shipped_programs


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples("pie inferlets"))(inferlets)


@reporting
def inferlets() -> None:
    """List the programs that come with pie, each with what it shows."""
    programs = shipped_programs()
    width = max(map(len, programs), default=0)
    for name, folder in programs.items():
        typer.echo(f"{name:<{width}}  {_sentence(folder)}")


def _sentence(folder: Path) -> str:
    text = ast.get_docstring(ast.parse((folder / ENTRY).read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
