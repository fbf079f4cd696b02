"""The recurrent states of one cache group, in slots, on the device and in swap space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.errors import InvalidRequest
from pie_plugins.drivers.portable.kv_cache import check_within, untouched
from pie_plugins.models.layers.architecture import StateLayout


class StateCache:
    """For each part of a layer's state [layers, slots, *shape]; behind the last lie a scratch slot and an empty one.

    What nobody keeps is written to the scratch slot. Nothing is ever written to the empty one.
    """

    page_size = 1  # slots are pages of one row

    def __init__(self, layout: StateLayout, num_slots: int, num_host_slots: int, like: Tensor) -> None:
        self.layout = layout
        self.num_pages = num_slots
        self.num_host_pages = num_host_slots
        self._parts = [
            untouched((layout.num_layers, num_slots + 2, *part.shape), part.dtype_of(like.dtype)).to(
                like.device
            )
            for part in layout.parts
        ]
        self._host = [
            untouched((layout.num_layers, num_host_slots, *part.shape), part.dtype_of(like.dtype))
            for part in layout.parts
        ]

    @property
    def scratch_slot(self) -> int:
        return self.num_pages

    @property
    def empty_slot(self) -> int:
        return self.num_pages + 1

    def part(self, layer: int, index: int) -> Tensor:
        """[slots, *shape]"""
        return self._parts[index][layer]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for part in self._parts:
            part[:, _indexes(targets)] = part[:, _indexes(sources)]

    def swap_out(self, slots: Sequence[int], host_slots: Sequence[int]) -> None:
        for part, host in zip(self._parts, self._host, strict=True):
            host[:, _indexes(host_slots)] = part[:, _indexes(slots)].to("cpu")

    def swap_in(self, host_slots: Sequence[int], slots: Sequence[int]) -> None:
        for part, host in zip(self._parts, self._host, strict=True):
            part[:, _indexes(slots)] = host[:, _indexes(host_slots)].to(part.device)

    def read(self, slots: Sequence[int]) -> NDArray[np.uint8]:
        """[slots, bytes]: the parts one behind the other."""
        contents = [part[:, _indexes(slots)].transpose(0, 1).contiguous().cpu() for part in self._parts]
        return np.concatenate([_bytes(content) for content in contents], axis=1)

    def write(self, slots: Sequence[int], content: NDArray[np.uint8]) -> None:
        sizes = [part[:, 0].numel() * part.itemsize for part in self._parts]
        if content.shape != (len(slots), sum(sizes)):
            raise InvalidRequest(
                f"driver portable: states to import are {content.shape}, expected {(len(slots), sum(sizes))}: another"
                " model or dtype wrote them"
            )
        for part, piece in zip(self._parts, np.split(content, np.cumsum(sizes)[:-1], axis=1), strict=True):
            values = torch.from_numpy(np.array(piece)).view(part.dtype)
            values = values.view(len(slots), *part[:, 0].shape).transpose(0, 1)
            part[:, _indexes(slots)] = values.to(part.device)

    def check_pages(self, slots: Sequence[int]) -> None:
        check_within(slots, self.num_pages, "slot")

    def check_host_pages(self, slots: Sequence[int]) -> None:
        check_within(slots, self.num_host_pages, "host slot")


def _bytes(content: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = content.view(len(content), -1).view(torch.uint8).numpy()
    return found


def _indexes(slots: Sequence[int]) -> Tensor:
    return torch.tensor([int(slot) for slot in slots], dtype=torch.int64)
