"""Microseconds of one matrix product: packed for oneDNN against torch's plain one.

    python -m benchmarks.cpu_kernels --rows 1 8 32 --threads 1 --json FILE

The shapes are those of SmolLM2-135M; each is multiplied with as many different matrices as the model has layers, so
that weights come from memory as they do in a real step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pie_plugins.drivers.portable.linear import LinearProduct, PlainLinear, linear_product

SHAPES = {"qkv": (576, 960), "output": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}
LAYERS = 30
REPEATS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for name, shape in SHAPES.items():
                results += [_compare(name, shape, dtype, rows) for rows in arguments.rows]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _compare(name: str, shape: tuple[int, int], dtype: torch.dtype, rows: int) -> dict[str, object]:
    columns, outputs = shape
    weights = [torch.randn(outputs, columns, dtype=dtype) for _ in range(LAYERS)]
    x = torch.randn(rows, columns, dtype=dtype)
    plain = _measure(PlainLinear(), weights, x)
    packed = _measure(linear_product("cpu", dtype), weights, x)
    print(
        f"{dtype!s:15} {name:8} rows {rows:3}: plain {plain:7.1f} us  packed {packed:7.1f} us"
        f"  ({plain / packed:.2f} x)",
        flush=True,
    )
    return {"dtype": str(dtype), "name": name, "rows": rows, "plain_us": plain, "packed_us": packed}


def _measure(product: LinearProduct, weights: list[torch.Tensor], x: torch.Tensor) -> float:
    matrices = [product.prepare(weight, None) for weight in weights]
    multiply: Callable[..., torch.Tensor] = product.__call__

    def once() -> float:
        started = time.perf_counter()
        for matrix in matrices:
            multiply(x, matrix)
        return (time.perf_counter() - started) / len(matrices)

    return 1e6 * min(once() for _ in range(REPEATS))


if __name__ == "__main__":
    main()
