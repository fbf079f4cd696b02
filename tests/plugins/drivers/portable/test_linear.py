"""Packed matrix products: what plain ones give, whatever the number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pie_plugins.drivers.portable.linear import PackedLinear, PlainLinear, linear_product

DTYPES = [torch.float32, torch.bfloat16]


def packed(dtype: torch.dtype) -> PackedLinear:
    product = linear_product("cpu", dtype)
    if not isinstance(product, PackedLinear):
        pytest.skip("torch has no packed products on this processor")
    return product


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_equal_plain_ones(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 80, dtype=dtype), torch.randn(5, 80, dtype=dtype)
    offset = torch.randn(48, dtype=dtype) if bias else None
    plain, product = PlainLinear(), packed(dtype)
    expected = plain(x, plain.prepare(weight, offset))
    seen = product(x, product.prepare(weight, offset))
    assert torch.allclose(seen, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 576, 1536])
def test_the_result_of_a_row_is_near_whatever_the_number_of_rows(dtype: torch.dtype, columns: int) -> None:
    torch.manual_seed(0)
    product = packed(dtype)
    matrix = product.prepare(torch.randn(96, columns, dtype=dtype) / columns**0.5, None)
    x = torch.randn(70, columns, dtype=dtype)
    whole = product(x, matrix)
    for rows in (1, 2, 3, 16, 33, 70):
        assert torch.allclose(product(x[:rows], matrix), whole[:rows], rtol=1e-5, atol=1e-5)


def test_a_torch_without_packed_products_multiplies_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(PackedLinear, "prepare", absent)
    assert isinstance(linear_product("cpu", torch.float32), PlainLinear)
