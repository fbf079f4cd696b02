"""Tensor parallelism: every rank has a share of the heads and of the inner columns, and runs every step whole.

The products that end attention and the gated layer are sums over the ranks; all else is alike on each of them, logits
and sampled tokens too, so nothing has to be gathered. The driver's process is rank 0; the others are processes of
`worker.py` that are told every call in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from pie_core.errors import LoadError
from pie_plugins.drivers.cuda_native.linear import Linear, Matrix
from pie_plugins.drivers.cuda_native.lost_device import keep_until_exit
from pie_plugins.models.layers.architecture import ModelConfig
from pie_plugins.models.layers.dense import DenseConfig
from pie_plugins.models.layers.linear import Linear as LayerLinear
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.step import Around
from pie_plugins.models.weight_table import Entry, WeightTable

ROW_SHARES = ("qkv", "gate_up")  # every part's rows are shared out
COLUMN_SHARES = ("output", "down")  # sums over the ranks
PATIENCE = timedelta(seconds=120)
NCCL_SETTINGS = {
    "NCCL_GRAPH_REGISTER": "0",  # each recorded sum would exchange its buffers, for nothing
    # When a GPU faults, torch's watchdog aborts the process, and so does what watches over it once it has ended.
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank and those it works with."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """In place, over all ranks, and the same bits on each."""
        distributed.all_reduce(values)
        return values

    def least(self, value: int, device: torch.device) -> int:
        if self.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN)
        return int(found.item())

    def first_s(self, value: T) -> T:
        """What rank 0 has, on every rank."""
        if self.size == 1:
            return value
        given = [value]
        distributed.broadcast_object_list(given, src=0)
        return given[0]

    def first_before_others(self, work: Callable[[], None]) -> None:
        """Every rank does it, the others when rank 0 is done: they find what it left on the disk."""
        if self.rank == 0:
            work()
        self.first_s(None)
        if self.rank != 0:
            work()


def check_may_join() -> None:
    """Before anything is started: a process has one group of ranks."""
    if distributed.is_initialized():
        raise LoadError(
            "driver cuda_native: tensor_parallel needs a process without a process group of torch.distributed, and this"
            f" one has one of {distributed.get_world_size()} ranks: of a model over several GPUs that is loaded, or"
            " that was lost; start another process"
        )


def join(rank: int, size: int, port: int, device: torch.device) -> Ranks:
    """Waits for the others."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        for name, value in NCCL_SETTINGS.items():
            os.environ.setdefault(name, value)
    try:
        distributed.init_process_group(
            backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=PATIENCE
        )
    except distributed.DistError as error:
        raise LoadError(f"driver cuda_native: the {size} ranks did not find each other: {error}") from error
    return Ranks(rank, size)


def leave() -> None:
    """Ends what `join` began. Waits for the others."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def give_up_sums() -> None:
    """Another rank has ended: sums on this one end without it, and later ones fail."""
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        distributed.distributed_c10d._abort_process_group()


def leave_at_once() -> None:
    """Ends what `join` began where ranks have failed. NCCL would wait for them, and for all that is recorded."""
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        keep_until_exit(distributed.distributed_c10d._world)
    else:
        leave()


def share_of_config(config: ModelConfig, ranks: Ranks) -> Any:
    """The configuration of one rank's layers."""
    if ranks.size == 1:
        return config
    if not isinstance(config, DenseConfig):
        raise LoadError(
            f"driver cuda_native: tensor_parallel is implemented for dense decoders only, and a "
            f"{type(config).__name__} was to be shared by {ranks.size} devices; name one device"
        )
    shared = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in shared:
        if getattr(config, name) % ranks.size:
            raise LoadError(
                f"driver cuda_native: tensor_parallel is {ranks.size}, which does not divide {name}"
                f" ({getattr(config, name)})"
            )
    return replace(config, **{name: getattr(config, name) // ranks.size for name in shared})


def share_of_weights(table: WeightTable, tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """One rank's rows and columns of tensors that the whole table made."""
    if ranks.size == 1:
        return tensors
    sources = {target: entry for entry in table.entries for target in entry.targets}
    return {name: share_of_tensor(sources[name], name, tensor, ranks) for name, tensor in tensors.items()}


def share_of_tensor(entry: Entry, name: str, tensor: Tensor, ranks: Ranks) -> Tensor:
    """One rank's rows or columns of what an entry of the table made, or all of it."""
    if ranks.size == 1:
        return tensor
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if layer in ROW_SHARES:
        parts = tensor.split([source.shape[0] for source in entry.sources])
        return torch.cat([part.chunk(ranks.size)[ranks.rank] for part in parts])
    if layer in COLUMN_SHARES and kind == "weight":
        return tensor.chunk(ranks.size, dim=1)[ranks.rank].contiguous()
    return tensor


@dataclass(frozen=True, slots=True)
class SharedMatrix:
    matrix: Matrix
    is_sum: bool  # over the ranks


class SharedLinear:
    """Products whose matrices are shared out."""

    def __init__(self, linear: Linear, ranks: Ranks) -> None:
        self._linear, self._ranks = linear, ranks

    def prepare(self, weight: Tensor, bias: Tensor | None) -> SharedMatrix:
        return SharedMatrix(self._linear.prepare(weight, bias), is_sum=False)

    def prepare_sum(self, weight: Tensor, bias: Tensor | None) -> SharedMatrix:
        """A bias is added once, by rank 0."""
        kept = bias if self._ranks.rank == 0 else None
        return SharedMatrix(self._linear.prepare(weight, kept), is_sum=True)

    def __call__(self, x: Tensor, shared: SharedMatrix) -> Tensor:
        product = self._linear(x, shared.matrix)
        return self._ranks.sum(product) if shared.is_sum else product

    def around(self, x: Tensor, shared: SharedMatrix, around: Around) -> Tensor | None:
        return None if shared.is_sum else self._linear.around(x, shared.matrix, around)


class SharedParameters(Parameters):
    """Knows by its name which linear layer is a sum over the ranks."""

    def __init__(self, tensors: dict[str, Tensor], linear: SharedLinear) -> None:
        super().__init__(tensors, linear)
        self._linear = linear

    def linear(self, name: str, bias: bool = False) -> LayerLinear:
        if name.rpartition(".")[2] not in COLUMN_SHARES:
            return super().linear(name, bias)
        weight = self.tensor(f"{name}.weight")
        return LayerLinear(self._linear.prepare_sum(weight, self.tensor(f"{name}.bias") if bias else None))


def devices_of(device: torch.device, size: int) -> Sequence[str]:
    """A device for each rank; CPUs, for tests, are one and the same."""
    if device.type == "cpu":
        return ["cpu"] * size
    if torch.cuda.device_count() < size:
        raise LoadError(
            f"driver cuda_native: tensor_parallel is {size}, but torch sees {torch.cuda.device_count()} GPUs"
        )
    return [f"cuda:{rank}" for rank in range(size)]
