"""The paged keys and values of one cache group on the device, and their swap space in pinned host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.errors import InvalidRequest
from pie_plugins.drivers.cuda_native.timeline import Timeline
from pie_plugins.models.layers.architecture import PagedLayout


class KvCache:
    """[layers, pages, 2 (key, value), kv_heads, page_size, head_dim]; behind the last page lies a scratch page.

    A head's rows of one page are contiguous, so that attention reads kilobytes at a time. Rows of failed requests and
    of padding go to the scratch page, where they can do no harm.
    """

    def __init__(
        self,
        layout: PagedLayout,
        page_size: int,
        num_pages: int,
        num_host_pages: int,
        like: Tensor,
        timeline: Timeline,
    ) -> None:
        self.layout = layout
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self._timeline = timeline
        page = (2, layout.num_kv_heads, page_size, layout.head_dim)
        self._pages = like.new_zeros((layout.num_layers, num_pages + 1, *page))
        self._layers = self._pages.unbind(0)
        self._host = timeline.pinned((num_host_pages, layout.num_layers, *page), like.dtype)

    @property
    def num_bytes(self) -> int:
        return self._pages.numel() * self._pages.itemsize

    @property
    def scratch_page(self) -> int:
        return self.num_pages

    def layer(self, index: int) -> Tensor:
        """[pages + 1, 2, kv_heads, page_size, head_dim]"""
        return self._layers[index]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._pages[:, self._indexes(targets)] = self._pages[:, self._indexes(sources)]

    def swap_out(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Gathers behind the queued steps; the slow copy to the host runs beside the steps that follow."""
        gathered = self._gather(pages)
        with self._timeline.aside(gathered):
            for place, host_page in enumerate(host_pages):
                self._host[host_page].copy_(gathered[place], non_blocking=True)

    def swap_in(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        arrived = self._pages.new_empty((len(pages), self.layout.num_layers, *self._pages.shape[2:]))
        with self._timeline.aside(arrived):
            for place, host_page in enumerate(host_pages):
                arrived[place].copy_(self._host[host_page], non_blocking=True)
        self._timeline.wait_for_aside()
        self._pages[:, self._indexes(pages)] = arrived.transpose(0, 1)

    def read(self, pages: Sequence[int]) -> NDArray[np.uint8]:
        content: Tensor = self._gather(pages).cpu()
        return content.view(torch.uint8).reshape(len(pages), -1).numpy()

    def write(self, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        self.check_content(pages, content)
        page = self._pages[:, 0]
        values = torch.from_numpy(np.array(content)).view(self._pages.dtype).view(len(pages), *page.shape)
        self._pages[:, self._indexes(pages)] = values.transpose(0, 1).to(page.device)

    def check_content(self, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        page = self._pages[:, 0]
        expected = (len(pages), page.numel() * page.itemsize)
        if content.shape != expected:
            raise InvalidRequest(
                f"driver cuda_native: pages to import are {content.shape}, expected {expected}: another model, dtype"
                " or page size wrote them"
            )

    def check_pages(self, pages: Sequence[int]) -> None:
        _check(pages, self.num_pages, "page")

    def check_host_pages(self, pages: Sequence[int]) -> None:
        _check(pages, self.num_host_pages, "host page")

    def _gather(self, pages: Sequence[int]) -> Tensor:
        """[pages, layers, …], contiguous"""
        return self._pages.index_select(1, self._indexes(pages)).transpose(0, 1).contiguous()

    def _indexes(self, pages: Sequence[int]) -> Tensor:
        return self._timeline.upload(np.array([int(page) for page in pages], np.int64))


def _check(pages: Sequence[int], limit: int, what: str) -> None:
    wrong = [int(page) for page in pages if not 0 <= page < limit]
    if wrong:
        raise InvalidRequest(f"driver cuda_native: {what} {wrong[0]} does not exist; there are {limit}")
