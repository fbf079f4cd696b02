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
import urllib.error
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
OPTIONS = "{total_pages: 1024, products: library}"
QUICK = (
    "{total_pages: 1024, products: library, graph_rows: 32, max_batch_requests: 4}"  # loaded again and again
)
ABORTED = {"terminate", "Aborted", "SIGABRT"}
READY_S = 90.0  # kernels are compiled by the first that loads


FAULT = """
import importlib.util, os, sys

NAME, ONCE, FAULTED = "pie_plugins.drivers.cuda_native.step_runner", 10, os.environ["FAULTED"]

class Finder:
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), break_steps(module))
        return spec

def break_steps(module):
    enqueue = module.StepRunner.enqueue

    def breaking(self, ticket, batch):
        if ticket == ONCE and not os.path.exists(FAULTED):
            open(FAULTED, "w").close()
            fault()
        return enqueue(self, ticket, batch)

    module.StepRunner.enqueue = breaking

def fault():
    import torch
    torch._assert_async(torch.zeros(1, device="cuda"))

sys.meta_path.insert(0, Finder())
"""


def faulting(folder: Path) -> dict[str, str]:
    """The environment of a pie whose GPU faults once, at the tenth step, in whichever of its processes that is."""
    (folder / "sitecustomize.py").write_text(FAULT)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH"), os.getcwd()]))
    return {"PYTHONPATH": path, "FAULTED": str(folder / "faulted")}


def configuration(folder: Path, device: str, options: str, runtime: str = "{workers: 1}") -> Path:
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
        f"server: {{drain_s: 0.5}}\nauth: {{enabled: false}}\nruntime: {runtime}\n"
    )
    return file


class Server:
    """`pie serve` in a process of its own."""

    def __init__(self, folder: Path, file: Path, **environment: str) -> None:
        self._command = [sys.executable, "-m", "pie_core", "serve", "-c", str(file), "--port", "0"]
        self._environment = {**os.environ, "PIE_HOME": str(folder / "home"), **environment}
        self.said: list[str] = []

    async def __aenter__(self) -> str:
        """What stands behind `http` in its address, once the model is loaded."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        url = await self._line_with("pie listens at http")
        await asyncio.wait_for(self._line_with("ready: m"), READY_S)
        return url.removeprefix("pie listens at http")

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def stop(self) -> int:
        """The exit code, after a signal."""
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGTERM)
        rest = await asyncio.wait_for(self._process.stdout.read(), 30)
        self.said += rest.decode().splitlines()
        return await self._process.wait()

    async def _line_with(self, words: str) -> str:
        assert self._process.stdout is not None
        while line := (await self._process.stdout.readline()).decode().rstrip():
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError("the server ended:\n" + "\n".join(self.said))


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
    server = Server(folder, configuration(folder, device, options))
    async with server as url:
        await use(url)
        return await server.stop()


@pytest.mark.alone  # what others take of the GPU meanwhile would count
def test_a_server_serves_from_a_gpu_and_frees_it(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    assert asyncio.run(serve(tmp_path, "cuda:0", OPTIONS)) == 0
    assert torch.cuda.mem_get_info()[0] > free - (64 << 20)


def pie_run(file: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pie_core", "run", "-c", str(file), "text-completion"]
    asked = ["--", "--prompt", "Hello", "--max-tokens", "12", "--temperature", "0"]
    home = {**os.environ, "PIE_HOME": str(folder / "home"), **environment}
    return subprocess.run([*command, *asked], env=home, capture_output=True, text=True, check=False)


def test_a_program_runs_on_a_gpu_by_one_command(tmp_path: Path) -> None:
    ran = pie_run(configuration(tmp_path, "cuda:0", OPTIONS), tmp_path)
    assert (ran.returncode, bool(ran.stdout.strip())) == (0, True), ran.stderr


@pytest.mark.parametrize("runtime", ["{workers: 0}", "{engine_process: true}"])
def test_a_command_whose_gpu_faults_ends_with_the_reason(tmp_path: Path, runtime: str) -> None:
    ran = pie_run(configuration(tmp_path, "cuda:0", QUICK, runtime), tmp_path, **faulting(tmp_path))
    assert ran.returncode == 1, ran.stderr
    assert "the GPU faulted" in ran.stderr
    assert not ABORTED & set(ran.stderr.split()), ran.stderr


@pytest.mark.parametrize("runtime", ["{workers: 1}", "{engine_process: true}"])
def test_a_server_starts_an_engine_whose_gpu_faulted_again(tmp_path: Path, runtime: str) -> None:
    assert asyncio.run(serve_through_a_fault(tmp_path, "cuda:0", runtime)) == 0


async def serve_through_a_fault(folder: Path, device: str, runtime: str) -> int:
    server = Server(folder, configuration(folder, device, QUICK, runtime), **faulting(folder))
    async with server as url, Client(f"ws{url}", username="alice") as client:
        assert "the GPU faulted" in str(await error_of(text_of(client, "Hello")))
        await loaded_again(url)
        assert await text_of(client, "Hello")
        code = await server.stop()
    said = "\n".join(server.said)
    assert not ABORTED & set(said.split()), said
    return code


async def loaded_again(url: str) -> None:
    for _ in range(int(READY_S / 0.2)):
        if await asyncio.to_thread(answer_of, f"http{url}/ready") == 200:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"the model did not come back in {READY_S:g} s")


def answer_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_server_with_its_engine_inside_outlives_the_fault(tmp_path: Path) -> None:
    assert asyncio.run(serve_without_a_gpu(tmp_path, "cuda:0")) == 0


async def serve_without_a_gpu(folder: Path, device: str) -> int:
    server = Server(folder, configuration(folder, device, QUICK, "{workers: 0}"), **faulting(folder))
    async with server as url, Client(f"ws{url}", username="alice") as client:
        for _ in range(2):
            assert "the GPU faulted" in str(await error_of(text_of(client, "Hello")))
        assert await asyncio.to_thread(answer_of, f"http{url}/health") == 200
        assert await asyncio.to_thread(answer_of, f"http{url}/ready") == 503
        code = await server.stop()
    said = "\n".join(server.said)
    assert not ABORTED & set(said.split()), said
    return code
