"""The engine on the portable driver in float32: the same tokens whatever runs ahead, is shared or is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pie_core.engine.messages import EvictRows, ForwardDone, Sample, SamplerSpec, TruncateContext
from pie_core.ids import ContextId
from pie_core.testing.any_architecture import write_checkpoint
from pie_plugins.models.llama import DECLARATION
from tests.core.engine.stepping import SteppedEngine
from tests.plugins.models.reference import portable, tiny

SAMPLERS = (SamplerSpec(), SamplerSpec(temperature=1.0), SamplerSpec(temperature=0.9, top_p=0.9, seed=4))
PROMPT = list(range(30, 47))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, DECLARATION, tiny("llama"))
    return path


Story = list[Any]


def story(
    folder: Path, sampler: SamplerSpec, total_pages: int = 64, host_pages: int = 0, **options: Any
) -> Story:
    """Loops, generations, forks, going back and evicting on three contexts; everything that was drawn."""
    driver = portable(folder, kv_page_size=4, total_pages=total_pages, host_pages=host_pages)
    engine = SteppedEngine(driver, **options)
    drawn: Story = []
    try:
        for context in (1, 2, 3):
            engine.create(context, seed=context)
            drawn.append(engine.generate(context, PROMPT, 7, sampler))
        drawn.append(stepped(engine, 1, 6, sampler))
        engine.fork(1, 4)
        drawn.append(stepped(engine, 4, 4, sampler))
        engine.send(TruncateContext(ContextId(1), 20), EvictRows(ContextId(2), 3, 11))
        drawn += [stepped(engine, context, 5, sampler) for context in (1, 2, 3)]
        drawn.append([engine.history(context) for context in (1, 2, 3, 4)])
        suspended = engine.status().suspensions, engine.status().swapping.suspensions
        assert [count > 0 for count in suspended] == [total_pages < 64, host_pages > 0]
    finally:
        driver.close()
    return drawn


def stepped(engine: SteppedEngine, context: int, count: int, sampler: SamplerSpec) -> list[int]:
    drawn: list[int] = []
    for _ in range(count):
        request = engine.submit(context, drawn[-1:] or [9], samples=(Sample(0, sampler),))
        engine.run_until_answered(request)
        drawn += engine.final(request, ForwardDone).tokens
    return drawn


@pytest.fixture(scope="module", params=SAMPLERS, ids=["greedy", "sampled", "seeded"])
def plain(request: pytest.FixtureRequest, folder: Path) -> tuple[SamplerSpec, Story]:
    sampler = request.param
    return sampler, story(folder, sampler, speculation_depth=0, max_in_flight=1, prefix_cache=False)


@pytest.mark.parametrize("depth", [1, 4])
def test_what_runs_ahead_and_what_is_shared_changes_no_token(
    plain: tuple[SamplerSpec, Story], folder: Path, depth: int
) -> None:
    sampler, expected = plain
    assert story(folder, sampler, speculation_depth=depth) == expected


@pytest.mark.parametrize("host_pages", [0, 9, 64])
def test_contexts_that_gave_their_pages_up_go_on_alike(
    plain: tuple[SamplerSpec, Story], folder: Path, host_pages: int
) -> None:
    """All of them computed again, some of them, none."""
    sampler, expected = plain
    assert story(folder, sampler, 12, host_pages, max_batch_tokens=5) == expected
