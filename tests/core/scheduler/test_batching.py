"""The arrays that a driver gets, for steps that mix everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pie_core.contracts.forward import NO_TICKET, ProbeKind
from pie_core.engine.messages import ForwardDone, Probe, Sample, SamplerSpec
from tests.core.engine.recorder import Recorder
from tests.core.engine.stepping import GREEDY, RANDOM, SteppedEngine


def recorded(
    contexts: int = 3, limits: dict[str, Any] | None = None, **options: Any
) -> tuple[SteppedEngine, Recorder]:
    driver = Recorder(**options)
    engine = SteppedEngine(driver, **{"max_batch_tokens": 12, "speculation_depth": 0, **(limits or {})})
    for context in range(1, contexts + 1):
        engine.create(context, seed=context)
    return engine, driver


def listed(arrays: Any, *names: str) -> list[list[Any]]:
    return [np.asarray(getattr(arrays, name)).tolist() for name in names]


def test_a_step_lays_its_requests_out_one_after_the_other() -> None:
    engine, driver = recorded()
    engine.forward(2, [7, 8, 9])
    engine.submit(1, [1, 2])
    engine.submit(2, [3], positions=(50,))
    engine.run()
    batch = driver.batches[-1]
    assert listed(batch, "context_ids", "indptr", "kv_lengths") == [[2, 1], [0, 1, 3], [3, 0]]
    assert listed(batch.tokens, "ids", "tickets") == [[3, 1, 2], [NO_TICKET] * 3]
    assert listed(batch, "positions") == [[50, 0, 1]]
    (table,) = batch.cache
    assert listed(table, "indptr", "logical") == [[0, 1, 2], [0, 0]]


def test_samplers_of_a_split_pass_go_with_their_rows() -> None:
    engine, driver = recorded()
    masked = engine.submit(1, range(20), samples=(Sample(19, GREEDY), Sample(4, RANDOM)), logit_mask=(3, 4))
    plain = engine.submit(
        2, [5], samples=(Sample(0, SamplerSpec(top_k=3, bias_tokens=(2,), bias_values=(1.5,))),)
    )
    engine.run()
    first, second = driver.batches
    assert listed(first.samplers, "rows", "top_k", "temperature") == [[0, 5], [3, 0], [0.0, 1.0]]
    assert listed(first.samplers, "index", "mask_index") == [[1, 5], [-1, 0]]
    assert listed(first.samplers, "bias_indptr", "bias_tokens", "bias_values") == [[0, 1, 1], [2], [1.5]]
    assert listed(second.samplers, "rows", "index", "mask_index") == [[8], [20], [0]]
    assert listed(second.samplers, "logit_masks")[0] == [[0b1111000, 0, 0, 0]]
    tokens = engine.final(masked, ForwardDone).tokens
    assert all(3 <= token < 7 for token in tokens)
    assert len(engine.final(plain, ForwardDone).tokens) == 1


def test_penalties_see_every_token_of_the_context_up_to_their_row() -> None:
    engine, driver = recorded()
    engine.forward(1, [1, 2])
    engine.submit(1, [3, 4], samples=(Sample(0, SamplerSpec(presence=1.0)), Sample(1, GREEDY)))
    engine.run()
    samplers = driver.batches[-1].samplers
    assert listed(samplers, "history_indptr", "history_counts") == [[0, 3, 3], [1, 1, 1]]
    assert samplers.history.ids.tolist() == [1, 2, 3]


def test_masks_and_probes_name_rows_of_the_batch() -> None:
    engine, driver = recorded()
    engine.submit(1, [1, 2])
    engine.submit(
        2,
        [3, 4],
        masks=((0, 1), (1, 1)),
        probes=(Probe(1, ProbeKind.LOGPROBS, tokens=(8, 9)), Probe(0, ProbeKind.DISTRIBUTION, 0.5, 2)),
    )
    engine.run()
    batch = driver.batches[-1]
    assert listed(batch.masks, "rows", "groups", "indptr", "runs") == [
        [2, 3],
        [-1, -1],
        [0, 2, 4],
        [0, 1, 1, 1],
    ]
    assert listed(batch.probes, "rows", "kinds", "k", "token_indptr", "tokens") == [
        [2, 3],
        [ProbeKind.DISTRIBUTION, ProbeKind.LOGPROBS],
        [2, 0],
        [0, 0, 2],
        [8, 9],
    ]


def test_state_is_read_from_one_slot_and_written_to_another() -> None:
    engine, driver = recorded(groups=("state",))
    engine.forward(1, [1, 2, 3])
    engine.forward(1, [4])
    first, second = (batch.cache[0] for batch in driver.batches)
    assert listed(first, "slots_in", "out_rows") == [[-1], [2]]
    assert listed(second, "slots_in", "out_rows") == [*listed(first, "out_slots"), [0]]
    assert listed(second, "out_slots") != listed(first, "out_slots")


@pytest.mark.parametrize("axes", [1, 3])
def test_positions_have_the_axes_of_the_model(axes: int) -> None:
    engine, driver = recorded(position_axes=axes)
    engine.forward(1, [1, 2])
    assert driver.batches[0].positions.tolist() == ([0, 1] if axes == 1 else [[0] * 3, [1] * 3])


def test_every_array_has_the_type_of_the_contract() -> None:
    engine, driver = recorded(groups=("paged", "state"))
    engine.forward(1, [1, 2], samples=(Sample(1, RANDOM),), probes=(Probe(0, ProbeKind.ENTROPY),))
    batch = driver.batches[0]
    expected = {"stream": "uint64", "index": "uint32", "slot": "uint32", "epoch": "uint32", "top_k": "int32"}
    assert {name: str(getattr(batch.samplers, name).dtype) for name in expected} == expected
    assert {str(getattr(batch.samplers, name).dtype) for name in ("temperature", "top_p", "min_p")} == {
        "float32"
    }
    assert str(batch.probes.kinds.dtype) == "uint8"
    assert {str(each.dtype) for each in (batch.indptr, batch.kv_lengths, batch.positions)} == {"int32"}
    assert str(batch.context_ids.dtype) == "int64"
