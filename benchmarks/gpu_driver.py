"""The CUDA driver as the GPU benchmarks load it: with random weights of a model's shapes, one model after the other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu_models import SHAPES, Shape
from pie_core.contracts.driver import Driver, DriverRequest
from pie_plugins.drivers import cuda_native
from pie_plugins.models import llama, qwen3


def driver_arguments(description: str | None, batches: Sequence[int]) -> argparse.ArgumentParser:
    """What every benchmark of the driver takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["0.6B"], choices=sorted(SHAPES))
    parser.add_argument("--batches", type=int, nargs="+", default=list(batches))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="of what is decoded; 0 is greedy")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a driver option, as JSON"
    )
    parser.add_argument("--json", type=Path)
    return parser


@contextmanager
def loaded(shape: Shape, device: str, chosen: Sequence[str]) -> Iterator[Driver]:
    """The driver with random weights; `chosen` are options as NAME=JSON. Its memory is free for the next one then."""
    (declaration,) = cuda_native.pie_drivers()
    architectures = {each.name: each for each in (llama.DECLARATION, qwen3.DECLARATION)}
    given = {name: json.loads(text) for name, text in (option.split("=", 1) for option in chosen)}
    options = declaration.options(random_weights=True, **given)
    with TemporaryDirectory() as folder:
        driver = declaration.load(
            DriverRequest(shape.write(Path(folder)), device, options, architectures, {})
        )
        try:
            yield driver
        finally:
            driver.close()
