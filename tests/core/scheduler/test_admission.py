"""What is refused before it reaches a driver, by which error, and that nothing has changed then."""

from __future__ import annotations

from typing import Any

import pytest

from pie_core.contracts.driver import Feature
from pie_core.contracts.forward import ProbeKind
from pie_core.engine.messages import Failed, Probe, Sample, SamplerSpec
from tests.core.engine.stepping import VOCAB, SteppedEngine, dummy

NAN, INFINITY = float("nan"), float("inf")


def sampled(**fields: Any) -> dict[str, Any]:
    return {"samples": (Sample(0, SamplerSpec(**fields)),)}


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"tokens": ()}, "empty input"),
    ({"tokens": (1, VOCAB)}, "input row 1: token id 97 is not in the vocabulary (0 to 96)"),
    ({"tokens": (-1,)}, "input row 0: token id -1"),
    ({"tokens": (1,) * 511}, "2 in the context and 511 in the pass exceed the model's length of 512"),
    ({"positions": (1, 2)}, "2 positions for 1 tokens"),
    ({"positions": (-1,)}, "input row 0: position -1 is outside the model's 0 to 511"),
    ({"positions": (512,)}, "position 512 is outside"),
    ({"positions": (1 << 40,)}, "is outside"),
    ({"masks": ((0, 1), (0, 1))}, "2 mask rows for 1 tokens"),
    ({"masks": ((0, -1),)}, "mask row 0: run length -1 is negative"),
    ({"masks": ((0, 1 << 40),)}, "the model has at most 512 rows"),
    ({"masks": ((0, 1) + (0,) * 2000,)}, "2002 runs over"),
    ({"masks": ((),)}, "mask row 0 hides every KV row from 0 to 2"),
    ({"masks": ((3, 5),)}, "hides every KV row from 0 to 2"),
    ({"logit_mask": ()}, "every token is forbidden"),
    ({"logit_mask": (97,)}, "every token is forbidden"),
    ({"logit_mask": (3, 0, 4)}, "every token is forbidden"),
    ({"logit_mask": (0, -4)}, "run length -4 is negative"),
    ({"logit_mask": (0, 98)}, "runs over 98 tokens; the vocabulary has 97"),
    ({"samples": (Sample(1, SamplerSpec()),)}, "sampler on row 1; the pass has rows 0 to 0"),
    ({"samples": (Sample(-1, SamplerSpec()),)}, "sampler on row -1"),
    (sampled(temperature=-0.1), "temperature is -0.1; expected at least 0"),
    (sampled(temperature=NAN), "temperature is nan"),
    (sampled(temperature=INFINITY), "temperature is inf"),
    (sampled(temperature=1e-44), "too small for float32"),
    (sampled(top_k=-1), "top_k is -1"),
    (sampled(top_p=0.0), "top_p is 0.0; expected more than 0 and at most 1"),
    (sampled(top_p=NAN), "top_p is nan"),
    (sampled(min_p=1.5), "min_p is 1.5"),
    (sampled(repetition=0.0), "repetition penalty is 0.0"),
    (sampled(presence=NAN), "presence penalty is nan"),
    (sampled(frequency=INFINITY), "frequency penalty is inf"),
    (sampled(seed=-1), "seed is -1"),
    (sampled(bias_tokens=(1,)), "1 tokens and 0 values"),
    (sampled(bias_values=(1.0,)), "0 tokens and 1 values"),
    (sampled(bias_tokens=(97,), bias_values=(1.0,)), "token ids from 97 to 97"),
    (sampled(bias_tokens=(1, 2, 3, 2), bias_values=(1.0,) * 4), "token 2 is named twice"),
    (sampled(bias_tokens=(1,), bias_values=(-INFINITY,)), "not a finite number"),
    ({"probes": (Probe(1, ProbeKind.LOGITS),)}, "probe on row 1; the pass has rows 0 to 0"),
    ({"probes": (Probe(0, 9),)}, "kind 9 is unknown"),
    ({"probes": (Probe(0, ProbeKind.DISTRIBUTION, temperature=0.0),)}, "probe temperature is 0.0"),
    ({"probes": (Probe(0, ProbeKind.DISTRIBUTION, k=-1),)}, "probe k is -1"),
    ({"probes": (Probe(0, ProbeKind.LOGPROBS),)}, "expected one or more token ids"),
    ({"probes": (Probe(0, ProbeKind.LOGPROBS, tokens=(97,)),)}, "from 0 to 96"),
    ({"probes": (Probe(0, ProbeKind.COLUMNS, tokens=(97,)),)}, "at most 1 columns of ids from 0 to 96"),
    ({"probes": (Probe(0, ProbeKind.COLUMNS, tokens=(1, 2)),)}, "at most 1 columns of ids from 0 to 96"),
    ({"num_drafts": 1}, "1 drafts among 1 tokens"),
    ({"num_drafts": -1}, "-1 drafts among 1 tokens"),
]


@pytest.mark.parametrize(("fields", "text"), MALFORMED, ids=[text[:40] for _, text in MALFORMED])
def test_a_malformed_pass_is_refused_and_changes_nothing(fields: dict[str, Any], text: str) -> None:
    engine = SteppedEngine()
    engine.create(1)
    engine.forward(1, [1, 2])
    before = engine.status()
    failed = engine.refused(1, fields.pop("tokens", (1,)), **fields)
    assert failed.code == "invalid-request"
    assert text in failed.message
    after = engine.status()
    assert (after.free_pages, after.steps) == (before.free_pages, before.steps)
    assert engine.history(1) == [1, 2]


UNSUPPORTED: list[tuple[Feature, dict[str, Any]]] = [
    (Feature.ATTENTION_MASK, {"masks": ((0, 1),)}),
    (Feature.LOGIT_MASK, {"logit_mask": (0, 5)}),
    (Feature.PENALTIES, sampled(presence=1.0)),
    (Feature.LOGIT_BIAS, sampled(bias_tokens=(1,), bias_values=(1.0,))),
    (Feature.PROBE_LOGITS, {"probes": (Probe(0, ProbeKind.LOGITS),)}),
    (Feature.PROBE_DISTRIBUTION, {"probes": (Probe(0, ProbeKind.DISTRIBUTION),)}),
    (Feature.PROBE_LOGPROBS, {"probes": (Probe(0, ProbeKind.LOGPROBS, tokens=(1,)),)}),
    (Feature.PROBE_ENTROPY, {"probes": (Probe(0, ProbeKind.ENTROPY),)}),
    (Feature.PROBE_HIDDEN, {"probes": (Probe(0, ProbeKind.HIDDEN),)}),
    (Feature.PROBE_COLUMNS, {"probes": (Probe(0, ProbeKind.COLUMNS, tokens=(1,)),)}),
    (Feature.DRAFTS, {"tokens": (1, 2), "num_drafts": 1, **sampled()}),
]


@pytest.mark.parametrize(("feature", "fields"), UNSUPPORTED, ids=[feature for feature, _ in UNSUPPORTED])
def test_what_the_driver_does_not_declare_is_refused_by_name(
    feature: Feature, fields: dict[str, Any]
) -> None:
    fields = dict(fields)
    tokens = fields.pop("tokens", (1,))
    able, unable = SteppedEngine(), SteppedEngine(dummy(without=(feature.value,)))
    for engine in (able, unable):
        engine.create(1)
    able.forward(1, tokens, **fields)
    failed = unable.refused(1, tokens, **fields)
    assert failed.code == "unsupported"
    for part in ("driver 'dummy'", "architecture 'dummy'", feature.value):
        assert part in failed.message


def test_masks_on_recurrent_models_are_refused() -> None:
    engine = SteppedEngine(dummy(groups=("paged", "state")))
    engine.create(1)
    failed = engine.refused(1, masks=((0, 1),))
    assert (failed.code, "recurrent" in failed.message) == ("unsupported", True)


def test_a_mask_must_leave_something_inside_the_window() -> None:
    engine = SteppedEngine(dummy(groups=("paged", "window"), window=3))
    engine.create(1)
    engine.forward(1, [1, 2, 3, 4])
    assert "hides every KV row from 2 to 4" in engine.refused(1, masks=((0, 2),)).message
    assert engine.forward(1, [5], masks=((0, 3),)).length == 5


def test_too_many_outputs_are_a_limit() -> None:
    engine = SteppedEngine(max_pass_outputs=2, max_pass_values=100)
    engine.create(1)
    for fields, text in (
        ({"samples": (Sample(0, SamplerSpec()),) * 3}, "3 samplers or probes"),
        ({"probes": (Probe(0, ProbeKind.LOGITS),) * 2}, "return 194 numbers; the limit is 100"),
    ):
        failed = engine.refused(1, **fields)
        assert (failed.code, text in failed.message) == ("limit-exceeded", True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tokens": []}, "empty input"),
        ({"tokens": [97]}, "token id 97"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"tokens": [1] * 512}, "the prompt fills the model's 512 tokens"),
        ({"sampler": SamplerSpec(temperature=NAN)}, "temperature is nan"),
    ],
)
def test_a_malformed_generation_is_refused(fields: dict[str, Any], text: str) -> None:
    engine = SteppedEngine(dummy(num_pages=200))
    engine.create(1)
    request = engine.begin_generation(1, **{"tokens": [1], "max_tokens": 3, **fields})
    assert text in engine.final(request, Failed).message
    assert engine.all_pages_are_free()
