"""The Python guest, and the cache of compiled images that test runs share."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pie_core
from tests.core.sandbox.scenarios import IMAGES

PRODUCT_GUEST = Path(pie_core.__file__).parent / "guests" / "python.wasm"

# The least that a language runtime does; the product's own has an event loop and tidier tracebacks.
PYTHON_APP = """
import json
import traceback
import sys, time, os, random, socket
import wit_world
from componentize_py_types import Err
from wit_world.imports.types import Error

sources = {}
class WitWorld(wit_world.WitWorld):
    def load(self, files, entry):
        self.attempt(lambda: exec(compile(dict(files)[entry], entry, "exec"), sources))
    def run(self, input):
        return self.attempt(lambda: self.drive(sources["main"](json.loads(input))))
    def drive(self, coroutine):
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return None if stop.value is None else json.dumps(stop.value)
    def attempt(self, work):
        try:
            return work()
        except Exception:
            raise Err(Error("guest", traceback.format_exc()))
"""


@pytest.fixture(scope="session")
def python_guest(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The generic Python guest of the product where it was built, otherwise a smaller one over the same WIT."""
    if PRODUCT_GUEST.exists():
        yield PRODUCT_GUEST
        return
    wit = PRODUCT_GUEST.parent.parent / "wit"
    texts = [path.read_bytes() for path in sorted(wit.glob("*.wit"))]
    key = hashlib.sha256(b"".join([PYTHON_APP.encode(), *texts])).hexdigest()[:16]
    folder = request.config.cache.mkdir("python-guest")
    component = folder / f"{key}.wasm"
    if not component.exists():
        _build(folder, wit, component)
    yield component


def _build(folder: Path, wit: Path, component: Path) -> None:
    (folder / "app.py").write_text(PYTHON_APP, encoding="utf-8")
    tool = Path(sys.executable).parent / "componentize-py"
    partial = component.with_suffix(".partial")
    world = ["-d", str(wit), "-w", "script-runtime"]
    command = [str(tool), *world, "componentize", "-p", str(folder), "app", "-o", str(partial)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    partial.rename(component)


@pytest.fixture(scope="session", autouse=True)
def images(request: pytest.FixtureRequest) -> None:
    """Compiled images are kept between test runs."""
    IMAGES.append(Path(request.config.cache.mkdir("compiled-guests")))
