"""Before any guest, a tiny component is suspended, resumed, interrupted and cancelled: the bindings work here."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path

import wasmtime
from wasmtime.component import Component, Linker

from pie_core.sandbox.fibers import (
    WASMTIME,
    AsyncCallback,
    EngineOptions,
    Fiber,
    FiberError,
    GuestStopped,
    LinkerNames,
    new_engine,
)
from pie_core.sandbox.quick_calls import ARGUMENTS, CALLED, RECORD, RESULTS, QuickCalls

COMPONENT = """
(component
  (import "self:test/host" (instance $host (export "step" (func (param "x" u32) (result u32)))))
  (core func $step (canon lower (func $host "step")))
  (core module $m
    (import "h" "step" (func $step (param i32) (result i32)))
    (func (export "run") (param i32) (result i32) (i32.add (call $step (local.get 0)) (call $step (i32.const 1))))
    (func (export "spin") (param i32) (result i32) (loop $again (br $again)) unreachable))
  (core instance $i (instantiate $m (with "h" (instance (export "step" (func $step))))))
  (func (export "run") (param "x" u32) (result u32) (canon lift (core func $i "run")))
  (func (export "spin") (param "x" u32) (result u32) (canon lift (core func $i "spin"))))
"""

_u32 = struct.Struct("<B7xI")
_U32_KIND = 6


class _Bench:
    """The host side: remembers where each suspended call wants its result."""

    def __init__(self) -> None:
        self.engine = new_engine(EngineOptions())
        self.component = Component(self.engine, COMPONENT)
        self.linker = Linker(self.engine)
        self.fiber: Fiber | None = None
        self.asked: list[tuple[int, int]] = []  # (argument, address of the result)
        self._callback = AsyncCallback(self._step)
        with self.linker.root() as root, LinkerNames(root, "self:test/host") as names:
            self.link(names)

    def link(self, names: LinkerNames) -> None:
        names.function("step", self._callback)

    def new_fiber(self) -> Fiber:
        return Fiber(self.engine, self.linker, memory_bytes=1 << 20, ticks=1000)

    def _step(self, *raw: int) -> None:
        _, _, _, arguments, _, results, _, _, continuation = raw
        assert self.fiber is not None
        ctypes.memmove(continuation, self.fiber.continuation, 24)
        self.fiber.hold()
        self.asked.append((ctypes.c_uint32.from_address(arguments + 8).value, results))

    def begin(self, export: str) -> Fiber:
        self.fiber = fiber = self.new_fiber()
        fiber.begin_instantiate(self.component)
        _expect(fiber.poll(), "an instance was not made in one go")
        fiber.end_call()
        fiber.begin_call(export, 1, lambda address: _put(address, 20), gives=True)
        return fiber

    def poll(self) -> bool:
        """Also looks what was asked, where that has to be looked for."""
        assert self.fiber is not None
        is_over = self.fiber.poll()
        self.look()
        return is_over

    def look(self) -> None:
        """A callback has told."""

    def answer(self, value: int) -> int:
        """Writes the result of the oldest suspended call; returns its argument."""
        assert self.fiber is not None
        _expect(bool(self.asked), "a guest did not run on when its result was there")
        argument, results = self.asked.pop(0)
        _put(results, value)
        self.fiber.release()
        return argument


def _put(address: int, value: int) -> None:
    packed = _u32.pack(_U32_KIND, value)
    ctypes.memmove(address, packed, len(packed))


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise FiberError(f"wasmtime {WASMTIME} does not behave as pie needs on this machine: {otherwise}")


@cache
def self_test() -> None:
    """Raises FiberError. Once per process; takes a few hundredths of a second."""
    try:
        _suspend_and_resume(_Bench())
        _interrupt_and_cancel(_Bench())
    except (wasmtime.WasmtimeError, GuestStopped) as error:
        raise FiberError(
            f"wasmtime {WASMTIME} cannot run pie's self-test on this machine: {error}"
        ) from error


@cache
def try_quick_calls(library: Path) -> None:
    """The same of the optional piece in C. Raises FiberError."""
    _suspend_and_resume(_QuickBench(library))
    _interrupt_and_cancel(_QuickBench(library))


class _QuickBench(_Bench):
    """Calls are noted down in a record."""

    def __init__(self, library: Path) -> None:
        self._quick = QuickCalls(library)
        self._function = self._quick.function([0xFFFF_FFFF], lambda guest, record: False)
        super().__init__()

    def link(self, names: LinkerNames) -> None:
        names.native_function("step", self._function.callback, self._function.data)

    def new_fiber(self) -> Fiber:
        return Fiber(self.engine, self.linker, 1 << 20, 1000, RECORD(), self._quick.poll)

    def look(self) -> None:
        assert self.fiber is not None
        record = self.fiber.record
        if record[CALLED]:
            self.asked.append((record[ARGUMENTS], record[RESULTS]))


def _suspend_and_resume(bench: _Bench) -> None:
    fiber = bench.begin("run")
    _expect(not bench.poll() and len(bench.asked) == 1, "a host function did not suspend its guest")
    _expect(not fiber.poll(), "a guest ran on before its result was there")
    _expect(bench.answer(30) == 20, "a host function saw another argument than the guest passed")
    _expect(not bench.poll(), "the second call did not suspend")
    bench.answer(12)
    _expect(fiber.poll(), "the call did not end")
    fiber.end_call()
    _expect(ctypes.c_uint32.from_address(fiber.result + 8).value == 42, "a result was lost on its way")
    fiber.close()


def _interrupt_and_cancel(bench: _Bench) -> None:
    spinning = bench.begin("spin")
    spinning.ticks = 0
    spinning.refresh_deadline()
    _expect(not spinning.poll() and not bench.asked, "a spinning guest was not interrupted")
    spinning.close()
    suspended = bench.begin("run")
    _expect(not suspended.poll(), "a host function did not suspend its guest")
    suspended.close()
