"""Programmatic dependent launch: a kernel begins while the one before it ends.

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
"""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HOPPER = (9, 0)


@cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """How kernels that call `follow` are launched on this device."""
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
