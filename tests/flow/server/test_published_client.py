"""The client that Pie 0.4.0 published talks to this server: names and fields on the wire are the same."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from pie_core.program_artifact import pack
from pie_core.server.credentials import DEFAULT_SCOPES, add_public_key
from tests.core.sandbox.wat_guests import RETURN_INPUT, run, wat_guest
from tests.flow.server.conftest import Pie

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("published_client_script.py")
RETURNS_TOML = """
[package]
name = "returns"
version = "0.1.0"

[runtime]
core = "^0.2.0"

[parameters]
n = { type = "int", optional = true }
"""
TALKS = """
from inferlet import session

async def main(input):
    print("ready")
    session.send((await session.receive()).upper())
    session.send_file((await session.receive_file())[::-1])
    return "done"
"""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package; what it needs is in this environment."""
    folder = tmp_path_factory.mktemp("published")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, "pie-client==0.4.0"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot bring pie-client 0.4.0 here: {done.stderr.strip()[-200:]}")
    return folder


def private_key(pie_folder: Path, credentials: Path) -> Path:
    """A registered user's key."""
    key = ed25519.Ed25519PrivateKey.generate()
    formats = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    file = pie_folder / "id_ed25519"
    file.write_bytes(key.private_bytes(*formats))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    add_public_key(credentials, "alice", "laptop", public.decode(), DEFAULT_SCOPES, None)
    return file


def test_the_published_client_authenticates_installs_and_runs(
    on_server: Callable[..., Any], published: Path, tmp_path: Path
) -> None:
    component, artifact = tmp_path / "returns.wasm", tmp_path / "talks.inferlet"
    component.write_bytes(wat_guest(run("", RETURN_INPUT)))
    component_toml, artifact_toml = tmp_path / "returns.toml", tmp_path / "talks.toml"
    component_toml.write_text(RETURNS_TOML)
    artifact_toml.write_text('[package]\nname = "talks"\nversion = "1.0.0"\n')
    artifact.write_bytes(pack({"Pie.toml": artifact_toml.read_bytes(), "main.py": TALKS.encode()}))

    async def scenario(pie: Pie) -> None:
        key = private_key(tmp_path, pie.credentials_file)
        files = [str(each) for each in (key, component, component_toml, artifact, artifact_toml)]
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            str(SCRIPT),
            pie.server.socket_url,
            *files,
            env={"PYTHONPATH": str(published)},
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await client.communicate()
        assert client.returncode == 0, said.decode()

    on_server(scenario, auth="enabled: true")
