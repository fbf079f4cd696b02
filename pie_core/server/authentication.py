"""How one connection proves who its user is: an API key, or a signed challenge that is good once and not for long."""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ed25519

from pie_core.errors import LimitExceeded, ProtocolError, Unauthenticated
from pie_core.ids import Tenant
from pie_core.server.credentials import SCOPES, Credentials, Principal
from pie_core.server.keys import verify
from pie_core.server.rates import Rate

CHALLENGE_BYTES = 48
_DECOY = ed25519.Ed25519PrivateKey.generate().public_key()
# Clients of Pie 0.4 compare with this very text.
NOT_NEEDED = "Authenticated (Engine disabled authentication)"


@dataclass(frozen=True, slots=True)
class _Challenge:
    user: str
    nonce: bytes
    expires: float  # of time.monotonic()


class Gate:
    """The rules of one server, shared by all its connections; without credentials everybody is who they say."""

    def __init__(
        self,
        credentials: Credentials | None,
        challenge_s: float,
        failures_per_minute: int,
        tenant: str | None,
    ) -> None:
        self._credentials = credentials
        self.challenge_s = challenge_s
        self._tenant = tenant
        self._failures_per_minute = failures_per_minute
        self._failures: dict[str, Rate] = {}

    @property
    def is_open(self) -> bool:
        return self._credentials is None

    def anybody(self, user: str) -> Principal:
        """The principal of an open gate."""
        return Principal(user, Tenant(self._tenant or user), frozenset(SCOPES))

    def holds(self, principal: Principal) -> bool:
        return self._credentials is None or self._credentials.holds(principal)

    def by_api_key(self, token: str, peer: str) -> Principal:
        """Raises Unauthenticated, or LimitExceeded for an address that has failed too often."""
        self._check_failures(peer)
        principal = None if self._credentials is None else self._credentials.by_api_key(token)
        if principal is None:
            raise self._failed(peer, "this API key is unknown or was revoked")
        return principal

    def by_signature(self, user: str, nonce: bytes, signature: bytes, peer: str) -> Principal:
        self._check_failures(peer)
        keys = [] if self._credentials is None else self._credentials.public_keys(user)
        if not keys:  # takes as long as for a user that exists
            verify(_DECOY, signature, nonce)
        for principal, key in keys:
            if verify(key, signature, nonce):
                return principal
        raise self._failed(peer, f"no key of the user {user!r} made this signature")

    def _check_failures(self, peer: str) -> None:
        rate = self._failures.get(peer)
        if rate is not None and not rate.has_room:
            raise LimitExceeded(
                f"too many failed attempts from {peer}: try again in a minute (auth.failures_per_minute)"
            )

    def _failed(self, peer: str, problem: str) -> Unauthenticated:
        if (
            len(self._failures) > 10_000
        ):  # an address is forgotten rather than memory filled by an attacker's many
            self._failures.pop(next(iter(self._failures)))
        per_second = self._failures_per_minute / 60
        self._failures.setdefault(peer, Rate(per_second, self._failures_per_minute)).take()
        return Unauthenticated(problem)


class Login:
    """One connection's way in."""

    def __init__(self, gate: Gate, peer: str) -> None:
        self._gate = gate
        self._peer = peer
        self._challenge: _Challenge | None = None
        self.principal: Principal | None = None

    @property
    def is_done(self) -> bool:
        return self.principal is not None

    def identify(self, user: str) -> str:
        """The challenge to sign; a user that does not exist gets one as well, and finds out when proving."""
        if self._gate.is_open:
            self.principal = self._gate.anybody(user)
            return NOT_NEEDED
        nonce = secrets.token_bytes(CHALLENGE_BYTES)
        self._challenge = _Challenge(user, nonce, time.monotonic() + self._gate.challenge_s)
        return base64.b64encode(nonce).decode()

    def prove(self, signature: str) -> Principal:
        """Good once: right or wrong, the challenge is gone afterwards."""
        challenge, self._challenge = self._challenge, None
        if challenge is None:
            raise ProtocolError(
                "there is no open challenge: send auth_identify first; each challenge is good once"
            )
        if time.monotonic() > challenge.expires:
            raise Unauthenticated(
                f"the challenge is older than {self._gate.challenge_s:g} s (auth.challenge_s): ask for a new one"
            )
        try:
            data = base64.b64decode(signature, validate=True)
        except (binascii.Error, ValueError):
            raise ProtocolError(f"the signature ({len(signature)} characters) is not base64 text") from None
        self.principal = self._gate.by_signature(challenge.user, challenge.nonce, data, self._peer)
        return self.principal

    def by_api_key(self, token: str) -> Principal:
        self.principal = self._gate.by_api_key(token, self._peer)
        return self.principal

    def require(self) -> Principal:
        """Who this is. Raises Unauthenticated if nobody has logged in or the credentials were revoked since."""
        if self.principal is None:
            raise Unauthenticated(
                "log in first: auth_by_token with an API key, or auth_identify and auth_prove"
            )
        if not self._gate.holds(self.principal):
            user, self.principal = self.principal.user, None
            raise Unauthenticated(f"the credentials of {user!r} were revoked")
        return self.principal
