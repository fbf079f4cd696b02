"""The paged rows of one cache group, on the device and in swap space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.errors import InvalidRequest, LoadError
from pie_plugins.models.layers.architecture import RowsLayout


class KvCache:
    """[layers, pages, page_size, *row]; behind the last page lies a scratch page.

    A row is [2 (key, value), kv_heads, head_dim], or one latent. Rows of failed requests are written to the scratch
    page, so they can do no harm. Memory is taken by the system as pages are first written.
    """

    def __init__(
        self, layout: RowsLayout, page_size: int, num_pages: int, num_host_pages: int, like: Tensor
    ) -> None:
        self.layout = layout
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        row = layout.row
        self._pages = untouched((layout.num_layers, num_pages + 1, page_size, *row), like.dtype).to(
            like.device
        )
        self._host = untouched((layout.num_layers, num_host_pages, page_size, *row), like.dtype)
        self._rows = self._pages.view(layout.num_layers, (num_pages + 1) * page_size, *row).unbind(0)

    @property
    def scratch_slot(self) -> int:
        return self.num_pages * self.page_size

    def layer(self, index: int) -> Tensor:
        """[slots, *row]; slot = page * page_size + place on the page."""
        return self._rows[index]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._pages[:, _indexes(targets)] = self._pages[:, _indexes(sources)]

    def swap_out(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        self._host[:, _indexes(host_pages)] = self._pages[:, _indexes(pages)].to("cpu")

    def swap_in(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        self._pages[:, _indexes(pages)] = self._host[:, _indexes(host_pages)].to(self._pages.device)

    def read(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        content = self._pages[:, _indexes(pages)].transpose(0, 1).contiguous().cpu()
        return content.view(torch.uint8).reshape(len(pages), -1).numpy()

    def write(self, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        page = self._pages[:, 0]
        if content.shape != (len(pages), page.numel() * page.itemsize):
            raise InvalidRequest(
                f"driver portable: pages to import are {content.shape}, expected"
                f" {(len(pages), page.numel() * page.itemsize)}: another model, dtype or page size wrote them"
            )
        values = torch.from_numpy(np.array(content)).view(self._pages.dtype)
        self._pages[:, _indexes(pages)] = values.view(len(pages), *page.shape).transpose(0, 1).to(page.device)

    def check_pages(self, pages: Sequence[int]) -> None:
        check_within(pages, self.num_pages, "page")

    def check_host_pages(self, pages: Sequence[int]) -> None:
        check_within(pages, self.num_host_pages, "host page")


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory yet: numpy leaves clearing to the system, torch writes every page at once."""
    try:
        content = np.zeros(shape, f"u{dtype.itemsize}")
    except (MemoryError, ValueError) as error:
        raise LoadError(
            f"driver portable: KV pages of {math.prod(shape) * dtype.itemsize / 2**20:.0f} MiB do not fit into memory;"
            " lower kv_memory_mb, total_pages or host_pages"
        ) from error
    return torch.from_numpy(content).view(dtype)


def _indexes(pages: Sequence[int]) -> Tensor:
    return torch.tensor([int(page) for page in pages], dtype=torch.int64)


def check_within(pages: Sequence[int], limit: int, what: str) -> None:
    wrong = [int(page) for page in pages if not 0 <= page < limit]
    if wrong:
        raise InvalidRequest(f"driver portable: {what} {wrong[0]} does not exist; there are {limit}")
