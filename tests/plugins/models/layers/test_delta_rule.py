"""The delta rule in chunks is the delta rule row by row, and that is its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pie_plugins.models.layers.delta_rule import DeltaRule

HEADS, KEY, VALUE, TOLERANCE = 4, 8, 6, 2e-5


def inputs(rows: int, decays: int, key_heads: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, rows, *shape, generator=random)

    q, k, v = normal(key_heads, KEY), normal(key_heads, KEY), normal(HEADS, VALUE)
    return [q, k, v, -0.3 * normal(HEADS, decays).abs(), normal(HEADS).sigmoid()]


def start() -> Tensor:
    return torch.randn(2, HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(0))


def by_definition(given: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, log_decay, beta = given
    q, k = (each / each.norm(dim=-1, keepdim=True) for each in (q, k))
    q, k = (each.repeat_interleave(HEADS // each.shape[2], 2) for each in (q * KEY**-0.5, k))
    outs = []
    for row in range(q.shape[1]):
        state = state * log_decay[:, row].exp()[..., None]
        known = torch.einsum("rhk,rhkv->rhv", k[:, row], state)
        change = (v[:, row] - known) * beta[:, row, :, None]
        state = state + torch.einsum("rhk,rhv->rhkv", k[:, row], change)
        outs.append(torch.einsum("rhk,rhkv->rhv", q[:, row], state))
    return torch.stack(outs, 1), state


@pytest.mark.parametrize("decays", [1, KEY])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 150])
def test_rows_in_chunks_give_what_the_definition_gives(rows: int, decays: int) -> None:
    given = inputs(rows, decays)
    out, after = DeltaRule()(given, start())
    expected_out, expected_after = by_definition(given, start())
    assert (out - expected_out).abs().max() <= TOLERANCE
    assert (after - expected_after).abs().max() <= TOLERANCE


def test_the_state_that_comes_in_is_left_as_it_is() -> None:
    for rows in (1, 20):
        state = start()
        DeltaRule()(inputs(rows, 1), state)
        assert torch.equal(state, start())


def test_strong_decay_neither_overflows_nor_loses_rows() -> None:
    given = inputs(100, KEY)
    given[3] = given[3] * 200
    out, after = DeltaRule()(given, start())
    expected_out, expected_after = by_definition(given, start())
    assert (out - expected_out).abs().max() <= TOLERANCE
    assert (after - expected_after).abs().max() <= TOLERANCE
