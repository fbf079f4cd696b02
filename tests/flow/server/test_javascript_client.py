"""The JavaScript client, built from its sources, against a live server: every verb, by way of Node."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from pie_core.errors import PieError
from pie_core.program_artifact import pack
from pie_core.server.credentials import DEFAULT_SCOPES, add_api_key, add_public_key
from tests.flow.server.conftest import Pie
from tests.rules.source_tree import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OnServer = Callable[..., Any]
PACKAGE = ROOT / "sdk/javascript-client"
SCRIPT = Path(__file__).with_name("javascript_client.mjs")

ECHO = """
    from inferlet import session

    async def main(input):
        print("ready")
        while (message := await session.receive()) is not None:
            session.send(message.upper())
        return {"heard": True}
"""
ECHO_INPUT = "async def main(input):\n    return input\n"
MIRROR = """
    from inferlet import session

    async def main(input):
        content = await session.receive_file()
        session.send_file(content)
        return len(content)
"""
BROKEN = "async def main(input):\n    raise ValueError('on purpose')\n"

Key = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@pytest.fixture(scope="module")
def workplace(request: pytest.FixtureRequest) -> Path:
    """A folder in which Node finds the client as an installed package; kept between test runs."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    sources = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and not _is_made(path))
    key = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(request.config.cache.mkdir("javascript-client")) / key
    if not (folder / "ready").exists():
        _install(folder)
    shutil.copy(SCRIPT, folder)
    return folder


def _is_made(path: Path) -> bool:
    return bool({"node_modules", "dist"} & set(path.relative_to(PACKAGE).parts))


def _install(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(PACKAGE, folder / "package", ignore=shutil.ignore_patterns("node_modules", "dist"))
    flags = ["--no-audit", "--no-fund", "--loglevel=error"]
    fetched = subprocess.run(
        ["npm", "ci", *flags], cwd=folder / "package", capture_output=True, text=True, check=False
    )
    if fetched.returncode != 0 and any(
        sign in fetched.stderr for sign in ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT")
    ):
        pytest.skip("needs a package registry for the client's dependencies")
    assert fetched.returncode == 0, fetched.stderr
    packed = _npm(folder / "package", "pack", "--loglevel=error").split()[-1]  # builds first
    (folder / "package.json").write_text('{"type": "module"}')
    _npm(folder, "install", *flags, "--prefer-offline", str(folder / "package" / packed))
    (folder / "ready").touch()


def _npm(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["npm", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"npm {arguments}\n{run.stdout}\n{run.stderr}"
    return run.stdout


async def node(workplace: Path, scenario: str, pie: Pie, **given: Any) -> None:
    (workplace / "given.json").write_text(json.dumps(given))  # too long for an argument
    process = await asyncio.create_subprocess_exec(
        "node",
        SCRIPT.name,
        scenario,
        pie.server.socket_url,
        cwd=workplace,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, output.decode().splitlines()[-1:]) == (0, ["done"]), output.decode()


def install_programs(pie: Pie) -> None:
    for name, source in (("echo", ECHO), ("mirror", MIRROR), ("broken", BROKEN)):
        pie.install(name, source)
    pie.install("echo-input", ECHO_INPUT, parameters="extra = true")


@pytest.mark.parametrize(
    "scenario",
    ["streams", "watches", "talks", "files", "comesBack", "attachesAndDetaches", "asksAboutModels"],
)
def test_the_client_does_what_the_python_client_does(
    on_server: OnServer, workplace: Path, scenario: str
) -> None:
    async def main(pie: Pie) -> None:
        install_programs(pie)
        await node(workplace, scenario, pie)

    on_server(main)


def test_it_installs_and_removes_programs(on_server: OnServer, workplace: Path) -> None:
    manifest = b'[package]\nname = "uploaded"\nversion = "0.1.0"\n'
    filler = b"# " + b"0123456789" * 60_000 + b"\n"  # so that it takes several chunks
    artifact = pack(
        {"Pie.toml": manifest, "main.py": filler + b"async def main(input):\n    return 'from far'\n"}
    )

    async def main(pie: Pie) -> None:
        given = {"artifact": base64.b64encode(artifact).decode(), "returns": "from far"}
        await node(workplace, "installs", pie, **given)

    on_server(main)


def test_its_errors_are_typed_and_those_of_the_server(on_server: OnServer, workplace: Path) -> None:
    async def main(pie: Pie) -> None:
        install_programs(pie)
        await node(workplace, "fails", pie, codes=sorted(_codes(PieError)))

    on_server(main)


def _codes(kind: type[PieError]) -> set[str]:
    """Of the tree in errors.py, without the errors that other modules keep to themselves."""
    children = [child for child in kind.__subclasses__() if child.__module__ == PieError.__module__]
    return {kind.code}.union(*map(_codes, children))


def test_it_logs_in_with_an_api_key_and_with_every_kind_of_private_key(
    on_server: OnServer, workplace: Path
) -> None:
    keys: list[Key] = [
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ]

    async def main(pie: Pie) -> None:
        install_programs(pie)
        secret = add_api_key(pie.credentials_file, "alice", "script", DEFAULT_SCOPES, None)
        for number, key in enumerate(keys):
            public = key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
            add_public_key(
                pie.credentials_file, "alice", f"key-{number}", public.decode(), DEFAULT_SCOPES, None
            )
        await node(
            workplace,
            "logsIn",
            pie,
            key=secret,
            pems=[_pem(key, serialization.PrivateFormat.PKCS8) for key in keys],
            openssh=_pem(keys[0], serialization.PrivateFormat.OpenSSH),
            stranger=_pem(ed25519.Ed25519PrivateKey.generate(), serialization.PrivateFormat.PKCS8),
        )

    on_server(main, auth="enabled: true")


def _pem(key: Key, form: serialization.PrivateFormat) -> str:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
