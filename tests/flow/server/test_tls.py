"""With a certificate, clients come by wss and https."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pie_core.config import ServerConfig
from pie_core.errors import ConfigError, Disconnected
from pie_core.server.listening import tls_context
from tests.flow.server.conftest import Pie

OnServer = Callable[..., Any]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed one with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pie test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "server.pem"
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*formats))
    return file


def test_clients_that_trust_the_certificate_connect(on_server: OnServer, certificate: Path) -> None:
    async def scenario(pie: Pie) -> None:
        assert pie.server.socket_url.startswith("wss://")
        async with pie.client(tls=ssl.create_default_context(cafile=certificate)) as client:
            assert await client.run("helloworld") is None
        with pytest.raises(Disconnected, match="certificate"):
            async with pie.client():
                pass

    on_server(scenario, server="tls_cert: server.pem")


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(ConfigError, match=rf"server\.tls_cert .*{name} cannot be used"):
            tls_context(ServerConfig(tls_cert=tmp_path / name))
