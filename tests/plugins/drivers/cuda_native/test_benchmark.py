"""The GPU benchmark's own arithmetic, and its loop over a tiny model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks import gpu_attention, gpu_kernels, gpu_load, gpu_page_order
from benchmarks.gpu import _peer, _peer_entries, mixed_stories
from benchmarks.gpu_guests import decode_with_guests, run_with_guests
from benchmarks.gpu_loop import Order, Story, Timed, pages_in, run
from benchmarks.gpu_models import SHAPES, Shape, decode_floor_ms
from benchmarks.gpu_profile import Launch, Profile, fill
from pie_plugins.drivers.cuda_native.timeline import timeline_of
from tests.plugins.drivers.cuda_native.machine import DEVICE, cuda_native
from tests.plugins.models.reference import tiny


def test_the_mixed_workload_has_the_tokens_it_is_known_by() -> None:
    assert sum(story.tokens for story in mixed_stories()) == 133_966


@pytest.mark.parametrize(
    ("model", "batch", "floor"), [("0.6B", 1, 0.284), ("0.6B", 256, 2.025), ("8B", 32, 3.801)]
)
def test_the_floor_is_the_memory_s(model: str, batch: int, floor: float) -> None:
    assert decode_floor_ms(SHAPES[model], batch, 256) == pytest.approx(floor, rel=2e-3)


@pytest.mark.parametrize("depth", [0, 2])
def test_every_story_gets_its_tokens(tmp_path: Path, depth: int) -> None:
    """More contexts than fit in a step, and prompts longer than a step."""
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3")))
    driver = cuda_native(tmp_path, random_weights=True, max_batch_tokens=16, max_batch_requests=4)
    stories = [Story(40, 3), Story(2, 5), Story(9, 1), Story(7, 4)]
    timed = run(driver, stories, temperature=0.5, depth=depth)
    assert timed.tokens == 13
    assert (
        len(timed.periods_s) == len(timed.busy_s) == 4
    )  # the longest story's, less the one its prefill drew
    assert timed.first_token_s > 0


def test_what_a_device_waits_is_no_matter_of_steps_that_grow() -> None:
    busy = [1e-3 * place**3 for place in range(1, 9)]
    timed = Timed(periods_s=[each + 7e-6 for each in busy[:-1]] + [1.0], busy_s=busy)
    assert timed.idle_us == pytest.approx(7)


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_programs_decode_on_a_driver_that_is_lent(tmp_path: Path, is_offloaded: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3")))
    driver = cuda_native(tmp_path, random_weights=True)
    decode = asyncio.run(decode_with_guests(driver, 3, 9, 24, 1, is_offloaded=is_offloaded))
    assert decode.steps > 3
    assert decode.tokens_per_s > 0
    assert run(driver, [Story(5, 2)]).tokens == 2  # it is still open
    driver.close()


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_programs_compute_every_row_of_their_stories(tmp_path: Path, is_offloaded: bool) -> None:
    """No prompt is another's, so no page is shared and no row taken over."""
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3")))
    driver = cuda_native(tmp_path, random_weights=True)
    stories = [Story(40, 5), Story(33, 9), Story(64, 2), Story(64, 3)]
    with patch.object(driver, "submit", wraps=driver.submit) as submit:
        whole = asyncio.run(run_with_guests(driver, stories, 1, is_offloaded=is_offloaded, temperature=0.6))
    assert whole.seconds > 0
    assert sum(step.rows for step in whole.steps) >= sum(each.prompt + each.tokens - 1 for each in stories)
    for call in submit.call_args_list:
        pages = call.args[0].cache[0].pages
        assert len(np.unique(pages)) == len(pages)
    driver.close()


@pytest.mark.parametrize("order", ["pool", "scattered", "contiguous"])
def test_pages_hold_every_story_and_nobody_else_s(order: Order) -> None:
    stories = [Story(40, 30), Story(1, 1), Story(17, 90), Story(16, 16)]
    pages = pages_in(order, stories, 16, 64)
    assert [len(each) for each in pages] == [5, 1, 7, 2]
    for step in range(90):
        alive = [
            held[: -(-(story.prompt + step) // 16)]
            for story, held in zip(stories, pages, strict=True)
            if step < story.tokens  # the last token is never fed
        ]
        live = np.concatenate(alive)
        assert len(np.unique(live)) == len(live)
        assert live.max() < 64


def test_results_of_a_peer_are_found_by_model_and_cell(tmp_path: Path) -> None:
    one, two = tmp_path / "vllm_mixed_8B.json", tmp_path / "vllm_check.json"
    one.write_text(
        json.dumps(
            [{"model": "8B", "bs": 1, "ms_per_step": 5.2}, {"model": "8B", "workload": "mixed256", "s": 9.0}]
        )
    )
    two.write_text(json.dumps({"results": [{"bs": 1, "n_in": 128, "ms_per_step": 1.6}]}))
    peers = [*_peer_entries(one), *_peer_entries(two)]
    assert _peer(peers, "8B", {"bs": 1}, "ms_per_step") == 5.2
    assert _peer(peers, "0.6B", {"bs": 1, "n_in": 128}, "ms_per_step") == 1.6
    assert _peer(peers, "0.6B", {"bs": 2}, "ms_per_step") == 0.0


TINY = Shape("tiny", "qwen3", 320, 64, 128, 2, 4, 2, tied=True, head_dim=32)
KERNELS = [
    "prepare", "embed", "heads and attention", "attention", "product qkv, normed", "  product qkv, library",
    "product output, onto rows", "  product output, library", "product gate up, normed, silu",
    "  product gate up, library", "product down, onto rows", "  product down, library", "product head",
    "  product head, library", "norm", "sample greedy", "sample temperature", "sample top-p", "sample top-k, top-p",
    "settle",
]  # fmt: skip


@torch.inference_mode()
def test_every_kernel_of_a_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "LONGEST", 512)
    monkeypatch.setattr(gpu_kernels, "BYTES_OF_MATRICES", 2**16)
    timeline = timeline_of(torch.device(DEVICE))
    with timeline.main():
        rows = list(gpu_kernels.model_rows(TINY, [1, 3], timeline))
    assert [(row.batch, row.kernel) for row in rows] == [
        (batch, name) for batch in (1, 3) for name in KERNELS
    ]
    assert all(row.us > 0 for row in rows)
    assert "x2 " in rows[4].line()


@torch.inference_mode()
def test_attention_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without FlashInfer, which has no kernels for heads as small as these."""
    monkeypatch.setattr(gpu_attention, "BYTES_OF_SETS", 1)
    monkeypatch.setattr(gpu_attention, "has_flashinfer", lambda _: False)
    timeline = timeline_of(torch.device(DEVICE))
    with timeline.main():
        rows = [
            *gpu_attention.decoded(TINY, timeline, [(2, 40)]),
            *gpu_attention.shared(TINY, timeline, [(4, 64)]),
            *gpu_attention.prompts(TINY, timeline, [48]),
        ]
    own = [(row.part, row.requests, row.columns, row.way) for row in rows]
    assert own == [
        ("decode", 2, 40, "own"),
        ("shared", 4, 64, "read once for tiles"),
        ("shared", 4, 64, "read by everybody"),
        ("prompt", 1, 48, "own"),
    ]
    assert all(row.floor_us > 0 and row.us > 0 for row in rows)


@torch.inference_mode()
def test_attention_is_timed_over_pages_in_every_order() -> None:
    timeline = timeline_of(torch.device(DEVICE))
    with timeline.main():
        rows = gpu_page_order.measured(TINY, 8, 100 * 8 * TINY.row_bytes, timeline, [(2, 40), (9, 96)])
    orders = ["pool", "contiguous", "lowest mixed", "10%", "30%", "100%", "runs of 2", "runs of 4"]
    assert [row.order for row in rows] == orders, "9 x 96 rows do not fit"
    assert all(row.floor_us > 0 and row.us > 0 for row in rows)


def traced(*spans: tuple[str, float, float]) -> list[Launch]:
    return [Launch(*span) for span in spans]


def test_kernels_that_begin_early_have_what_they_add_to_the_step() -> None:
    """`b` begins with `a` and waits for it; then nothing runs for a while; a step is followed after 4 us."""
    step = [("HtoD", 0, 2), ("a", 3, 10), ("b", 3, 15), ("c", 9, 12), ("d", 20, 30), *[("e", 30, 30)] * 6]
    both = [*step, *((name, start + 34, end + 34) for name, start, end in step), ("HtoD", 68, 69)]
    found = Profile("tiny", 1)
    fill(found, traced(*both))
    assert found.kernels == {"HtoD": (1, 2), "a": (1, 7), "b": (1, 5), "c": (1, 0), "d": (1, 10), "e": (6, 0)}
    assert (found.inside, found.between, found.step) == (6, [4], 32)
    whole = 2 * (sum(us for _, us in found.kernels.values()) + found.inside) + sum(found.between)
    assert whole == 2 * found.step


TINY = Shape("tiny", "qwen3", 300, 64, 96, layers=2, heads=4, kv_heads=2, tied=False, head_dim=16)


def test_loading_is_timed_part_by_part_from_files_as_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    results, options = tmp_path / "loads.json", {"dtype": "float32", "total_pages": 64, "graph_rows": 16}
    given = [f"--option={name}={json.dumps(value)}" for name, value in options.items()]
    where = ["--device", DEVICE, "--folder", str(tmp_path), "--file-bytes", "50000", "--json", str(results)]
    gpu_load.main(["--models", "tiny", "--cold", *where, *given])
    first, again = json.loads(results.read_text())
    assert (first["run"], again["run"]) == ("first", "again")
    for loaded in (first, again):
        assert {"loading weights", "recording graphs of prompts", "recording graphs of decoding"} <= loaded[
            "parts"
        ].keys()
        assert 0 < loaded["imports"] < 600
    assert "loading weights" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["loads.json"]  # it clears up


def test_a_checkpoint_is_cut_into_files_with_an_index(tmp_path: Path) -> None:
    size = gpu_load.write_checkpoint(TINY, tmp_path, file_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert index["metadata"]["total_size"] == size == 2 * (TINY.weights_read + 300 * 64 + 5 * 64 + 4 * 16)
