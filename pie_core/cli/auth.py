"""`pie auth`: who may use the server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pie_core.cli.examples import examples
from pie_core.cli.outcomes import UsageProblem, as_usage, reporting, say
from pie_core.config import load_config
from pie_core.errors import ConfigError, NotFound
from pie_core.paths import credentials_file

if TYPE_CHECKING:
    from pie_core.server.credentials import Key

commands = typer.Typer(
    no_args_is_help=True,
    help="Register, list and revoke the keys with which users log in to the server.",
    epilog=examples(
        "pie auth add alice",
        "pie auth add bob --public-key ~/.ssh/id_ed25519.pub",
        "pie auth remove alice default",
    ),
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The server's configuration, for its `auth.file`."),
]
UserArgument = Annotated[str, typer.Argument(metavar="USER", help="The user's name.")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(commands, name="auth")


@commands.command(
    epilog=examples(
        "pie auth add alice > alice.key", "pie auth add bob laptop --public-key - < id_ed25519.pub"
    )
)
@reporting
def add(
    user: UserArgument,
    name: Annotated[str, typer.Argument(metavar="KEY", help="How to call the key.")] = "default",
    public_key: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Register this public key (- is standard input) instead of a new API key."
        ),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What the key is good for: run, programs, models, metrics, observe; may stand several times."
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="With whom the user shares snapshots and cached prefixes; by default nobody."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Register a key. Without a public key, a new API key is printed: now and never again."""
    from pie_core.server.credentials import DEFAULT_SCOPES, add_api_key, add_public_key

    file = _file(config)
    scopes = tuple(scope) if scope else DEFAULT_SCOPES
    with as_usage(ConfigError):
        if public_key is not None:
            add_public_key(file, user, name, _text_of(public_key), scopes, tenant)
        else:
            typer.echo(add_api_key(file, user, name, scopes, tenant))
    say(f"{user} can log in with the key {name!r} ({', '.join(scopes)})")


@commands.command(epilog=examples("pie auth remove alice default", "pie auth remove alice"))
@reporting
def remove(
    user: UserArgument,
    name: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="Which key; without it, all of them.", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Revoke a key, or all keys of a user. A running server notices at once."""
    from pie_core.server.credentials import remove as remove_key

    with as_usage(NotFound):
        remove_key(_file(config), user, name)
    say(f"{user} can no longer log in{'' if name is None else f' with the key {name!r}'}")


@commands.command("list", epilog=examples("pie auth list"))
@reporting
def list_keys(config: ConfigOption = None) -> None:
    """List the users and their keys."""
    from pie_core.server.credentials import users_of

    for user, entry in users_of(_file(config)).items():
        tenant = f" (tenant {entry.tenant})" if entry.tenant else ""
        typer.echo(f"{user}{tenant}")
        for name, key in entry.keys.items():
            typer.echo(f"  {_line(name, key)}")


def _line(name: str, key: Key) -> str:
    return f"{name:<16} {key.kind:<20} {', '.join(key.scopes):<24} added {key.added}, fingerprint {key.fingerprint}"


def _file(config: Path | None) -> Path:
    return load_config(config).auth.file or credentials_file()


def _text_of(source: str) -> str:
    if source == "-":
        return sys.stdin.read()
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"the public key {source} cannot be read: {error}") from None
