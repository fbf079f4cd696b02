"""Our own matrix products against torch's, however they are cut, and however many rows there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.plugins.drivers.cuda_native.both_kernels import needs_triton
from tests.plugins.drivers.cuda_native.machine import DEVICE

pytestmark = needs_triton


def random(*shape: int, seed: int) -> Tensor:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return torch.from_numpy(values).to(DEVICE)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (100, 300)])
def test_few_rows_equal_the_library_s_product_in_every_cut(
    rows: int, biased: bool, outputs: int, inputs: int
) -> None:
    from pie_plugins.drivers.cuda_native.tuned_linear import CUTS, TunedLinear

    linear = TunedLinear()
    bias = random(outputs, seed=3) if biased else None
    matrix = linear.prepare(random(outputs, inputs, seed=1), bias)
    x = random(rows, inputs, seed=2)
    expected = functional.linear(x, matrix.weight, bias)
    for cut in CUTS:
        for _ in range(2):  # the counters are as they were
            assert_close(linear.multiply(x, matrix, cut), expected)
    assert_close(linear(x, matrix), expected)
    assert linear.cuts == {}


@pytest.mark.parametrize("biased", [False, True])
def test_a_row_of_an_invariant_product_has_the_same_bits_among_any_others(biased: bool) -> None:
    from pie_plugins.drivers.cuda_native.invariant_linear import InvariantLinear

    linear = InvariantLinear()
    matrix = linear.prepare(random(100, 90, seed=1), random(100, seed=4) if biased else None)
    x = random(70, 90, seed=2)
    whole = linear(x, matrix)
    assert_close(whole, functional.linear(x, matrix.weight, matrix.bias))
    for start, stop in ((0, 1), (69, 70), (13, 40)):
        part = linear(x[start:stop], matrix)
        assert_close(part, whole[start:stop])
        if DEVICE == "cuda":  # the interpreter's products are numpy's, whose sums depend on a row's place
            assert torch.equal(part, whole[start:stop])
    assert linear(x[:0], matrix).shape == (0, 100)
