"""`pie auth`: keys are registered, listed and revoked; a new API key is shown once, alone on stdout."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from typer.testing import CliRunner, Result

from pie_core.cli import app
from pie_core.server.credentials import Credentials


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def auth(*arguments: str, given: str | None = None) -> Result:
    return CliRunner().invoke(app, ["auth", *arguments], input=given)


def public_key() -> str:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def test_a_new_api_key_is_alone_on_stdout_and_works(home: Path) -> None:
    done = auth("add", "alice", "ci", "--scope", "run", "--tenant", "research")
    assert (done.exit_code, done.stderr) == (0, "alice can log in with the key 'ci' (run)\n")
    credentials = Credentials(home / "authorized.yaml")
    principal = credentials.by_api_key(done.stdout.strip())
    assert principal is not None
    assert (principal.user, principal.tenant, principal.scopes) == ("alice", "research", frozenset({"run"}))

    listed = auth("list").stdout
    assert "alice (tenant research)" in listed
    assert "ci               API key" in listed
    assert done.stdout.strip() not in listed

    assert auth("remove", "alice", "ci").stderr == "alice can no longer log in with the key 'ci'\n"
    assert not credentials.holds(principal)


def test_public_keys_come_from_a_file_or_standard_input(tmp_path: Path) -> None:
    (tmp_path / "id.pub").write_text(public_key() + " alice@laptop\n")
    assert auth("add", "alice", "laptop", "--public-key", "id.pub").exit_code == 0
    assert auth("add", "alice", "desk", "--public-key", "-", given=public_key()).exit_code == 0
    assert auth("list").stdout.count("ssh-ed25519") == 2
    assert auth("remove", "alice").exit_code == 0
    assert auth("list").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("add", "alice", "--scope", "all"), "unknown scope 'all'; there are run, programs, models, metrics"),
        (("add", "no name"), "matching regex"),
        (("add", "alice", "--public-key", "missing.pub"), "missing.pub cannot be read"),
        (("add", "alice", "--public-key", "-"), "not a public key"),
        (("remove", "bob"), "no user 'bob'"),
        (("remove", "alice", "other"), "no user 'alice'"),
    ],
)
def test_what_cannot_be_done_is_said_with_exit_code_2(arguments: tuple[str, ...], says: str) -> None:
    done = auth(*arguments, given="")
    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr


def test_the_file_that_the_configuration_names_is_used(tmp_path: Path, home: Path) -> None:
    (tmp_path / "pie.yaml").write_text("auth: {file: keys.yaml}\n")
    assert auth("add", "alice", "-c", "pie.yaml").exit_code == 0
    assert (tmp_path / "keys.yaml").stat().st_mode & 0o777 == 0o600
    assert not (home / "authorized.yaml").exists()
