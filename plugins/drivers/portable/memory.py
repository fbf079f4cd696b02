"""How much memory each cache group gets, and what the core is told about it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from pie_core.contracts.driver import CacheGroup, CacheKind, CacheSpace
from pie_core.errors import LoadError
from pie_plugins.drivers.portable.batch_tensors import Cache
from pie_plugins.drivers.portable.kv_cache import KvCache
from pie_plugins.drivers.portable.options import PortableOptions
from pie_plugins.drivers.portable.state_cache import StateCache
from pie_plugins.models.layers.architecture import CacheLayout, LatentLayout, StateLayout

FEWEST_SLOTS = 16  # of recurrent state, though they take more than their share
SLOTS_PER_REQUEST = 4  # the state that a step reads, the one it writes, and checkpoints to go back to
STATE_SHARE = 0.5  # of the memory, at most
HOST_PAGES_PER_PAGE = 8  # of swap space; beyond, it would hardly ever be used


def lay_out(
    layouts: Sequence[CacheLayout],
    options: PortableOptions,
    dtype: torch.dtype,
    device: str,
    swap_bytes: int,
) -> tuple[Cache, ...]:
    """Raises LoadError if the options leave no room for a page.

    Each group alone could fill `swap_bytes`: the core keeps all within that, and what is not used takes nothing.
    """
    memory, slots = options.kv_memory_mb * 2**20, 0
    slot_bytes = sum(unit_bytes(layout, dtype) for layout in layouts if isinstance(layout, StateLayout))
    if slot_bytes:
        slots = options.state_slots or _default_slots(options, int(memory * STATE_SHARE) // slot_bytes)
    row_bytes = sum(unit_bytes(layout, dtype) for layout in layouts if not isinstance(layout, StateLayout))
    pages = _num_pages(options, memory - slots * slot_bytes, row_bytes * options.kv_page_size)
    like = torch.empty(0, dtype=dtype, device=device)

    def host_pages(layout: CacheLayout, rows: int, pages: int) -> int:
        fitting = swap_bytes // max(unit_bytes(layout, dtype) * rows, 1)
        return options.host_pages or min(fitting, HOST_PAGES_PER_PAGE * pages)

    return tuple(
        StateCache(layout, slots, host_pages(layout, 1, slots), like)
        if isinstance(layout, StateLayout)
        else KvCache(
            layout, options.kv_page_size, pages, host_pages(layout, options.kv_page_size, pages), like
        )
        for layout in layouts
    )


def _default_slots(options: PortableOptions, fitting: int) -> int:
    return max(FEWEST_SLOTS, min(SLOTS_PER_REQUEST * options.max_batch_requests, fitting))


def _num_pages(options: PortableOptions, memory: int, page_bytes: int) -> int:
    if options.total_pages or not page_bytes:
        return options.total_pages
    if memory < page_bytes:
        raise LoadError(
            f"driver portable: kv_memory_mb is {options.kv_memory_mb}, which leaves {max(memory, 0)} bytes for pages,"
            f" but one page of {options.kv_page_size} tokens takes {page_bytes}; raise it"
        )
    return memory // page_bytes


def unit_bytes(layout: CacheLayout, dtype: torch.dtype) -> int:
    """Of a token, or of a slot of state."""
    if isinstance(layout, StateLayout):
        parts = [prod(part.shape) * part.dtype_of(dtype).itemsize for part in layout.parts]
        return layout.num_layers * sum(parts)
    return layout.num_layers * prod(layout.row) * dtype.itemsize


def space(cache: Cache, dtype: torch.dtype) -> CacheSpace:
    layout = cache.layout
    window = None if isinstance(layout, StateLayout) else layout.window
    group = CacheGroup(layout.name, _kind(layout), unit_bytes(layout, dtype), window)
    return CacheSpace(group, cache.page_size, cache.num_pages, cache.num_host_pages)


def _kind(layout: CacheLayout) -> CacheKind:
    if isinstance(layout, StateLayout):
        return "state"
    if isinstance(layout, LatentLayout):
        return "latent"
    return "paged" if layout.window is None else "window"
