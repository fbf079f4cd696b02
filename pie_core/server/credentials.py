"""Who may use the server: users with their API keys and public keys, kept in one file that only its owner can read.

    users:
      alice:
        tenant: research
        keys:
          laptop: {public_key: ssh-ed25519 AAAA…, scopes: [run, programs], added: 2026-01-01}
          ci: {api_key_sha256: 5e88…, scopes: [run], added: 2026-01-01}

The file is read again whenever it changes, so a key that is removed stops working at once. API keys are 256 random
bits, so a plain SHA-256 of one gives nothing away.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import yaml

from pie_core.errors import ConfigError, NotFound
from pie_core.ids import Tenant
from pie_core.server.keys import PublicKey, read_public_key

log = logging.getLogger(__name__)

SCOPES = ("run", "programs", "models", "metrics", "observe")
DEFAULT_SCOPES = ("run", "programs", "metrics")
API_KEY_PREFIX = "pie-"

Label = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who has proved who they are; `credential` is what proved it, empty without authentication."""

    user: str
    tenant: Tenant
    scopes: frozenset[str]
    credential: str = ""


class Key(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """One way of a user to prove who they are: a public key, or the hash of an API key."""

    added: str
    scopes: tuple[str, ...] = DEFAULT_SCOPES
    public_key: str | None = None
    api_key_sha256: str | None = None

    @property
    def kind(self) -> str:
        return "API key" if self.public_key is None else self.public_key.split()[0].strip("-")

    @property
    def fingerprint(self) -> str:
        """Short, to tell keys apart."""
        content = self.public_key or self.api_key_sha256 or ""
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class User(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    keys: dict[Label, Key] = {}
    tenant: str | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    users: dict[Label, User] = {}


@dataclass(frozen=True, slots=True)
class _Entry:
    principal: Principal
    key: Key
    public_key: PublicKey | None


class Credentials:
    """The file as the server uses it. A file that went bad while running is reported and the last good one kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._entries: dict[str, _Entry] = {}
        self._stamp = _stamp_of(path)
        self._entries = _read_entries(path)

    def __len__(self) -> int:
        self._refresh()
        return len(self._entries)

    def by_api_key(self, token: str) -> Principal | None:
        """Every key is compared, so the time tells nothing about which came close."""
        self._refresh()
        digest = api_key_digest(token)
        found: Principal | None = None
        for entry in self._entries.values():
            if hmac.compare_digest(entry.key.api_key_sha256 or "", digest):
                found = entry.principal
        return found

    def public_keys(self, user: str) -> list[tuple[Principal, PublicKey]]:
        self._refresh()
        return [
            (entry.principal, entry.public_key)
            for entry in self._entries.values()
            if entry.principal.user == user and entry.public_key is not None
        ]

    def holds(self, principal: Principal) -> bool:
        """Whether what proved the principal is still in the file, unchanged."""
        self._refresh()
        entry = self._entries.get(principal.credential)
        return entry is not None and entry.principal == principal

    def _refresh(self) -> None:
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries = _read_entries(self._path)
        except ConfigError as error:
            log.error("the credentials stay as they were: %s", error)


def api_key_digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", errors="surrogatepass")).hexdigest()


# ---- changing the file


def add_api_key(path: Path, user: str, name: str, scopes: tuple[str, ...], tenant: str | None) -> str:
    """Returns the new key; nobody can get it out of the file again."""
    token = API_KEY_PREFIX + secrets.token_urlsafe(32)
    key = Key(added=_today(), scopes=_known(scopes), api_key_sha256=api_key_digest(token))
    _add(path, user, name, key, tenant)
    return token


def add_public_key(
    path: Path, user: str, name: str, text: str, scopes: tuple[str, ...], tenant: str | None
) -> None:
    read_public_key(text)
    _add(path, user, name, Key(added=_today(), scopes=_known(scopes), public_key=text.strip()), tenant)


def remove(path: Path, user: str, name: str | None) -> None:
    """One key or, without a name, the user with all keys. Raises NotFound."""

    def change(file: _File) -> None:
        if user not in file.users:
            raise NotFound(f"no user {user!r} in {path}; there are: {', '.join(file.users) or 'none'}")
        keys = file.users[user].keys
        if name is None:
            del file.users[user]
        elif name in keys:
            del keys[name]
        else:
            raise NotFound(f"{user} has no key {name!r}; there are: {', '.join(keys) or 'none'}")

    _change(path, change)


def users_of(path: Path) -> dict[str, User]:
    return _read(path).users


def _add(path: Path, user: str, name: str, key: Key, tenant: str | None) -> None:
    def change(file: _File) -> None:
        entry = file.users.setdefault(user, User(keys={}))
        if name in entry.keys:
            raise ConfigError(
                f"{user} has a key {name!r} already: remove it first, or give this one another name"
            )
        entry.keys[name] = key
        entry.tenant = tenant or entry.tenant
        _check(file, path)

    _change(path, change)


def _known(scopes: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown:
        raise ConfigError(f"unknown scope {unknown[0]!r}; there are {', '.join(SCOPES)}")
    return scopes


def _change(path: Path, change: Callable[[_File], None]) -> None:
    """Reads, changes and replaces the file at once; two who do so wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        file = _read(path)
        change(file)
        fresh = path.with_name(f".{path.name}.new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            yaml.safe_dump(msgspec.to_builtins(file), stream, sort_keys=False, allow_unicode=True)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.chmod(0o600)
        fresh.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ---- reading the file


def _stamp_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(path: Path) -> _File:
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode & 0o777
            data = stream.read()
    except FileNotFoundError:
        return _File()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"{path}: others may read or write it (mode {mode:o}): chmod 600 {path}")
    try:
        file = msgspec.convert(yaml.safe_load(data) or {}, _File)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    _check(file, path)
    return file


def _check(file: _File, path: Path) -> None:
    try:
        msgspec.convert(
            msgspec.to_builtins(file), _File
        )  # names that were added are checked as those that were read
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    for user, entry in file.users.items():
        for name, key in entry.keys.items():
            if (key.public_key is None) == (key.api_key_sha256 is None):
                raise ConfigError(
                    f"{path}: users.{user}.keys.{name}: expected one of public_key and api_key_sha256"
                )
            _known(key.scopes)


def _read_entries(path: Path) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for user, entry in _read(path).users.items():
        tenant = Tenant(entry.tenant or user)
        for name, key in entry.keys.items():
            credential = f"{user}/{name}/{key.fingerprint}"
            public_key = None if key.public_key is None else read_public_key(key.public_key)
            principal = Principal(user, tenant, frozenset(key.scopes), credential)
            entries[credential] = _Entry(principal, key, public_key)
    return entries


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
