"""How kernels are launched: programmatic dependent launch, where a kernel begins while the one before it ends.

A kernel that takes part is launched with `launch_pdl=True` and calls `follow` before it touches anything but constants:
the weights and tables that were there before the first step. `follow` first lets the next kernel begin, which then
waits in its own `follow`, and returns when everything queued before this kernel is done and can be seen.

Why nothing can go wrong while every kernel keeps to this: a kernel reads what others write, and writes at all, only
behind its `follow`, so only after all earlier kernels are complete, in whatever order programs came to run. That holds
over any distance, for a kernel is complete only when its own `follow` returned. Buffers may thus be reused by the next
kernel, as torch's allocator does. What comes before `follow` can overlap any number of earlier kernels, so weights may
be loaded there and nothing else of the layers. A kernel launched without the attribute, a copy and the beginning of a
graph wait for everything before them as always: so does the first kernel of a step, which reads the block and the ring,
and the lookup of embeddings, so what `prepare` wrote is done before the first layer and may be loaded early, too.

All launches go through `launch`: in a rehearsal, whose tensors have no content, each is only told.
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import build

from pie_plugins.drivers.cuda_native.launcher_modules import keep_apart

HOPPER = (9, 0)
keep_apart(build)  # here, for every kernel imports this

Told = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Rehearsal:
    told: Told
    gpu: torch.device


_rehearsal: ContextVar[_Rehearsal | None] = ContextVar("cuda_native_rehearsal", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    rehearsal = _rehearsal.get()
    if rehearsal is None:
        kernel[grid](*arguments, **constants)
    else:
        rehearsal.told(kernel, arguments, constants)


@contextmanager
def rehearsing(told: Told, gpu: torch.device) -> Iterator[None]:
    """Nothing that this thread launches inside runs: `told` gets the kernel, its arguments and its constants. Tensors
    of torch's device "meta" stand for tensors of this GPU."""
    token = _rehearsal.set(_Rehearsal(told, gpu))
    try:
        yield
    finally:
        _rehearsal.reset(token)


def gpu_of(device: torch.device) -> torch.device:
    """What a tensor's device stands for."""
    rehearsal = _rehearsal.get()
    return rehearsal.gpu if rehearsal is not None and device.type == "meta" else device


def overlapping(device: torch.device) -> dict[str, Any]:
    """How kernels that call `follow` are launched on this device."""
    return overlapping_on(gpu_of(device))


@cache
def overlapping_on(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    """The first thing in kernels that load constants before they `follow`."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def follow(OVERLAPS: tl.constexpr):
    """Everything queued before this kernel is done when this returns; what is queued behind it may begin."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
