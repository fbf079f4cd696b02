"""The CUDA driver: torch, Triton and FlashInfer on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.driver import Driver, DriverDeclaration, DriverRequest
from pie_core.hookspecs import hookimpl
from pie_plugins.drivers.cuda_native.options import CudaNativeOptions


def load(request: DriverRequest) -> Driver:
    from pie_plugins.drivers.cuda_native.loading import (
        load_cuda_native,
    )  # torch: not before a model is loaded

    return load_cuda_native(request)


@hookimpl
def pie_drivers() -> Sequence[DriverDeclaration]:
    return [
        DriverDeclaration(
            name="cuda_native",
            summary="NVIDIA GPUs: CUDA graphs, fused Triton kernels and FlashInfer",
            options=CudaNativeOptions,
            load=load,
            requires=("torch",),
        )
    ]
