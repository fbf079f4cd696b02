"""The private bindings are those of one version, and are tried before any guest runs."""

from __future__ import annotations

import ctypes

import pytest

from pie_core.errors import PieError
from pie_core.sandbox import fibers, selftest
from pie_core.sandbox.fibers import EngineOptions, FiberError


def test_another_version_of_wasmtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fibers, "version", lambda name: "51.0.0")
    with pytest.raises(
        FiberError, match=r"needs wasmtime 50\.0\.1, this environment has 51\.0\.0: pip install"
    ):
        fibers.check_version()


def test_the_one_python_that_fibers_would_abort_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fibers, "PYTHON", (3, 14, 0))
    with pytest.raises(FiberError, match=r"use 3\.14\.1 or later"):
        fibers.check_version()


def test_bindings_that_misbehave_are_found_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fibers.Fiber, "release", lambda fiber: None)  # a result never arrives
    with pytest.raises(PieError, match="does not behave as pie needs"):
        selftest.self_test.__wrapped__()


def test_an_engine_that_cannot_run_the_test_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "COMPONENT", "(component (import")
    with pytest.raises(FiberError, match="cannot run pie's self-test"):
        selftest.self_test.__wrapped__()


def test_what_a_binding_refuses_is_told_in_wasmtimes_words() -> None:
    new_error = fibers.c_function("wasmtime_error_new", ctypes.c_void_p, ctypes.c_char_p)
    assert fibers.reason_of(new_error(b"unknown handle index 7")) == "unknown handle index 7"


def test_a_fiber_closes_twice_without_harm() -> None:
    bench = selftest._Bench()
    fiber = bench.begin("run")
    assert fiber.in_call
    fiber.close()
    fiber.close()
    assert not fiber.in_call


def test_options_are_what_images_are_keyed_by() -> None:
    assert EngineOptions(wasm_stack_bytes=1 << 19).as_dict() != EngineOptions().as_dict()
