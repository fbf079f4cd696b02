"""Our own matrix products against torch's, however they are cut, and however many rows there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.drivers.cuda_native.linear import Matrix
from pie_plugins.drivers.cuda_native.timeline import CudaTimeline, Timeline
from pie_plugins.drivers.cuda_native.torch_kernels import TorchKernels
from pie_plugins.models.layers.linear import one_by_one
from pie_plugins.models.layers.step import Around, Step
from tests.plugins.drivers.cuda_native.both_kernels import LAYOUT, needs_triton
from tests.plugins.drivers.cuda_native.machine import DEVICE

pytestmark = needs_triton
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16  # few rows go to tensor cores
if find_spec("triton"):
    from pie_plugins.drivers.cuda_native import tuned_linear
    from pie_plugins.drivers.cuda_native.triton_products import one_row_kernel
    from pie_plugins.drivers.cuda_native.tuned_linear import (
        FEW_ROWS_CUTS,
        ONE_ROW_CUTS,
        Choice,
        Cut,
        TunedLinear,
    )


def random(*shape: int, seed: int) -> Tensor:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return torch.from_numpy(values).to(DEVICE, DTYPE)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).to(torch.float32).norm()
    assert difference <= (2e-6 if torch.float32 == DTYPE else 5e-3) * expected.to(torch.float32).norm()


@pytest.mark.parametrize("rows", [1, 3, 16, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (100, 300)])
def test_few_rows_equal_the_library_s_product_in_every_cut(
    rows: int, biased: bool, outputs: int, inputs: int
) -> None:
    linear, bias = TunedLinear(), random(outputs, seed=3) if biased else None
    matrix = linear.prepare(random(outputs, inputs, seed=1), bias)
    x = random(rows, inputs, seed=2)
    expected = functional.linear(x, matrix.weight, bias)
    for cut in cuts(rows):
        for _ in range(2):  # the counters are as they were
            assert_close(linear.multiply(x, matrix, cut), expected)


@pytest.mark.parametrize("shares", [1, 3])
def test_few_rows_may_be_many_with_programs_of_their_own(shares: int) -> None:
    linear, onto = TunedLinear(), random(150, 100, seed=4)
    matrix, x = linear.prepare(random(100, 300, seed=1), None), random(150, 300, seed=2)
    expected = onto + functional.linear(x, matrix.weight)
    for _ in range(2):  # the counters are as they were
        found = onto.clone()
        linear.multiply_few(x, matrix, Cut(64, 128, shares), Around(onto=found), found)
        assert_close(found, expected)


def test_products_are_the_library_s_until_others_were_found_to_be_faster() -> None:
    linear = TunedLinear()
    matrix, x = linear.prepare(random(64, 128, seed=1), None), random(3, 128, seed=2)
    assert torch.equal(linear(x, matrix), functional.linear(x, matrix.weight))
    assert linear.around(x, matrix, Around(gated=True)) is None
    linear.cuts = {Choice(64, 128, gated=False, rows=16): Cut(64, 64, shares=2)}
    assert_close(linear(x, matrix), functional.linear(x, matrix.weight))
    assert torch.equal(linear(x[:1], matrix), functional.linear(x[:1], matrix.weight))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_products_take_in_what_stands_around_them(rows: int, normed: bool, gated: bool, added: bool) -> None:
    """Of more rows than one, all but the norm."""
    linear = TunedLinear()
    matrix, x = linear.prepare(random(200, 300, seed=1), None), random(rows, 300, seed=2)
    onto = random(rows, 100 if gated else 200, seed=3) if added else None
    around = Around(
        random(300, seed=4) if normed else None, 1e-5, gated, None if onto is None else onto.clone()
    )
    expected = one_by_one(plain_step(), x, matrix.weight, replace(around, onto=onto))
    for cut in cuts(rows)[:3]:
        linear.cuts = {Choice(200, 300, gated, rows=1 if rows == 1 else 16): cut}
        found = linear.around(x, matrix, around)
        if normed and rows > 1:
            assert found is None
            return
        assert found is not None
        assert_close(found, expected)
        if around.onto is not None:
            assert found is around.onto
            around.onto.copy_(random(*found.shape, seed=3))


def plain_step() -> Step:
    """Three operations of the kind."""
    plain = TorchKernels(LAYOUT)
    return cast(
        Step, SimpleNamespace(linear=functional.linear, rms_norm=plain.rms_norm, silu_mul=plain.silu_mul)
    )


def cuts(rows: int) -> tuple[Cut, ...]:
    """Also those that hold some tiles, or all of them."""
    holding = (Cut(64, 128, held=2), Cut(64, 64, shares=3, held=1), Cut(64, 256, shares=2, held=1))
    return ONE_ROW_CUTS if rows == 1 else holding + FEW_ROWS_CUTS


def test_tuning_takes_what_is_clearly_faster_than_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are made up: a product that shares its inputs takes half as long as any other."""

    class Clock:
        def __init__(self, _: object) -> None: ...

        def seconds(
            self, call: Callable[[Tensor, Matrix], Tensor], x: Tensor, matrices: list[Matrix]
        ) -> float:
            call(x, matrices[0])
            return 1.0 if launched.pop() == 1 else 0.5

    launched: list[int] = [1]

    def launch(_: object, grid: tuple[int, ...], *given: object, **constants: object) -> None:
        launched.append(grid[1] if len(grid) > 1 else 1)

    monkeypatch.setattr(tuned_linear, "_Clock", Clock)
    monkeypatch.setattr(tuned_linear, "_library", lambda *_: launched.append(1))
    monkeypatch.setattr(tuned_linear, "launch", launch)
    monkeypatch.setattr(tuned_linear, "compiling", lambda _: nullcontext())
    linear = TunedLinear()
    for outputs, inputs in (
        (128, 64),
        (64, 64),
    ):  # half of 128 outputs are inputs of the second: it may be gated
        linear.prepare(torch.zeros(outputs, inputs, dtype=torch.bfloat16, device=DEVICE), None)
    linear.prepare(torch.zeros(64, 512, device=DEVICE), None)  # several rows of float32 stay the library's
    timeline = cast(CudaTimeline, Timeline(torch.device(DEVICE)))
    cuts = linear.tune(timeline)
    expected = {
        Choice(outputs, 64, gated, rows)
        for outputs, gated in ((128, False), (128, True), (64, False))
        for rows in (16, 32, 64)
    }
    assert set(cuts) == expected
    assert all(cut.shares > 1 for cut in cuts.values())
    linear.take(cuts, timeline)
    assert linear.cuts == cuts
    assert linear.tune(timeline) == {}  # it has let the matrices go


def test_products_of_one_row_are_timed_with_what_stands_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are made up: a cut is the faster the fewer its outputs."""

    class Clock:
        def __init__(self, _: object) -> None: ...

        def seconds(
            self, call: Callable[[Tensor, Matrix], Tensor], x: Tensor, matrices: list[Matrix]
        ) -> float:
            launched.clear()
            call(x, matrices[0])
            arounds.update((outputs, around) for outputs, _, around in launched)
            return 1.0 + 0.02 * launched[0][1] if launched else 9.0

    launched: list[tuple[int, int, str]] = []
    arounds: set[tuple[int, str]] = set()

    def note(kernel: object, _: object, *given: object, **constants: int) -> None:
        if kernel is one_row_kernel:
            around = " ".join(name for name in ("NORMED", "GATED", "ADDED") if constants[name])
            launched.append((cast(Tensor, given[1]).shape[0], constants["OUTPUTS"], around))

    monkeypatch.setattr(tuned_linear, "_Clock", Clock)
    monkeypatch.setattr(tuned_linear, "launch", note)
    monkeypatch.setattr(tuned_linear, "ROW_CLASSES", (1,))
    monkeypatch.setattr(tuned_linear, "compiling", lambda _: nullcontext())
    linear = TunedLinear()
    for outputs, inputs in (*[(256, 96), (96, 128)] * 3, (500, 96)):
        linear.prepare(torch.zeros(outputs, inputs, dtype=DTYPE, device=DEVICE), None)
    cuts = linear.tune(cast(CudaTimeline, Timeline(torch.device(DEVICE))))
    assert {cut.outputs for cut in cuts.values()} == {min(cut.outputs for cut in ONE_ROW_CUTS)}
    assert arounds == {(256, "NORMED"), (256, "NORMED GATED"), (96, "ADDED"), (500, "NORMED")}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 90), (130, 1100)])
def test_a_row_of_an_invariant_product_has_the_same_bits_among_any_others(
    biased: bool, added: bool, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of rows has its own tiles: 300 have the large ones, 100 the small ones, 64 those of few rows."""
    from pie_plugins.drivers.cuda_native import invariant_linear

    monkeypatch.setattr(invariant_linear, "LEAST_LARGE", 3)
    linear, most = invariant_linear.InvariantLinear(), 300
    matrix = linear.prepare(random(outputs, inputs, seed=1), random(outputs, seed=4) if biased else None)
    x, old = random(most, inputs, seed=2), random(most, outputs, seed=3)

    def product(start: int, stop: int) -> Tensor:
        if not added:
            return linear(x[start:stop], matrix)
        found = linear.around(x[start:stop], matrix, Around(onto=old[start:stop].clone()))
        assert found is not None
        return found

    whole = product(0, most)
    expected = functional.linear(x, matrix.weight, matrix.bias)
    assert_close(whole, expected + old if added else expected)
    for start, stop in ((0, 1), (most - 1, most), (13, 40), (2, 66), (5, 105), (0, 64), (3, most)):
        part = product(start, stop)
        assert_close(part, whole[start:stop])
        if DEVICE == "cuda":  # the interpreter's products are numpy's, whose sums depend on a row's place
            assert torch.equal(part, whole[start:stop])
    assert linear(x[:0], matrix).shape == (0, outputs)
    assert linear.around(x, matrix, Around(gated=True)) is None
