"""`pie top`: how a running server does, at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from pie_core.cli.examples import examples
from pie_core.cli.interrupts import run_until_done
from pie_core.cli.outcomes import Interrupted, UsageProblem, reporting

if TYPE_CHECKING:
    from pie_core.cli.top_look import Login

_EXAMPLES = examples(
    "pie top",
    "pie top https://pie.example.org --key alice.key",
    "pie top --once --json | jq .models",
)

_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


def add_to(app: typer.Typer) -> None:
    app.command(epilog=_EXAMPLES)(top)


@reporting
def top(
    server: Annotated[
        str, typer.Argument(metavar="URL", help="Where `pie serve` listens, as it says when it starts.")
    ] = "http://127.0.0.1:8080",
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="The file of an API key of `pie auth add`.")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose `--private-key` it is; else who you say you are."),
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option("--private-key", metavar="FILE", help="Such as ~/.ssh/id_ed25519.")
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between two looks; rates are over so long.")
    ] = 2.0,
    each: Annotated[
        bool, typer.Option("--each", help="A row for each process, not for all of one program and user.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print once, and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each status as a line of JSON; with --once one, at once.")
    ] = False,
) -> None:
    """Show how a server does: models, batches, KV pages, hit rates, processes. Ctrl-C ends it.

    Processes are your own; a key with the scope `observe` sees everybody's.

    Exit codes: 0 done, 1 no server answers or it refuses the key, 2 wrong usage.
    """
    from pie_core.cli.top_look import Look

    look = Look(_socket_url(server), _login(key, user, private_key), interval, each)
    try:
        run_until_done(look.json(once) if as_json else look.once() if once else look.live())
    except Interrupted:
        return  # the way to end it


def _socket_url(given: str) -> str:
    """Where clients connect. Raises UsageProblem."""
    parts = urlsplit(given if "://" in given else f"http://{given}")
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None or not parts.netloc:
        raise UsageProblem(f"{given!r} is no address of a server: expected such as http://127.0.0.1:8080")
    return f"{scheme}://{parts.netloc}/"


def _login(key: Path | None, user: str | None, private_key: Path | None) -> Login:
    from pie_core.cli.top_look import Login

    if key is not None and private_key is not None:
        raise UsageProblem(f"--key {key} and --private-key {private_key} are two ways to log in: give one")
    if private_key is not None and user is None:
        raise UsageProblem(f"--private-key {private_key} needs --user, whose key it is")
    return Login(None if key is None else _text_of(key), user, private_key)


def _text_of(key: Path) -> str:
    try:
        return key.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"the key file {key} cannot be read: {error}") from None
