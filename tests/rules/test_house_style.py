"""The rules of docs/house-style.md that a script can check and ruff does not."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.rules.source_tree import ROOT, imports, modules

PACKAGES = ("pie_core", "plugins", "inferlets", "sdk", "tests", "benchmarks")
GENERATED = ("sdk.python.typings",)  # what the guest's compiler makes of wit/
DRAWERS = {"utils", "util", "misc", "common", "helpers"}

# Written in pieces, so that this file passes its own test.
FORBIDDEN = (
    "pypi" + ".org",
    "python" + "hosted.org",
    "npmjs" + ".org",
    "download.py" + "torch.org",
    "crates" + ".io",
    "/work" + "/",
    "/opt" + "/",
    "../" + "shared",
)


def text_files() -> list[Path]:
    """Every file that git would commit, apart from what is not text."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in run.stdout.split("\0") if name]
    return [path for path in files if path.is_file() and b"\0" not in path.read_bytes()[:1024]]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_opens_by_saying_what_it_is(package: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for name, path in modules(package).items()
        if not name.startswith(GENERATED)
        and path.read_text()
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_a_drawer(package: str) -> None:
    assert not [name for name in modules(package) if DRAWERS & set(name.split("."))]


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in text_files()
        for word in FORBIDDEN
        if word in path.read_text(errors="replace")
    ]
    assert not found


def test_one_module_of_the_core_reads_the_environment() -> None:
    readers = [each.importer for each in imports("pie_core") if each.imported in {"os.environ", "os.getenv"}]
    readers += [
        name
        for name, path in modules("pie_core").items()
        if re.search(r"os\.(environ|getenv)", path.read_text())
    ]
    assert set(readers) == {"pie_core.paths"}
