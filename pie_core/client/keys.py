"""The private key of a user: read from OpenSSH or PEM text, it signs a server's challenge."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from pie_core.errors import ConfigError

_PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_HASHES: dict[str, hashes.HashAlgorithm] = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}


class PrivateKey:
    """Made by `read` or `parse`."""

    def __init__(self, key: _PrivateKey) -> None:
        self._key = key

    @classmethod
    def read(cls, path: Path, password: str | None = None) -> PrivateKey:
        """A file such as ~/.ssh/id_ed25519. Raises ConfigError."""
        try:
            return cls.parse(path.expanduser().read_bytes(), password)
        except OSError as error:
            raise ConfigError(f"the private key {path} cannot be read: {error.strerror}") from None

    @classmethod
    def parse(cls, data: bytes, password: str | None = None) -> PrivateKey:
        secret = None if password is None else password.encode()
        load = (
            serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
        )
        try:
            key = load(data, secret)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"not a private key in OpenSSH or PEM format: {error}") from None
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name not in _HASHES:
            raise ConfigError(f"the curve {key.curve.name} is not taken; expected P-256 or P-384")
        if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise ConfigError(f"{type(key).__name__} is not taken; expected Ed25519, ECDSA or RSA")
        return cls(key)

    def sign(self, challenge: bytes) -> bytes:
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(challenge)
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(challenge, ec.ECDSA(_HASHES[self._key.curve.name]))
        return self._key.sign(challenge, padding.PKCS1v15(), hashes.SHA256())
