"""Another rank of a model: does what rank 0 is told, call by call, and says nothing unless it is asked.

    python -m pie_plugins.drivers.cuda_native.worker

Standard input and output carry the calls (see `framing`), so what is printed goes to standard error.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from threading import Timer
from typing import IO, Any, NoReturn

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import DriverRequest
from pie_core.errors import PieError
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.framing import read_call, write_call
from pie_plugins.drivers.cuda_native.loading import load_rank
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.parallel import leave

ANSWERED = frozenset({"export_pages"})
LEAVE_S = 8.0  # to end what is queued, which never ends where rank 0 was killed; it waits a little longer


def main() -> None:
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not get among the answers
    first = read_call(calls)
    if first is None:
        return
    try:
        driver = _load(first[1][0])
    except PieError as error:
        write_call(answers, "failed", str(error))
        return
    write_call(answers, "loaded", None)
    try:
        _serve(driver, calls, answers)
    except PieError as error:
        _end_at_once(str(error))
    late = Timer(LEAVE_S, _end_at_once, ["its steps wait for a rank that is gone"])
    late.daemon = True
    late.start()
    driver.close()
    if driver.is_lost:
        _end_at_once("the GPU faulted")
    leave()
    late.cancel()


def _end_at_once(reason: str) -> NoReturn:
    """Without an attempt to free what is left: the ranks have parted, and rank 0 notices the end of this one."""
    print(f"driver cuda_native: another rank ends: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _load(setup: dict[str, Any]) -> CudaNativeDriver:
    architectures = {each["name"]: _declared(each) for each in setup["architectures"]}
    options = CudaNativeOptions(**setup["options"])
    request = DriverRequest(
        Path(setup["path"]), setup["device"], options, architectures, {}, swap_bytes=setup["swap_bytes"]
    )
    return load_rank(request, options, setup["rank"], setup["size"], setup["port"])


def _declared(described: dict[str, Any]) -> ArchitectureDeclaration:
    load: Any = import_module(described["module"])
    for part in described["qualname"].split("."):
        load = getattr(load, part)
    return ArchitectureDeclaration(
        name=described["name"],
        summary="",
        model_types=tuple(described["model_types"]),
        gguf_architectures=tuple(described["gguf_architectures"]),
        load=load,
    )


def _serve(driver: CudaNativeDriver, calls: IO[bytes], answers: IO[bytes]) -> None:
    while (call := read_call(calls)) is not None:
        name, arguments = call
        value = getattr(driver, name)(*arguments)
        if name == "submit":
            driver.leave_uncollected(value)
        elif name in ANSWERED:
            write_call(answers, name, value)


if __name__ == "__main__":
    main()
