"""A token list is read through the engine: logits of every position, and what the model goes on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pie_core.contracts.forward import Float32
from pie_core.engine import one_context
from pie_core.engine.one_context import read_logits
from pie_core.engine.parity import compare
from pie_core.errors import InvalidRequest, PieError, Unsupported
from tests.core.engine.stepping import VOCAB, dummy

PROMPT = [5, 9, 60, 2, 2, 41, 8]


def test_there_is_a_row_of_logits_for_every_token() -> None:
    whole = read_logits(dummy(), PROMPT).logits
    assert whole.shape == (len(PROMPT), VOCAB)
    assert np.array_equal(read_logits(dummy(), PROMPT[:4]).logits, whole[:4])


def test_passes_of_any_length_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_logits(dummy(), PROMPT, 5)
    monkeypatch.setattr(one_context, "LONGEST_PASS", 3)
    chunked = read_logits(dummy(), PROMPT, 5)
    assert np.array_equal(chunked.logits, whole.logits)
    assert np.array_equal(chunked.greedy, whole.greedy)


def test_the_continuation_is_the_most_probable_token_each_time() -> None:
    reading = read_logits(dummy(), PROMPT, 4)
    tokens = [*PROMPT, *reading.greedy.tolist()]
    again = read_logits(dummy(), tokens).logits
    assert again[len(PROMPT) - 1 : -1].argmax(axis=1).tolist() == reading.greedy.tolist()


def test_no_tokens_and_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        read_logits(dummy(), [])
    with pytest.raises(PieError, match=str(VOCAB)):
        read_logits(dummy(), [VOCAB])


def test_models_of_several_columns_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="4 columns"):
        read_logits(dummy(streams=4), PROMPT)


def itself(_: Path, tokens: object) -> Float32:
    assert isinstance(tokens, list)
    return read_logits(dummy(), tokens).logits


def test_a_model_equals_itself() -> None:
    parity = compare(dummy(), itself, Path(), PROMPT, 6)
    assert (parity.deviation, parity.first_difference, parity.holds) == (0, None, True)


def test_a_reference_that_disagrees_is_told_by_size_and_place() -> None:
    def other(path: Path, tokens: object) -> Float32:
        logits = itself(path, tokens).copy()
        logits[0, 0] += logits.std()
        row = len(PROMPT) + 1  # where the third greedy token is chosen
        logits[row, (logits[row].argmax() + 1) % VOCAB] = 1e6
        return logits

    parity = compare(dummy(), other, Path(), PROMPT, 6)
    assert parity.first_difference == 2
    assert not parity.holds
    assert 0.5 < parity.deviation < 1.5
