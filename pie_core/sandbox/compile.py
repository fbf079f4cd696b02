"""`python -m pie_core.sandbox.compile`: compiles one uploaded component, in a process that can be killed.

A hostile program can make a compiler run for hours or eat all memory; here both are limited, and the parent only sees
an exit status. Started by `compilation.py`: component on stdin, image into the file descriptor named by --output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys

import wasmtime
from wasmtime.component import Component

from pie_core.sandbox.fibers import EngineOptions, new_engine

INVALID = 3  # exit status: the component is at fault, stderr says why


def main() -> int:
    arguments = _parse()
    resource.setrlimit(resource.RLIMIT_AS, (arguments.memory_bytes, arguments.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (arguments.cpu_seconds, arguments.cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wasm = sys.stdin.buffer.read()
    try:
        image = Component(new_engine(EngineOptions(**json.loads(arguments.options))), wasm).serialize()
    except wasmtime.WasmtimeError as error:
        print(error, file=sys.stderr)
        return INVALID
    with os.fdopen(arguments.output, "wb") as file:
        file.write(image)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pie_core.sandbox.compile", description=__doc__)
    parser.add_argument("--options", required=True, help="EngineOptions as JSON")
    parser.add_argument("--output", required=True, type=int, help="file descriptor that gets the image")
    parser.add_argument("--memory-bytes", required=True, type=int)
    parser.add_argument("--cpu-seconds", required=True, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
