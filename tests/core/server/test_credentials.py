"""The file of credentials: private, checked, changed whole, and read again when it changes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pie_core.errors import ConfigError, NotFound
from pie_core.server.credentials import Credentials, add_api_key, remove, users_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home/authorized.yaml"


def test_a_key_works_until_it_is_removed_and_its_text_is_nowhere(file: Path) -> None:
    credentials = Credentials(file)
    assert credentials.by_api_key("") is None
    token = add_api_key(file, "alice", "laptop", ("run",), "research")
    principal = credentials.by_api_key(token)
    assert principal is not None
    assert (principal.user, principal.tenant, principal.scopes) == ("alice", "research", frozenset({"run"}))
    assert credentials.holds(principal)
    assert token not in file.read_text()
    assert len(token) > 40
    remove(file, "alice", "laptop")
    assert credentials.by_api_key(token) is None
    assert not credentials.holds(principal)


def test_a_new_key_of_the_same_name_does_not_revive_the_old_principal(file: Path) -> None:
    credentials = Credentials(file)
    principal = credentials.by_api_key(add_api_key(file, "alice", "a", ("run",), None))
    assert principal is not None
    remove(file, "alice", None)
    add_api_key(file, "alice", "a", ("run",), None)
    assert not credentials.holds(principal)


def test_only_its_owner_can_read_the_file(file: Path) -> None:
    add_api_key(file, "alice", "a", ("run",), None)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Credentials(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("users: [", "expected"),
        ("users: {alice: {keys: {a: {added: x}}}}", "expected one of public_key and api_key_sha256"),
        ("users: {alice: {keys: {a: {added: x, api_key_sha256: y, scopes: [all]}}}}", "unknown scope 'all'"),
        ("users: {alice: {keys: {a: {added: x, public_key: nonsense}}}}", "not a public key"),
        ("users: {'../x': {}}", "matching regex"),
        ("user: {}", "unknown field"),
        ("- 1", "object"),
    ],
)
def test_a_file_that_is_wrong_is_refused(file: Path, text: str, says: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=says):
        Credentials(file)


def test_a_file_that_goes_bad_while_it_is_used_changes_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = add_api_key(file, "alice", "a", ("run",), None)
    credentials = Credentials(file)
    file.write_text("users: [")
    assert credentials.by_api_key(token) is not None
    assert "the credentials stay as they were" in caplog.text
    file.unlink()
    assert credentials.by_api_key(token) is None


def test_names_and_scopes_are_checked_before_anything_is_written(file: Path) -> None:
    with pytest.raises(ConfigError, match="unknown scope"):
        add_api_key(file, "alice", "a", ("everything",), None)
    with pytest.raises(ConfigError, match="matching regex"):
        add_api_key(file, "no spaces", "a", ("run",), None)
    add_api_key(file, "alice", "a", ("run",), None)
    with pytest.raises(ConfigError, match="has a key 'a' already"):
        add_api_key(file, "alice", "a", ("run",), None)
    for user, key in (("bob", None), ("alice", "b")):
        with pytest.raises(NotFound, match="there are: a"):
            remove(file, user, key)
    assert list(users_of(file)) == ["alice"]


def test_keys_that_are_added_at_once_are_all_there(file: Path) -> None:
    threads = [
        threading.Thread(target=add_api_key, args=(file, f"user-{number}", "a", ("run",), None))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(users_of(file)) == [f"user-{number}" for number in range(8)]
