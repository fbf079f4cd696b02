"""Public keys of users: read from OpenSSH or PEM text, and asked whether they signed a challenge.

Ed25519; ECDSA on P-256 with SHA-256 and on P-384 with SHA-384; RSA of at least 2048 bits, PKCS #1 v1.5 with SHA-256.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from pie_core.errors import ConfigError

PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey

MIN_RSA_BITS, MAX_RSA_BITS = 2048, 16384
_CURVES: dict[str, hashes.HashAlgorithm] = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384()}
_KNOWN = "Ed25519, ECDSA P-256 or P-384, or RSA of at least 2048 bits, in OpenSSH or PEM format"


def read_public_key(text: str) -> PublicKey:
    """Raises ConfigError for anything but a public key that we take, for a private key in particular."""
    data = text.strip().encode()
    if b"PRIVATE KEY" in data:
        raise ConfigError("this is a private key: keep it to yourself, and give its public half (.pub)")
    load = (
        serialization.load_pem_public_key if data.startswith(b"-----") else serialization.load_ssh_public_key
    )
    try:
        key = load(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"not a public key: {error}; expected {_KNOWN}") from None
    return _accepted(key)


def verify(key: PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(_CURVES[key.curve.name]))
        else:
            key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def _accepted(key: object) -> PublicKey:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key
    if isinstance(key, rsa.RSAPublicKey) and MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        return key
    size = getattr(key, "key_size", None)
    raise ConfigError(
        f"{type(key).__name__}{f' of {size} bits' if size else ''} is not taken; expected {_KNOWN}"
    )
