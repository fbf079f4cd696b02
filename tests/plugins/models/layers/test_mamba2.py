"""The state space rule in chunks is the rule row by row, and that is its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pie_plugins.models.layers.mamba2 import StateSpaceRule

HEADS, GROUPS, KEY, VALUE, TOLERANCE = 4, 2, 8, 6, 2e-4


def inputs(rows: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, rows, *shape, generator=random)

    return [normal(GROUPS, KEY), normal(GROUPS, KEY), normal(HEADS, VALUE), -0.1 * normal(HEADS).abs()]


def start() -> Tensor:
    return torch.randn(2, HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(0))


def by_definition(given: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, log_decay = given
    q, k = (each.repeat_interleave(HEADS // GROUPS, 2) for each in (q, k))
    outs = []
    for row in range(q.shape[1]):
        state = state * log_decay[:, row].exp()[..., None, None]
        state = state + torch.einsum("rhk,rhv->rhkv", k[:, row], v[:, row])
        outs.append(torch.einsum("rhk,rhkv->rhv", q[:, row], state))
    return torch.stack(outs, 1), state


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 150])
def test_rows_in_chunks_give_what_the_definition_gives(rows: int) -> None:
    out, after = StateSpaceRule()(inputs(rows), start())
    expected_out, expected_after = by_definition(inputs(rows), start())
    assert (out - expected_out).abs().max() <= TOLERANCE
    assert (after - expected_after).abs().max() <= TOLERANCE


def test_the_state_that_comes_in_is_left_as_it_is() -> None:
    for rows in (1, 20):
        state = start()
        StateSpaceRule()(inputs(rows), state)
        assert torch.equal(state, start())
