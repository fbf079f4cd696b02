"""Public keys of every kind that is taken, in every format; and those that are not."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa

from pie_core.client.keys import PrivateKey
from pie_core.errors import ConfigError
from pie_core.server.keys import read_public_key, verify

TAKEN: dict[str, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey] = {
    "Ed25519": ed25519.Ed25519PrivateKey.generate(),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "RSA": rsa.generate_private_key(65537, 2048),
}
PLAIN = serialization.NoEncryption()
PEM, SSH = serialization.Encoding.PEM, serialization.Encoding.OpenSSH
PUBLIC = {
    "OpenSSH": (SSH, serialization.PublicFormat.OpenSSH),
    "PEM": (PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
}
PRIVATE = {
    "OpenSSH": (PEM, serialization.PrivateFormat.OpenSSH, PLAIN),
    "PEM": (PEM, serialization.PrivateFormat.PKCS8, PLAIN),
}


@pytest.mark.parametrize("form", PUBLIC)
@pytest.mark.parametrize("kind", TAKEN)
def test_what_a_private_key_signed_its_public_key_verifies(kind: str, form: str) -> None:
    key = TAKEN[kind]
    public = read_public_key(key.public_key().public_bytes(*PUBLIC[form]).decode())
    signature = PrivateKey.parse(key.private_bytes(*PRIVATE[form])).sign(b"challenge")
    assert verify(public, signature, b"challenge")
    assert not verify(public, signature, b"another challenge")
    assert not verify(public, signature[:-1] + bytes([signature[-1] ^ 1]), b"challenge")
    for garbage in (b"", b"x", b"x" * 64, b"\x30\x06\x02\x01\x00\x02\x01\x00"):
        assert not verify(public, garbage, b"challenge")


def test_keys_that_are_too_weak_or_of_other_kinds_are_refused() -> None:
    refused: dict[str, Any] = {
        "of 1024 bits": rsa.generate_private_key(65537, 1024).public_key(),
        "of 521 bits": ec.generate_private_key(ec.SECP521R1()).public_key(),
        "Ed448": ed448.Ed448PrivateKey.generate().public_key(),
        "DSA": dsa.generate_private_key(1024).public_key(),
    }
    for says, key in refused.items():
        text = key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        with pytest.raises(ConfigError, match=says):
            read_public_key(text)


@pytest.mark.parametrize("text", ["", "hello", "ssh-ed25519 AAAA", "-----BEGIN PUBLIC KEY-----\nxx\n"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a public key"):
        read_public_key(text)


def test_a_private_key_given_by_mistake_is_not_taken() -> None:
    text = TAKEN["Ed25519"].private_bytes(*PRIVATE["OpenSSH"]).decode()
    with pytest.raises(ConfigError, match="keep it to yourself"):
        read_public_key(text)


def test_a_private_key_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a private key"):
        PrivateKey.parse(b"hello")
    curve = ec.generate_private_key(ec.SECP521R1()).private_bytes(*PRIVATE["PEM"])
    with pytest.raises(ConfigError, match="secp521r1 is not taken"):
        PrivateKey.parse(curve)
