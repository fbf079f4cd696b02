"""`pie build`: a program's folder becomes the one file that is installed, uploaded and passed on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pie_core.cli.examples import examples
from pie_core.cli.outcomes import UsageProblem, reporting, say
from pie_core.program_artifact import SUFFIX, pack_folder
from pie_core.program_store import content_hash


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples("pie build ./mine", "pie build ./mine -o mine.inferlet"))(build)


@reporting
def build(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The program, with its Pie.toml.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="What to write; NAME-VERSION.inferlet by default."
        ),
    ] = None,
) -> None:
    """Make one file of a program: its manifest, and its sources or its component."""
    manifest, content = pack_folder(folder)
    file = output or Path(f"{manifest.name}-{manifest.version}{SUFFIX}")
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UsageProblem(f"{file} cannot be written: {error.strerror}") from None
    say(f"{manifest.label}: {len(content):,} bytes, blake3 {content_hash(content)}")
    typer.echo(file)
