"""Compiled images are kept, verified before use, and done without where they cannot be kept."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from pie_core.sandbox import aot_cache
from pie_core.sandbox.aot_cache import AotCache, image_key
from pie_core.sandbox.fibers import EngineOptions
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime
from tests.core.sandbox.scenarios import call, drive
from tests.core.sandbox.test_guest import echo


async def load_and_call(runtime: Runtime) -> list[str]:
    """Returns what was compiled: nothing if the image came from the cache."""
    reports: list[str] = []
    program = await Program.load(runtime, echo(), "guest.wasm", lambda what, seconds: reports.append(what))
    assert await call(program, "hello") == "hello"
    return reports[:1]


def image(folder: Path) -> Path:
    return next(folder.glob("*.cwasm"))


def test_a_program_is_compiled_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert drive(load_and_call, cache=folder) == ["compiling guest.wasm"]
    assert drive(load_and_call, cache=folder) == []
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_program_asked_for_twice_at_once_is_compiled_once(tmp_path: Path) -> None:
    async def scenario(runtime: Runtime) -> list[list[str]]:
        return list(await asyncio.gather(load_and_call(runtime), load_and_call(runtime)))

    assert sorted(drive(scenario, cache=tmp_path)) == [[], ["compiling guest.wasm"]]


@pytest.mark.parametrize("damage", ["changed", "truncated", "emptied"])
def test_a_corrupted_image_is_compiled_again_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    drive(load_and_call, cache=tmp_path)
    data = bytearray(image(tmp_path).read_bytes())
    data[len(data) // 2] ^= 1
    path = image(tmp_path)
    path.unlink()  # this process may still have the old file mapped
    path.write_bytes(bytes({"changed": data, "truncated": data[:-100], "emptied": bytearray()}[damage]))
    assert drive(load_and_call, cache=tmp_path) == ["compiling guest.wasm"]
    assert "is corrupted (its checksum differs): compiling again" in caplog.text
    assert drive(load_and_call, cache=tmp_path) == []


def test_an_image_that_wasmtime_rejects_is_compiled_again(tmp_path: Path) -> None:
    cache = AotCache(tmp_path)
    cache.store(image_key(echo(), EngineOptions()), b"whole, but made by another wasmtime")
    assert drive(load_and_call, cache=tmp_path) == ["compiling guest.wasm"]
    assert drive(load_and_call, cache=tmp_path) == []


def test_a_folder_that_cannot_be_made_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert drive(load_and_call, cache=tmp_path / "file" / "cache") == ["compiling guest.wasm"]
    assert "cannot be used" in caplog.text


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")]
)
def test_a_full_disk_or_a_read_only_one_is_done_without(
    tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise error

    monkeypatch.setattr(aot_cache, "_write", refuse)
    assert drive(load_and_call, cache=tmp_path) == ["compiling guest.wasm"]
    assert str(error.strerror) in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_write_permission_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drive(load_and_call, cache=tmp_path)
    tmp_path.chmod(0o500)
    assert drive(load_and_call, cache=tmp_path) == []


def test_a_folder_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    AotCache(folder)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    cache = AotCache(tmp_path)
    assert cache.store("key", b"image") is None
    assert "belongs to another user" in caplog.text


def test_the_images_unused_for_longest_are_removed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot_cache, "MOST_BYTES", 250)
    cache = AotCache(tmp_path)
    for age, key in enumerate(("a", "b")):
        path = cache.store(key, key.encode() * 100)
        assert path is not None
        os.utime(path, (1000 + age, 1000 + age))
    assert cache.find("a") is not None  # used again, so now the younger one
    cache.store("c", b"c" * 100)
    assert cache.find("b") is None
    assert cache.find("a") is not None
    assert cache.find("c") is not None


def test_an_image_belongs_to_one_program_and_one_set_of_options() -> None:
    keys = {
        image_key(b"one", EngineOptions()),
        image_key(b"two", EngineOptions()),
        image_key(b"one", EngineOptions(wasm_stack_bytes=1 << 19)),
    }
    assert len(keys) == 3
