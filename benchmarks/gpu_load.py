"""How long the CUDA driver takes to load a checkpoint, part by part: the first time, and again.

    python -m benchmarks.gpu_load --models 0.6B 8B [--cold] [--folder DIR] [--json FILE]

Writes safetensors of the real shapes, cut into files as on the hub, and loads them in processes of their own, as a
server does. The files lie in memory then, as those of a checkpoint that was fetched or read before do. `--cold` gives
the first load an empty cache of compiled kernels, which the second one finds filled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_models import SHAPES, Shape
from pie_core.contracts.driver import DriverRequest, Progress
from pie_plugins.drivers import cuda_native
from pie_plugins.drivers.cuda_native.load_times import LoadTimes
from pie_plugins.models import llama, qwen3

ARCHITECTURES = {each.name: each for each in (llama.DECLARATION, qwen3.DECLARATION)}
FILE_BYTES = 5 * 10**9  # about as much as files on the hub hold
WRITERS, ALIGNED = 4, 8
DRAWN = 2**24  # values that are drawn; matrices repeat them, for drawing takes longer than writing
SPREAD, SEED = 0.02, 7


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load, in seconds."""

    model: str
    run: str
    gigabytes: float
    imports: float  # until the driver is asked to load
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def lines(self) -> Iterator[str]:
        rate = self.gigabytes / max(self.seconds, 1e-9)
        yield (
            f"{self.model:9} {self.run:6} {self.seconds:7.2f} s, {self.gigabytes:.1f} GB ({rate:.1f} GB/s);"
            f" imports {self.imports:.2f} s"
        )
        yield from (f"{'':16} {seconds:7.2f}   {part}" for part, seconds in self.parts.items())


def main(given: Sequence[str] | None = None) -> None:
    arguments = _parse(given)
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.device, arguments.option)))
        return
    seen: list[Loaded] = []
    for name in arguments.models:
        with TemporaryDirectory(dir=arguments.folder) as folder:
            started = time.perf_counter()
            path, size = Path(folder), write_checkpoint(SHAPES[name], Path(folder), arguments.file_bytes)
            print(f"{name}: {size / 1e9:.1f} GB written in {time.perf_counter() - started:.1f} s", flush=True)
            for loaded in _loads(name, path, size, arguments):
                print(*loaded.lines(), sep="\n", flush=True)
                seen.append(loaded)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(each) for each in seen], indent=1) + "\n")


def _parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["0.6B"], choices=sorted(SHAPES))
    parser.add_argument("--cold", action="store_true", help="compile all kernels at the first load")
    parser.add_argument("--repeats", type=int, default=2, help="loads of each model")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written, and deleted again")
    parser.add_argument("--file-bytes", type=int, default=FILE_BYTES, help="of one safetensors file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a driver option, as JSON"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--load", type=Path, help="load this checkpoint once, here, and print the seconds as JSON"
    )
    return parser.parse_args(given)


def _loads(name: str, path: Path, size: int, arguments: argparse.Namespace) -> Iterator[Loaded]:
    with TemporaryDirectory() as cache:
        environment = os.environ | ({"TRITON_CACHE_DIR": cache} if arguments.cold else {})
        chosen = [word for option in arguments.option for word in ("--option", option)]
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_load",
            "--load",
            str(path),
            "--device",
            arguments.device,
        ]
        for run in range(arguments.repeats):
            said = subprocess.run(
                command + chosen, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            found = json.loads(said.splitlines()[-1])
            yield Loaded(name, "again" if run else "first", size / 1e9, found["imports"], found["parts"])


def load(path: Path, device: str, chosen: Sequence[str]) -> dict[str, Any]:
    """In this process."""
    (declaration,) = cuda_native.pie_drivers()
    given = dict(option.split("=", 1) for option in chosen)
    options = declaration.options(**{name: json.loads(text) for name, text in given.items()})
    imports = time.time() - _began()
    times = LoadTimes(_ignore)
    driver = declaration.load(DriverRequest(path, device, options, ARCHITECTURES, {}, progress=times))
    parts = times.seconds()
    driver.close()
    return {"imports": imports, "parts": parts}


def _began() -> float:
    """When this process did, by the clock of the system."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    running = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - running


def write_checkpoint(shape: Shape, folder: Path, file_bytes: int = FILE_BYTES) -> int:
    """A directory as it is fetched from the hub, with random weights. Returns the bytes of its tensors."""
    shape.write(folder)
    content = _content()
    files = list(_files(shape, file_bytes))
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    with ThreadPoolExecutor(WRITERS) as writers:
        for written in [
            writers.submit(_write_file, folder / name, shapes, content)
            for name, shapes in zip(names, files, strict=True)
        ]:
            written.result()
    owners = {tensor: name for name, shapes in zip(names, files, strict=True) for tensor in shapes}
    total = sum(_num_bytes(size) for shapes in files for size in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _files(shape: Shape, file_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file, by name."""
    (declaration,) = (each for each in ARCHITECTURES.values() if shape.model_type in each.model_types)
    architecture: Any = declaration.load()
    table = architecture.weights(architecture.config(shape.config(), shape.name))
    file: dict[str, tuple[int, ...]] = {}
    for source in table.sources():
        size = source.stored_shape("hf")
        if file and sum(map(_num_bytes, file.values())) + _num_bytes(size) > file_bytes:
            yield file
            file = {}
        file[source.name("hf")] = size
    yield file


def _num_bytes(size: tuple[int, ...]) -> int:
    return torch.bfloat16.itemsize * int(torch.Size(size).numel())


@dataclass(frozen=True, slots=True)
class _Content:
    """What tensors are filled with, again and again."""

    matrix: memoryview
    vector: memoryview


def _content() -> _Content:
    """Matrices are normal, norms are one."""
    drawn = torch.empty(DRAWN, dtype=torch.bfloat16)
    drawn.normal_(0, SPREAD, generator=torch.Generator().manual_seed(SEED))
    return _Content(_bytes(drawn), _bytes(torch.ones_like(drawn)))


def _bytes(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def _write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], content: _Content) -> None:
    """The format's own layout: its library would copy every tensor twice."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shapes.items():
        start, end = end, end + _num_bytes(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in shapes.values():
            source, left = content.vector if len(size) == 1 else content.matrix, _num_bytes(size)
            while left:
                left -= file.write(source[:left])


def _ignore(_: Progress) -> None:
    """Nobody watches."""


if __name__ == "__main__":
    main()
