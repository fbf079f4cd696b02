"""CSM's two decoders: equal to transformers on text, on frames, and in the frames that they generate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from typer.testing import CliRunner

from pie_core.cli import app
from pie_core.contracts.forward import Float32
from pie_core.engine.frames import Row, read_frames
from pie_core.engine.parity import compare
from pie_core.errors import LoadError
from pie_core.testing.any_architecture import asking, edit_config, rows_of, write_checkpoint
from pie_core.testing.batches import Request, Sample, Stepper
from pie_plugins.models.csm import DECLARATION
from pie_plugins.models.layers.transformers_reference import frame_logits
from tests.plugins.drivers.checkpoint_contract import CheckpointContract
from tests.plugins.models.reference import portable, tiny

CODES, STREAMS, FRAMES = 64, 4, 8
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 64,
}
MIMI = {
    "model_type": "mimi",
    "hidden_size": 32,
    "num_filters": 4,
    "codebook_size": CODES,
    "codebook_dim": 16,
    "num_quantizers": STREAMS,
    "vector_quantization_hidden_dimension": 16,
    "upsample_groups": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tiny_csm() -> dict[str, Any]:
    both = {"vocab_size": CODES, "num_codebooks": STREAMS, "rope_parameters": LLAMA3}
    depth = tiny(
        "csm_depth", hidden_size=48, intermediate_size=64, max_position_embeddings=STREAMS + 1, head_dim=12
    )
    text = {
        "text_vocab_size": 320,
        "audio_token_id": 302,
        "audio_eos_token_id": 303,
        "codebook_pad_token_id": 63,
    }
    sections = {"depth_decoder_config": depth | both | {"backbone_hidden_size": 64}, "codec_config": MIMI}
    own = {
        "bos_token_id": 1,
        "pad_token_id": 302,
        "tie_codebooks_embeddings": True,
        "tie_word_embeddings": False,
    }
    return tiny("csm", max_position_embeddings=1024) | both | text | own | sections


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("csm")
    write_checkpoint(folder, DECLARATION, tiny_csm())
    return folder


@pytest.fixture
def stepper(checkpoint: Path) -> Iterator[Stepper]:
    driver = portable(checkpoint)
    yield Stepper(driver)
    driver.close()


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    kind: Any = transformers.CsmForConditionalGeneration
    return kind.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def text(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [(CODES + each, *(0,) * (STREAMS - 1)) for each in ids]


def words(count: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(7).integers(3, 290, count)]


def frames(count: int) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.random.default_rng(8).integers(0, CODES, (count, STREAMS)).tolist()]


def close(seen: Float32, expected: Float32) -> bool:
    return bool(np.abs(seen - expected).max() <= 1e-4 * expected.std())


def test_the_first_column_of_text_equals_the_reference(stepper: Stepper, reference: Any) -> None:
    ids = words(20)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    assert close(rows_of(stepper, [asking(stepper.context(), text(ids))]), expected)


def test_the_first_column_of_frames_equals_the_reference_whatever_the_split(
    stepper: Stepper, reference: Any
) -> None:
    rows = frames(20)
    with torch.inference_mode():
        expected = reference(torch.tensor([rows])).logits[0].numpy()
    for split in (1, 7, 19):
        context = stepper.context()
        stepper.run([Request(context, rows[:split])])
        assert close(rows_of(stepper, [asking(context, rows[split:])]), expected[split:])


def generate(reference: Any, ids: Sequence[int]) -> list[tuple[int, ...]]:
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 63
    reference.depth_decoder.generation_config.eos_token_id = None
    reference.depth_decoder.generation_config.do_sample = False
    with torch.inference_mode():
        found = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=FRAMES,
            do_sample=False,
        )
    return [tuple(frame) for frame in found[0].tolist()]


def test_greedy_frames_equal_the_reference_also_beside_a_stranger(stepper: Stepper, reference: Any) -> None:
    expected = generate(reference, words(12))
    context, stranger, fed = stepper.context(), stepper.context(), text(words(12))
    found: list[tuple[int, ...]] = []
    for _ in expected:
        result = stepper.run(
            [
                Request(stranger, frames(3), samples=[Sample(temperature=1.0)]),
                Request(context, fed, samples=[Sample()]),
            ]
        )
        fed = [tuple(int(code) for code in result.tokens[1])]
        found += fed
    assert found == expected


def depth_logits(reference: Any, rows: Sequence[Sequence[int]]) -> Float32:
    """[frames - 1, columns, vocab]: of each frame behind the first, as transformers computes them to train."""
    ids = torch.tensor([rows])
    labels = torch.cat((torch.full_like(ids[:, :1], -100), ids[:, 1:]), 1)
    with torch.inference_mode():
        output = reference(ids, labels=labels)
    columns = (output.logits[0, :-1, None], output.depth_decoder_logits)
    expected: Float32 = torch.cat(columns, 1).numpy()
    return expected


def test_columns_of_given_frames_equal_the_reference(stepper: Stepper, reference: Any) -> None:
    rows = frames(20)
    seen = read_frames(stepper.driver, rows).logits[:-1]
    expected = depth_logits(reference, rows)
    assert seen.shape == expected.shape == (19, STREAMS, CODES)
    for column in range(STREAMS):
        assert close(seen[:, column], expected[:, column])


def test_columns_of_what_goes_on_are_those_of_the_frames_that_are_generated(
    stepper: Stepper, reference: Any
) -> None:
    generated = generate(reference, words(12))
    reading = read_frames(stepper.driver, words(12), FRAMES)
    assert [tuple(frame) for frame in reading.greedy.tolist()] == generated
    assert reading.logits.shape == (12, STREAMS, CODES)
    given = read_frames(stepper.driver, [*words(12), *generated]).logits
    assert close(given[:12], reading.logits)
    assert given[11:-1].argmax(axis=2).tolist() == reading.greedy.tolist()
    step, shown = depth_logits_of(reference, words(12), generated[0]), reading.logits[-1]
    assert all(close(shown[column], step[column]) for column in range(STREAMS))


def depth_logits_of(reference: Any, ids: Sequence[int], frame: Sequence[int]) -> Float32:
    """[columns, vocab]: of the frame that comes after this text."""
    with torch.inference_mode():
        output = reference(torch.tensor([ids]))
        given = torch.tensor([[0, *frame[:-1]]])
        hidden = reference.backbone_model(
            inputs_embeds=reference.embed_text_tokens(torch.tensor([ids]))
        ).last_hidden_state[:, -1]
        deep = reference.depth_decoder(input_ids=given, backbone_last_hidden_state=hidden).logits
    expected: Float32 = torch.cat((output.logits[0, -1:], deep[0])).numpy()
    return expected


def test_the_command_writes_every_column(checkpoint: Path, tmp_path: Path) -> None:
    prompt, out = tmp_path / "prompt.json", tmp_path / "out.safetensors"
    prompt.write_text(json.dumps([*words(3), *frames(2)]))
    given = ["model", "logits", str(checkpoint), "--tokens", str(prompt), "--greedy", "3", "--out", str(out)]
    assert CliRunner().invoke(app, given).exit_code == 0
    written = load_file(out)
    assert written["logits"].shape == (5, STREAMS, CODES)
    assert written["logits"].dtype == np.dtype("float32")
    assert written["tokens"].shape == (3, STREAMS)
    assert written["tokens"][0].tolist() == written["logits"][-1].argmax(axis=1).tolist()


@pytest.mark.parametrize("prompt", [None, [5, 6, 7], [[1, 2, 3, 4]], [5, [1, 2, 3, 4], 6, [4, 3, 2, 1]]])
def test_the_command_compares_with_transformers(checkpoint: Path, tmp_path: Path, prompt: Any) -> None:
    given = ["model", "check", str(checkpoint)]
    if prompt is not None:
        (tmp_path / "prompt.json").write_text(json.dumps(prompt))
        given += ["--tokens", str(tmp_path / "prompt.json")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "greedy   12 tokens equal" in result.output


def test_a_checkpoint_that_transformers_saved_gives_the_same(
    checkpoint: Path, reference: Any, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    rows: list[Row] = [*words(5), *frames(5)]
    drivers = [portable(checkpoint), portable(tmp_path)]
    published, saved = (read_frames(driver, rows).logits for driver in drivers)
    for driver in drivers:
        driver.close()
    assert np.array_equal(published, saved)


def test_the_command_tells_of_a_column_that_differs(checkpoint: Path, tmp_path: Path) -> None:
    def other(path: Path, rows: Sequence[Any]) -> Float32:
        logits = frame_logits(path, rows)
        logits[:, STREAMS - 1] += np.arange(CODES)
        return logits

    driver = portable(checkpoint)
    parity = compare(driver, other, checkpoint, words(5), 3)
    driver.close()
    assert not parity.holds
    assert parity.first_difference == 0
    assert parity.deviation > 1


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    for key, value in {
        "tie_codebooks_embeddings": False,
        "brand_new_switch": True,
        "num_codebooks": 5,
    }.items():
        write_checkpoint(tmp_path / key, DECLARATION, tiny_csm())
        edit_config(tmp_path / key, partial(_set, key, value))
        with pytest.raises(LoadError, match=key):
            portable(tmp_path / key)


def _set(key: str, value: object, config: dict[str, Any]) -> None:
    config[key] = value


class TestFrames(CheckpointContract):
    """The whole contract of drivers over tokens of several columns."""

    tolerance: ClassVar[float] = 2e-5
