"""The answers of probes are joined with where each begins, and those that are no numbers are named."""

from __future__ import annotations

import numpy as np

from pie_core.contracts.probe_values import joined_probes


def test_ragged_answers_are_joined_and_tokens_may_be_missing() -> None:
    values = [np.array(each, np.float32) for each in ([1, 2], [], [3])]
    tokens = [np.array(each, np.int32) for each in ([7, 8], [], [])]
    joined = joined_probes(values, tokens)
    assert (joined.indptr.tolist(), joined.values.tolist()) == ([0, 2, 2, 3], [1, 2, 3])
    assert (joined.token_indptr.tolist(), joined.tokens.tolist()) == ([0, 2, 2, 2], [7, 8])
    assert [str(each.dtype) for each in (joined.indptr, joined.values, joined.tokens)] == [
        "int64",
        "float32",
        "int32",
    ]
    assert joined.failed == frozenset()


def test_without_probes_there_is_nothing_and_what_is_no_number_has_failed() -> None:
    nothing = joined_probes([], [])
    assert (nothing.indptr.tolist(), len(nothing.values), len(nothing.tokens)) == ([0], 0, 0)
    answers = [np.array([1, value], np.float32) for value in (2, np.nan, np.inf)]
    assert joined_probes(answers, [np.empty(0, np.int32)] * 3).failed == {1}
