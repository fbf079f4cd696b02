"""Programs on the CUDA driver: whole pies in one process and in several, the loop in the engine and in the program.

Needs one NVIDIA GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from benchmarks.engine.stage import Crowd, status
from benchmarks.gpu_guests import guest, inputs_of
from benchmarks.gpu_loop import Story
from benchmarks.gpu_models import SHAPES
from benchmarks.pie_in_process import quiet
from pie_core.app import Application
from pie_core.config import Config, parse_config
from pie_core.ids import ModelName
from pie_core.programs import ComponentProgram
from pie_plugins.drivers.dummy import CHECKPOINT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SMALL = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
PROMPT, TOKENS, PROGRAMS = 20, 30, 6
PATIENCE_S = 40.0  # kernels for prompts are compiled when they are first needed


def configured(folder: Path, runtime: str, depth: int, device: str) -> Config:
    """Random weights of a small Qwen3, with the tokenizer of the dummy model."""
    (folder / "config.json").write_text(json.dumps(SHAPES["0.6B"].config() | SMALL))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    options = "{random_weights: true, total_pages: 512, max_batch_requests: 8, products: library}"
    return parse_config(
        f"runtime: {{{runtime}}}\n"
        f"models: [{{name: m, path: {folder}, driver: {{type: cuda_native, device: '{device}', options: {options}}}, "
        f"scheduler: {{speculation_depth: {depth}}}}}]",
        "test",
        folder,
    )


async def run_programs(folder: Path, runtime: str, depth: int, device: str = "cuda:0") -> None:
    async with Application(configured(folder, runtime, depth, device), quiet) as app:
        inputs = inputs_of([Story(PROMPT, TOKENS)] * PROGRAMS, SMALL["vocab_size"])
        for is_offloaded in (True, False):
            path = folder / f"program-{is_offloaded}.wasm"
            path.write_bytes(guest(is_offloaded=is_offloaded, waits=True, temperature=0.0))
            crowd = Crowd(app, ComponentProgram(path.stem, path), inputs)
            try:
                await asyncio.wait_for(crowd.run(), PATIENCE_S)
            except TimeoutError:
                await tell_where_it_hangs(app)
                raise
        found = await status(app)
    assert found.failed_passes == 0
    assert found.sampled_tokens >= 2 * PROGRAMS * TOKENS
    assert found.contexts == found.running == found.waiting == 0
    assert depth == 0 or found.run_ahead_hits >= PROGRAMS * (TOKENS - 3)


async def tell_where_it_hangs(app: Application) -> None:
    """The engine's process writes the traceback of each of its threads, and ends."""
    engine = app.engine_pid(ModelName("m"))
    if engine is not None:
        os.kill(engine, signal.SIGABRT)
        await asyncio.sleep(1)


@pytest.mark.parametrize("runtime", ["workers: 0", "engine_process: true", "workers: 2"])
def test_programs_decode_on_a_gpu(tmp_path: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    asyncio.run(run_programs(tmp_path, runtime, depth=1))


@pytest.mark.parametrize("depth", [0, 4])
def test_programs_decode_at_every_depth(tmp_path: Path, depth: int) -> None:
    asyncio.run(run_programs(tmp_path, "workers: 0", depth))
