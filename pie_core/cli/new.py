"""`pie new`: the beginning of a Python inferlet, which runs at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pie_core.cli.examples import examples
from pie_core.cli.outcomes import UsageProblem, making, reporting, say
from pie_core.manifest import ENTRY, FILE

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

_MAIN = '''\
"""@NAME@: asks the model something and streams its answer."""

from inferlet import Context, Model, Sampler, session


async def main(input: dict) -> None:
    """`input` holds what follows `--`: pie run @PATH@ -- --prompt "Name a river." --max-tokens 32"""
    question = input.get("prompt", "Say hello to the world.")
    context = Context(Model.load()).system("You are a helpful assistant.").user(question)
    answer = context.generate(Sampler.top_p(0.6, 0.95), max_tokens=input.get("max_tokens", 64))
    async for piece in answer.stream():
        session.send(piece)
'''


_MANIFEST = """\
[package]
name = "@NAME@"
version = "0.1.0"
description = "Asks the model something and streams its answer"

[parameters]
prompt = { type = "string", optional = true, description = "What the user says" }
max_tokens = { type = "int", optional = true, description = "Tokens at most; 64 unless told" }
"""


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples("pie new mine", 'pie run ./mine -- --prompt "Name a river."'))(new)


@reporting
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The folder to make; its last part names the program.")
    ],
) -> None:
    """Make a folder with a Python inferlet to start from; it runs without a build step."""
    folder = Path(name)
    if not _NAME.fullmatch(folder.name):
        raise UsageProblem(
            f"`{folder.name}` cannot name a program: begin with a letter, go on with letters, digits, - and _"
        )
    shown = str(folder) if folder.is_absolute() else f"./{folder}"
    with making(folder):
        folder.mkdir(parents=True)
        (folder / ENTRY).write_text(_filled(_MAIN, folder.name, shown), encoding="utf-8")
        (folder / FILE).write_text(_filled(_MANIFEST, folder.name, shown), encoding="utf-8")
    say(f"made {folder / ENTRY}; run it with")
    typer.echo(f"pie run {shown}")


def _filled(template: str, name: str, shown: str) -> str:
    return template.replace("@NAME@", name).replace("@PATH@", shown)
