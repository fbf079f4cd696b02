"""`pie serve` and `pie run` on the CUDA driver: a checkpoint with its tokenizer, several clients, errors, a clean end.

Needs one NVIDIA GPU, and the generic Python guest (`python -m pie_core.guests.build`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable
from pathlib import Path

import pytest
import torch

from pie_core.client import Client
from pie_core.errors import InvalidRequest, PieError
from pie_core.guests.python_component import ARTIFACT
from pie_core.testing.any_architecture import write_checkpoint
from pie_plugins.drivers.dummy import CHECKPOINT
from tests.plugins.models.reference import ARCHITECTURES, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not ARTIFACT.exists(), reason="needs the generic Python guest"),
]

LENGTH = 512
SMALL = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64,
         "max_position_embeddings": LENGTH}  # fmt: skip
READY_S = 90.0  # kernels are compiled by the first that loads


def configuration(folder: Path, device: str, options: str) -> Path:
    """A file for `-c`, and the checkpoint that it names."""
    model = folder / "model"
    model.mkdir()
    write_checkpoint(model, ARCHITECTURES["qwen3"], tiny("qwen3", **SMALL))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, model)
    file = folder / "pie.yaml"
    driver = f"{{type: cuda_native, device: '{device}', options: {options}}}"
    file.write_text(
        f"models: [{{name: m, path: {model}, driver: {driver}}}]\n"
        "server: {drain_s: 0.5}\nauth: {enabled: false}\nruntime: {workers: 1}\n"
    )
    return file


async def line_with(words: str, process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    said = []
    while line := (await process.stdout.readline()).decode().rstrip():
        said.append(line)
        if words in line:
            return line
    raise AssertionError("the server ended:\n" + "\n".join(said))


async def text_of(client: Client, prompt: str) -> str:
    asked = {"prompt": prompt, "max_tokens": 24, "temperature": 0.0}
    process = await client.launch("text-completion", asked)
    pieces = [event.text async for event in process]
    await process.result()
    return "".join(piece for piece in pieces if piece)


async def error_of(asked: Awaitable[object]) -> PieError:
    with pytest.raises(PieError) as caught:
        await asked
    return caught.value


async def use(url: str) -> None:
    """What clients ask of a server that works."""
    async with Client(f"ws{url}", username="alice") as client:
        texts = await asyncio.gather(*(text_of(client, f"Hello {place % 4}") for place in range(16)))
        assert all(texts), "something is said to everybody"
        too_long = {"prompt": "long " * LENGTH, "max_tokens": 4}
        assert str(LENGTH) in str(await error_of(client.run("text-completion", too_long)))
        assert isinstance(await error_of(client.run("text-completion", {})), InvalidRequest)
        endless = await client.launch("text-completion", {"prompt": "Hello", "temperature": 0.0})
        await endless.terminate()
        assert await text_of(client, "Hello 1"), "the others are served as before"
    metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http{url}/metrics").read().decode())
    assert 'pie_failed_passes_total{model="m",replica="0"} 0.0' in metrics


async def serve(folder: Path, device: str, options: str) -> int:
    """The exit code, after a signal."""
    command = [sys.executable, "-m", "pie_core", "serve", "-c", str(configuration(folder, device, options))]
    process = await asyncio.create_subprocess_exec(
        *command,
        "--port",
        "0",
        env={**os.environ, "PIE_HOME": str(folder / "home")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        url = (await line_with("pie listens at http", process)).removeprefix("pie listens at http")
        await asyncio.wait_for(line_with("ready: m", process), READY_S)
        await use(url)
        process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(process.wait(), 30)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_a_server_serves_from_a_gpu_and_frees_it(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    assert asyncio.run(serve(tmp_path, "cuda:0", "{total_pages: 1024, products: library}")) == 0
    assert torch.cuda.mem_get_info()[0] > free - (64 << 20)


def test_a_program_runs_on_a_gpu_by_one_command(tmp_path: Path) -> None:
    file = configuration(tmp_path, "cuda:0", "{total_pages: 1024, products: library}")
    command = [sys.executable, "-m", "pie_core", "run", "-c", str(file), "text-completion"]
    asked = ["--", "--prompt", "Hello", "--max-tokens", "12", "--temperature", "0"]
    home = {**os.environ, "PIE_HOME": str(tmp_path / "home")}
    ran = subprocess.run([*command, *asked], env=home, capture_output=True, text=True, check=False)
    assert (ran.returncode, bool(ran.stdout.strip())) == (0, True), ran.stderr
