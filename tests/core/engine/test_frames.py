"""Token lists of several columns are read through the driver: every column's logits and the greedy frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pie_core.contracts.driver import Feature
from pie_core.engine import frames
from pie_core.engine.frames import read_frames
from pie_core.errors import ForwardError, InvalidRequest, LimitExceeded, Unsupported
from pie_plugins.drivers.dummy.driver import DummyDriver
from tests.core.engine.stepping import VOCAB, dummy

STREAMS = 3
PROMPT = [[5, 9, 60], [2, 2, 41], [8, 0, 1], [7, 7, 7], [3, 90, 4]]


def speaking(**options: Any) -> DummyDriver:
    return dummy(streams=STREAMS, groups=("paged", "state", "window"), **options)


def test_there_are_logits_of_every_column_and_what_is_drawn_from_them() -> None:
    reading = read_frames(speaking(), PROMPT, 4)
    assert reading.logits.shape == (len(PROMPT), STREAMS, VOCAB)
    assert reading.greedy.shape == (4, STREAMS)
    again = read_frames(speaking(), [*PROMPT, *reading.greedy.tolist()]).logits
    assert np.array_equal(again[: len(PROMPT)], reading.logits)
    assert again[len(PROMPT) - 1 : -1].argmax(axis=2).tolist() == reading.greedy.tolist()
    assert read_frames(speaking(), PROMPT).greedy.shape == (0, STREAMS)


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_steps_of_any_length_give_the_same(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    whole = read_frames(speaking(), PROMPT, 5)
    monkeypatch.setattr(frames, "LONGEST_PASS", longest)
    chunked = read_frames(speaking(), PROMPT, 5)
    assert np.array_equal(chunked.logits, whole.logits)
    assert np.array_equal(chunked.greedy, whole.greedy)


@pytest.mark.parametrize("row", [[1, 2], [1, 2, VOCAB], [-1, 2, 3], -1, 2**31 - VOCAB])
def test_what_is_no_frame_is_refused_by_place(row: int | Sequence[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"token 1 is .*frame of 3 ids from 0 to 96"):
        read_frames(speaking(), [PROMPT[0], row])


def test_nothing_to_read_and_text_that_the_model_does_not_know_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        read_frames(speaking(), [])
    with pytest.raises(ForwardError, match="outside"):
        read_frames(speaking(), [7])


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    driver = speaking(num_pages=2)
    assert read_frames(driver, PROMPT, 4).greedy.shape == (4, STREAMS)
    with pytest.raises(LimitExceeded, match=r"9 tokens .* room for 8"):
        read_frames(driver, PROMPT, 5)


def test_a_driver_that_shows_the_first_column_only_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="'dummy' does not declare probe-columns"):
        read_frames(speaking(without=(Feature.PROBE_COLUMNS.value,)), PROMPT)
