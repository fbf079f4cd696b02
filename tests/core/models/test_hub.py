"""Repositories come through the hub's own client: what belongs to the model, into its cache, or a clear error."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "a" * 40
FILES = {
    name: f"content of {name}".encode()
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "README.md",
        "onnx/model.json",
    )
}
WANTED = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]

SCRIPT = """
import sys
from pie_core.errors import FetchError
from pie_core.models.hub import download_snapshot
try:
    folder = download_snapshot(sys.argv[1], sys.argv[2] or None)
except FetchError as error:
    sys.exit(str(error))
print(*sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as downloading one repository, org/tiny, takes."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": file} for file in FILES]
            self._answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(body), "oid": _oid(body)}
                for file, body in FILES.items()
            ]
            self._answer(json.dumps(tree).encode())
        elif name in FILES:
            self._answer(FILES[name])
        else:
            self._answer(b"", 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_oid(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's own name)
        """Quiet."""


def _oid(body: bytes) -> str:
    return sha1(body).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def download(endpoint: str, cache: Path, repo: str, revision: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its environment once."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "PYTHONPATH": ":".join(sys.path),
        "no_proxy": "*",
    }
    command = [sys.executable, "-c", SCRIPT, repo, revision]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_repository_is_downloaded_without_other_formats_and_kept_for_when_there_is_no_network(
    hub: str, tmp_path: Path
) -> None:
    first = download(hub, tmp_path, "org/tiny")
    assert (first.stdout.split(), first.returncode) == (WANTED, 0), first.stderr
    again = download("http://127.0.0.1:9", tmp_path, "org/tiny")
    assert (again.stdout.split(), again.returncode) == (WANTED, 0), again.stderr


@pytest.mark.slow
def test_a_repository_that_cannot_be_had_is_told_with_its_cause(hub: str, tmp_path: Path) -> None:
    unknown = download(hub, tmp_path, "org/none", "v1")
    assert "cannot download org/none (revision v1): 404" in unknown.stderr
    assert "is the name right, and are you allowed?" in unknown.stderr
    unreachable = download("http://127.0.0.1:9", tmp_path, "org/none")
    assert "the model hub cannot be reached and the files are not cached" in unreachable.stderr
