"""Loads a model: checks what was asked for, starts the other ranks, and says how long each part took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from socket import socket
from typing import TYPE_CHECKING, Any

import torch

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.driver import DriverRequest
from pie_core.errors import LoadError
from pie_plugins.drivers.cuda_native.assembly import Assembly
from pie_plugins.drivers.cuda_native.driver import CudaNativeDriver
from pie_plugins.drivers.cuda_native.load_times import LoadTimes
from pie_plugins.drivers.cuda_native.lost_device import keep_until_exit
from pie_plugins.drivers.cuda_native.memory import is_out_of_memory
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions
from pie_plugins.drivers.cuda_native.parallel import Ranks, check_may_join, devices_of, join, leave_at_once
from pie_plugins.drivers.cuda_native.parallel_driver import NOTICED_S, ParallelDriver, Worker, watched
from pie_plugins.drivers.cuda_native.timeline import Timeline, timeline_of

if TYPE_CHECKING:
    from pie_plugins.drivers.cuda_native.compilation import Compilation

LOG = logging.getLogger(__name__)


def load_cuda_native(request: DriverRequest) -> CudaNativeDriver:
    """Raises LoadError."""
    options = request.options
    assert isinstance(options, CudaNativeOptions)
    request.checkpoint("cuda_native")  # before anything is started
    _device(request.device)
    if options.tensor_parallel > 1:
        return _load_parallel(request, options)
    return load_rank(request, options)


def load_rank(
    request: DriverRequest, options: CudaNativeOptions, rank: int = 0, size: int = 1, port: int = 0
) -> CudaNativeDriver:
    """One rank's share of the model; the whole of it where there is one rank."""
    device = _device(request.device)
    timeline = timeline_of(device)
    try:
        with torch.inference_mode(), timeline.main():
            ranks = join(rank, size, port, device) if size > 1 else Ranks()
            return _timed(request, options, timeline, ranks)
    except Exception as error:
        if is_out_of_memory(error):
            raise LoadError(
                f"driver cuda_native: {device} has too little memory for this model with these options: {error};"
                " lower gpu_mem_utilization, total_pages or max_batch_tokens"
            ) from error
        if not timeline.is_lost():
            raise
        keep_until_exit(error)
        raise LoadError(
            f"driver cuda_native: {device} faulted while the model was loaded: {error}"
        ) from error


def _timed(
    request: DriverRequest, options: CudaNativeOptions, timeline: Timeline, ranks: Ranks
) -> CudaNativeDriver:
    times = LoadTimes(request.progress)
    request = replace(request, progress=times)
    assembly = Assembly(request, options, timeline, ranks)
    driver = assembly.driver(_compile_ahead(assembly, request, options, timeline, ranks))
    LOG.info("%s on %s: loaded in %s", request.model_path, timeline.device, times.told())
    return driver


def _compile_ahead(
    assembly: Assembly, request: DriverRequest, options: CudaNativeOptions, timeline: Timeline, ranks: Ranks
) -> Callable[[], Compilation] | None:
    """Begins to compile; None where there is nothing to compile."""
    device = timeline.device
    if device.type != "cuda" or assembly.kernels.name != "triton":
        return None
    from pie_plugins.drivers.cuda_native.compilation import Compilation  # both import triton
    from pie_plugins.drivers.cuda_native.rehearsal import Rehearsal

    return lambda: Compilation(device, lambda: Rehearsal(request, options, device, ranks.size).launch_all())


def _load_parallel(request: DriverRequest, options: CudaNativeOptions) -> ParallelDriver:
    check_may_join()
    size, port = options.tensor_parallel, _free_port()
    devices = devices_of(torch.device(request.device), size)
    described = [_described(each) for each in request.architectures.values()]
    workers = [
        Worker(
            rank,
            {
                "rank": rank,
                "size": size,
                "port": port,
                "device": devices[rank],
                "path": str(request.model_path),
                "swap_bytes": request.swap_bytes,
                "options": asdict(options),
                "architectures": described,
            },
        )
        for rank in range(1, size)
    ]
    try:
        with watched(workers):
            own = load_rank(replace(request, device=devices[0]), options, 0, size, port)
        for worker in workers:
            worker.wait_until_loaded()
    except BaseException:
        _end(workers)
        raise
    return ParallelDriver(own, workers)


def _end(workers: Sequence[Worker]) -> None:
    """Raises what a rank says that ended by itself: it is why the others failed."""
    try:
        for worker in workers:
            if worker.has_ended(NOTICED_S):
                worker.wait_until_loaded()
    finally:
        for worker in workers:
            worker.end()
        leave_at_once()


def _described(declaration: ArchitectureDeclaration) -> dict[str, Any]:
    """How another process finds it."""
    return {
        "name": declaration.name,
        "model_types": list(declaration.model_types),
        "gguf_architectures": list(declaration.gguf_architectures),
        "module": declaration.load.__module__,
        "qualname": declaration.load.__qualname__,
    }


def _free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(
            f"driver cuda_native: device is {name!r}, but torch {torch.__version__} sees no CUDA GPU; install torch"
            " with CUDA and the NVIDIA driver, or use the driver portable"
        )
    if device.type not in ("cuda", "cpu"):
        raise LoadError(f"driver cuda_native: device is {name!r}, expected cuda, cuda:N, or cpu for tests")
    return device
