"""When the generic Python guest is built, and what is said when it cannot be."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest

from pie_core import guests
from pie_core.errors import ProgramError
from pie_core.guests import python_component


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything the guest is made of; what is built lands beside it."""
    for name in ("inferlet", "inferlet_guest"):
        shutil.copytree(
            python_component.SDK / name, tmp_path / "sdk" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copytree(python_component.WIT, tmp_path / "wit")
    for name, place in {
        "FOLDER": tmp_path,
        "SDK": tmp_path / "sdk",
        "WIT": tmp_path / "wit",
        "ARTIFACT": tmp_path / "python.wasm",
        "STAMP": tmp_path / "python.json",
    }.items():
        monkeypatch.setattr(python_component, name, place)
    monkeypatch.setattr(guests, "ARTIFACT", tmp_path / "python.wasm")
    return tmp_path


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_component, "_installed_compiler", lambda: None)


def silent(line: str) -> None:
    """Nobody reads the progress."""


@pytest.mark.slow
def test_it_is_built_once_and_again_when_its_sources_change(checkout: Path) -> None:
    lines: list[str] = []
    component = guests.python_guest(lines.append)
    assert component.read_bytes()[:4] == b"\x00asm"
    assert [line.split()[0] for line in lines] == ["building", "built"]
    lines.clear()
    assert guests.python_guest(lines.append) == component
    assert lines == []
    assert not list(checkout.glob("*.part"))

    with (checkout / "wit" / "types.wit").open("a") as wit:
        wit.write("// another comment\n")
    assert not python_component.is_fresh()


@pytest.mark.parametrize("file", ["wit/poll.wit", "sdk/inferlet/host.py", "sdk/inferlet_guest/app.py"])
def test_every_source_counts(checkout: Path, file: str) -> None:
    before = python_component.digest()
    assert python_component.digest() == before
    (checkout / file).write_text((checkout / file).read_text() + "\n# more\n")
    assert python_component.digest() != before


def stamped(checkout: Path, **changed: object) -> None:
    """A component as a build leaves it, but for what is changed."""
    (checkout / "python.wasm").write_bytes(b"a guest")
    compiler = importlib.metadata.version("componentize-py")
    stamp = {"sources": python_component.digest(), "size": 7, "componentize-py": compiler}
    (checkout / "python.json").write_text(json.dumps(stamp | changed))


def test_a_damaged_stamp_or_component_is_stale(checkout: Path) -> None:
    for stamp in ("", "[]", "{}", '{"sources": 1, "size": 2}'):
        (checkout / "python.json").write_text(stamp)
        assert not python_component.is_fresh()
    stamped(checkout, size=8)
    assert not python_component.is_fresh()
    stamped(checkout)
    assert guests.python_guest(silent) == checkout / "python.wasm"


def test_another_compiler_builds_anew(checkout: Path) -> None:
    stamped(checkout, **{"componentize-py": "0.0.1"})
    assert not python_component.is_fresh()


def test_a_component_of_these_sources_needs_no_compiler(checkout: Path, no_compiler: None) -> None:
    stamped(checkout, **{"componentize-py": "0.0.1"})
    assert guests.python_guest(silent) == checkout / "python.wasm"
    stamped(checkout, sources="of others")
    with pytest.raises(ProgramError, match=r"componentize-py is not installed.*made of other sources"):
        guests.python_guest(silent)


@pytest.mark.slow
def test_sources_that_do_not_build_are_shown_with_the_compilers_words(checkout: Path) -> None:
    (checkout / "sdk" / "inferlet_guest" / "app.py").write_text("import nonesuch\n")
    with pytest.raises(ProgramError, match=r"(?s)could not build the Python guest.*nonesuch"):
        guests.python_guest(silent)
    assert not (checkout / "python.wasm").exists()


def test_a_missing_compiler_is_named(checkout: Path, no_compiler: None) -> None:
    with pytest.raises(ProgramError, match=r"componentize-py is not installed.*scripts/install"):
        guests.python_guest(silent)


def test_an_installation_without_the_component_says_so(checkout: Path) -> None:
    shutil.rmtree(checkout / "sdk")
    with pytest.raises(ProgramError, match="lacks the generic Python guest"):
        guests.python_guest(silent)
    (checkout / "python.wasm").write_bytes(b"carried by a wheel")
    assert guests.python_guest(silent) == checkout / "python.wasm"
