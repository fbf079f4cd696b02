"""Every architecture over the tiny checkpoints in public naming that PIE_ORACLE names, against their golden logits.

A folder for each checkpoint: config.json, model.safetensors, and golden.safetensors with `input_ids`, `logits` of the
whole prompt, and the greedy continuation as `generated` and `step_logits`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from pie_core.contracts.forward import Float32, ProbeKind
from pie_core.engine.frames import read_frames
from pie_core.testing.any_architecture import asking, logits, rows_of
from pie_core.testing.batches import Probe, Request, Sample, Stepper, probe_values
from pie_plugins.models.layers.transformers_reference import multimodal_logits
from tests.plugins.models.reference import ARCHITECTURES, portable
from tests.plugins.models.test_csm import FRAMES, depth_logits, frames, generate, words

ORACLE = os.environ.get("PIE_ORACLE")
TOLERANCE = 1e-4  # of the logits' standard deviation
KNOWN = {model_type for each in ARCHITECTURES.values() for model_type in each.model_types}


def checkpoints() -> list[Path]:
    """Those that an architecture reads and whose prompt is text alone."""
    found = sorted(Path(ORACLE).glob("*/golden.safetensors")) if ORACLE else []
    return [each.parent for each in found if _model_type(each.parent) in KNOWN and not _has_media(each)]


def checkpoints_with_towers() -> list[Path]:
    """Those whose golden prompt holds media; transformers says what they make of text alone."""
    found = sorted(Path(ORACLE).glob("*/golden.safetensors")) if ORACLE else []
    known = KNOWN - {"csm"}  # whose tokens are frames
    return [each.parent for each in found if _model_type(each.parent) in known and _has_media(each)]


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def _has_media(golden: Path) -> bool:
    return bool(
        load_file(golden).keys() - {"input_ids", "attention_mask", "logits", "generated", "step_logits"}
    )


def deviation(seen: Float32, expected: Float32) -> float:
    return float(np.abs(seen - expected).max() / expected.std())


@pytest.mark.skipif(not ORACLE, reason="PIE_ORACLE names no folder of checkpoints")
@pytest.mark.parametrize("folder", checkpoints(), ids=lambda folder: folder.name)
def test_a_checkpoint_in_public_naming_gives_its_golden_logits_and_tokens(folder: Path) -> None:
    golden = load_file(folder / "golden.safetensors")
    prompt, generated = golden["input_ids"][0].tolist(), golden["generated"][0].tolist()
    driver = portable(folder)
    stepper = Stepper(driver)
    whole = deviation(logits(stepper, [prompt]), golden["logits"][0])
    context, fed, steps = stepper.context(), prompt, 0.0
    for place, token in enumerate(generated):
        probe = Probe(ProbeKind.LOGITS, len(fed) - 1)
        result = stepper.run([Request(context, fed, samples=[Sample()], probes=[probe])])
        fed = [int(result.tokens[0])]
        assert fed == [token], f"token {place}"
        steps = max(steps, deviation(probe_values(result, 0), golden["step_logits"][0, place]))
    driver.close()
    print(f"{folder.name}: prompt {whole:.1e}, steps {steps:.1e} of the deviation")
    assert max(whole, steps) <= TOLERANCE


@pytest.mark.skipif(not ORACLE, reason="PIE_ORACLE names no folder of checkpoints")
@pytest.mark.parametrize("folder", checkpoints_with_towers(), ids=lambda folder: folder.name)
def test_a_checkpoint_with_towers_gives_what_transformers_gives_for_text(folder: Path) -> None:
    tokens = np.random.default_rng(0).integers(3, 290, 40).tolist()
    driver = portable(folder)
    seen = logits(Stepper(driver), [tokens])
    driver.close()
    assert deviation(seen, multimodal_logits(folder, tokens)) <= TOLERANCE


@pytest.mark.skipif(not ORACLE, reason="PIE_ORACLE names no folder of checkpoints")
def test_frames_of_a_speech_checkpoint_are_what_transformers_gives() -> None:
    folder = Path(ORACLE or "") / "csm"
    config = json.loads((folder / "config.json").read_text())
    kind: Any = transformers.CsmForConditionalGeneration
    reference = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rest, ids = (0,) * (config["num_codebooks"] - 1), words(14)
    driver = portable(folder)
    stepper = Stepper(driver)
    context, fed = stepper.context(), [(config["vocab_size"] + each, *rest) for each in ids]
    seen = rows_of(stepper, [asking(stepper.context(), fed)])
    found: list[tuple[int, ...]] = []
    expected = generate(reference, ids)
    for _ in expected:
        fed = [tuple(stepper.run([Request(context, fed, samples=[Sample()])]).tokens[0].tolist())]
        found += fed
    driver.close()
    with torch.inference_mode():
        assert deviation(seen, reference(torch.tensor([ids])).logits[0].numpy()) <= TOLERANCE
    assert found == expected


@pytest.mark.skipif(not ORACLE, reason="PIE_ORACLE names no folder of checkpoints")
def test_columns_of_a_speech_checkpoint_are_what_transformers_gives() -> None:
    folder = Path(ORACLE or "") / "csm"
    kind: Any = transformers.CsmForConditionalGeneration
    reference = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows, driver = frames(20), portable(folder)
    seen, spoken = read_frames(driver, rows).logits[:-1], read_frames(driver, words(14), FRAMES).greedy
    driver.close()
    expected = depth_logits(reference, rows)
    assert max(deviation(seen[:, c], expected[:, c]) for c in range(expected.shape[1])) <= TOLERANCE
    assert [tuple(frame) for frame in spoken.tolist()] == generate(reference, words(14))
