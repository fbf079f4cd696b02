"""An engine over models with windows and with recurrent state: whatever contexts go through, greedy tokens are those of
a plain run over the same history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pie_core.contracts.driver import Driver
from pie_core.contracts.forward import Float32, ProbeKind
from pie_core.engine.messages import (
    DropContext,
    EndProcess,
    ForwardDone,
    OpenSnapshot,
    SamplerSpec,
    SaveSnapshot,
    SnapshotOpened,
    TruncateContext,
)
from pie_core.engine.messages import Probe as EngineProbe
from pie_core.engine.messages import Sample as EngineSample
from pie_core.ids import ContextId, ProcessId, Tenant
from pie_core.testing.any_architecture import write_checkpoint
from pie_core.testing.batches import Mask, Probe, Request, Sample, Stepper, probe_values
from pie_plugins.models import gemma4, kimi_linear, nemotron_h, qwen3_5
from tests.core.engine.stepping import SteppedEngine
from tests.plugins.models.reference import portable
from tests.plugins.models.test_gemma4 import SMALL
from tests.plugins.models.test_kimi_linear import tiny_kimi
from tests.plugins.models.test_nemotron_h import tiny_nemotron
from tests.plugins.models.test_qwen3_5 import tiny_qwen

MODELS = {
    "gemma4": (gemma4.DECLARATION, SMALL),
    "kimi_linear": (kimi_linear.DECLARATION, tiny_kimi([1, 2], [3])),
    "nemotron_h": (nemotron_h.DECLARATION, tiny_nemotron("ME*")),
    "qwen3_5": (qwen3_5.DENSE, tiny_qwen()),
}
PROMPT = [(37 * place + 11) % 320 for place in range(29)]


@pytest.fixture(params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, *MODELS[request.param])
    return tmp_path


def make_driver(folder: Path, **options: object) -> Driver:
    return portable(folder, kv_page_size=4, total_pages=64, state_slots=24, **options)


class Plain:
    """Reruns the whole history for every token."""

    def __init__(self, folder: Path) -> None:
        self._stepper = Stepper(make_driver(folder))

    def goes_on(self, history: Sequence[int], count: int) -> list[int]:
        tokens = list(history)
        for _ in range(count):
            context = self._stepper.context()
            tokens.append(int(self._stepper.run([Request(context, tokens, samples=[Sample()])]).tokens[0]))
            self._stepper.book.drop_context(context)
        return tokens[len(history) :]


def test_contexts_that_fork_go_back_and_are_saved_generate_what_a_plain_run_does(folder: Path) -> None:
    engine, plain = SteppedEngine(make_driver(folder), checkpoint_tokens=8), Plain(folder)
    engine.create(1)
    first = engine.generate(1, PROMPT, 7)
    assert first == plain.goes_on(PROMPT, 7)
    history = engine.history(1)
    engine.fork(1, 2)
    assert engine.generate(2, [5, 6], 4) == plain.goes_on([*history, 5, 6], 4)
    for length in (30, 17, 3):  # behind a kept state, between two, before the first
        engine.send(TruncateContext(ContextId(1), length))
        history = [*history[:length], 9]
        assert engine.generate(1, [9], 3) == plain.goes_on(history, 3)
        history = engine.history(1)
    engine.send(SaveSnapshot(engine.new_request(), ContextId(2), "kept", b""))
    engine.run()
    saved = engine.history(2)
    engine.send(EndProcess(ProcessId("p")))
    opening = engine.new_request()
    engine.send(OpenSnapshot(opening, ContextId(3), ProcessId("q"), Tenant("t"), "kept", True))
    engine.final(opening, SnapshotOpened)
    assert engine.generate(3, [8], 3) == plain.goes_on([*saved, 8], 3)
    engine.send(DropContext(ContextId(3)))
    assert engine.all_pages_are_free()


def test_contexts_that_are_swapped_out_go_on_as_a_plain_run_does(folder: Path) -> None:
    engine = SteppedEngine(make_driver(folder, host_pages=64), prefix_cache=False)
    plain, histories = Plain(folder), {}
    engine.create(1)
    engine.generate(1, PROMPT, 5)
    engine.fork(1, 2)
    for context in (1, 2):
        engine.generate(context, [context], 4)
        histories[context] = engine.history(context)
    for _ in histories:
        assert engine.engine._suspend_idle()
    assert engine.status().swapping.contexts == 2
    for context, history in histories.items():
        assert engine.generate(context, [9], 4) == plain.goes_on([*history, 9], 4)
    status = engine.status()
    assert status.replayed_tokens == 0
    assert status.swapping.pages_in == status.swapping.pages_out > 0
    assert status.swapping.bytes == 0


SAMPLED = SamplerSpec(temperature=1.0, seed=4)


def story(folder: Path, total_pages: int = 64, **options: Any) -> list[list[int]]:
    """Generations and loops of equal beginnings, a fork, a way back; everything that was drawn."""
    driver = portable(folder, kv_page_size=4, total_pages=total_pages, state_slots=24)
    engine = SteppedEngine(driver, checkpoint_tokens=8, **options)
    drawn = []
    for context, sampler in enumerate((SamplerSpec(), SamplerSpec(), SAMPLED), start=1):
        engine.create(context, seed=context)
        drawn.append(engine.generate(context, PROMPT, 6, sampler))
    drawn.append(stepped(engine, 1, 5, SamplerSpec()))
    engine.fork(1, 4)
    drawn += [stepped(engine, context, 4, SAMPLED) for context in (4, 1)]
    engine.send(TruncateContext(ContextId(2), 21))
    drawn += [stepped(engine, context, 4, SamplerSpec()) for context in (2, 3)]
    drawn += [engine.history(context) for context in (1, 2, 3, 4)]
    status = engine.status()
    assert (status.run_ahead_hits > 0) == (options.get("speculation_depth") != 0)
    assert (status.prefix_hit_tokens > 0) == options.get("prefix_cache", True)
    assert (status.suspensions > 0) == (total_pages < 64)
    driver.close()
    return drawn


def stepped(engine: SteppedEngine, context: int, count: int, sampler: SamplerSpec) -> list[int]:
    """One pass for each token, as a program asks for them: the engine runs ahead of it."""
    drawn: list[int] = []
    for _ in range(count):
        request = engine.submit(context, drawn[-1:] or [9], samples=(EngineSample(0, sampler),))
        engine.run_until_answered(request)
        drawn += engine.final(request, ForwardDone).tokens
    return drawn


def test_what_runs_ahead_is_shared_or_computed_again_changes_no_token(folder: Path) -> None:
    plain = story(folder, speculation_depth=0, max_in_flight=1, prefix_cache=False)
    assert story(folder, speculation_depth=1) == plain
    assert story(folder, speculation_depth=4) == plain
    assert story(folder, total_pages=14, max_batch_tokens=7) == plain


def test_masks_hold_for_attention_layers_where_a_program_asks_for_that(folder: Path) -> None:
    engine, stepper = SteppedEngine(make_driver(folder), checkpoint_tokens=8), Stepper(make_driver(folder))
    spans = {row: [(0, 2), (10, row + 1)] for row in range(12, len(PROMPT))}  # rows 2 to 9 are hidden
    masks = tuple((0, 2, 8, row - 9) if row in spans else (0, row + 1) for row in range(len(PROMPT)))
    last = len(PROMPT) - 1
    engine.create(1)
    if any(space.group.kind == "state" for space in stepper.book.spaces):
        refused = engine.refused(1, PROMPT, masks=masks)
        assert refused.code == "unsupported"
        assert "attention layers alone" in refused.message

    def logits(start: int) -> Float32:
        """Of the last row, through the engine, which is fed the rows from `start` on."""
        probes = (EngineProbe(last - start, int(ProbeKind.LOGITS)),)
        asked = {"masks": masks[start:], "masks_attention_only": True, "probes": probes}
        return np.frombuffer(engine.forward(1, PROMPT[start:], **asked).probes[0].values, "<f4")

    def plain(masks: Sequence[Mask]) -> Float32:
        probes = [Probe(ProbeKind.LOGITS, last)]
        return probe_values(stepper.run([Request(stepper.context(), PROMPT, probes=probes, masks=masks)]), 0)

    expected = plain([Mask(*each) for each in spans.items()])
    tolerance = 1e-4 * float(expected.std())
    assert np.abs(logits(0) - expected).max() <= tolerance
    engine.send(
        TruncateContext(ContextId(1), 21)
    )  # back to a kept state, and rows computed again under their masks
    assert np.abs(logits(21) - expected).max() <= tolerance
    assert np.abs(plain([]) - expected).max() > 100 * tolerance


def test_a_batch_of_contexts_generates_what_each_does_alone(folder: Path) -> None:
    engine, plain = SteppedEngine(make_driver(folder, max_batch_tokens=16)), Plain(folder)
    prompts = [PROMPT[: 3 + 5 * context] for context in range(5)]
    for context in range(5):
        engine.create(context + 1)
    requests = [engine.begin_generation(context + 1, prompt, 4) for context, prompt in enumerate(prompts)]
    engine.run()
    assert [engine.generated(each) for each in requests] == [plain.goes_on(each, 4) for each in prompts]


def test_pages_that_leave_a_window_are_free_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, gemma4.DECLARATION, SMALL)
    engine = SteppedEngine(make_driver(tmp_path))
    engine.create(1)
    engine.forward(1, PROMPT)
    for token in PROMPT:
        engine.forward(1, [token])
    status = engine.status()
    used = [total - free for total, free in zip(status.total_pages, status.free_pages, strict=True)]
    assert used == [
        -(-2 * len(PROMPT) // 4),
        2,
    ]  # rows of the whole context; rows that a window of 6 still reaches
