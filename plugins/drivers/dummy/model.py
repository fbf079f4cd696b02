"""The pretended model: a hash for every token row that depends on all it may see, as attention and recurrence would.

Each cache group is a pair of layers. A layer turns a row into content, writes that to the group's pages (or folds it
into the group's state), and mixes what the row reads there into the row. Two rounds over the groups make what is
written late depend on what was visible early, so a wrong mask on the prompt still changes tokens long afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pie_core.contracts.driver import CacheSpace
from pie_core.contracts.forward import MediaSpans, PageTable, StateTable
from pie_plugins.drivers.dummy.batch_tensors import ResolvedStep, visible_ranges
from pie_plugins.drivers.dummy.hashing import GROWTH, Powers, Words, digest_word, mix
from pie_plugins.drivers.dummy.kv_cache import LAYERS, Int64, PagedCache, StateCache, StepPages

_GROWTH = np.uint64(GROWTH)
_THREE = np.uint64(3)
NO_ADAPTER = np.uint64(0)


@dataclass(frozen=True, slots=True)
class Attachments:
    """What a batch refers to by id: adapters as words, media as one word for each encoded row."""

    adapters: Mapping[int, np.uint64]
    media: Mapping[int, Words]


class DummyModel:
    """Owns the caches; `run` is one step."""

    def __init__(self, seed: int, cache: tuple[CacheSpace, ...], scratch_pages: int) -> None:
        powers = Powers()
        self._spaces = cache
        self._salts = [
            [digest_word("layer", str(seed), str(layer), space.group.name) for space in cache]
            for layer in range(LAYERS)
        ]
        self._embedding = digest_word("embedding", str(seed))
        self.caches = tuple(_new_cache(space, scratch_pages, powers) for space in cache)

    def run(self, step: ResolvedStep, attachments: Attachments) -> Words:
        """[T]: the last hidden state of each token row, as a word."""
        plans = [self._plan(step, group) for group in range(len(self._spaces))]
        rows = self._embed(step, attachments)
        for layer in range(LAYERS):
            for group, plan in enumerate(plans):
                rows = self._layer(layer, group, plan, step, rows)
        return rows

    def _plan(self, step: ResolvedStep, group: int) -> StepPages | None:
        table, cache = step.batch.cache[group], self.caches[group]
        if isinstance(table, StateTable) or isinstance(cache, StateCache):
            return None
        ranges = visible_ranges(step, group, self._spaces[group].group.window)
        plan = cache.plan(table, step.request, step.kv_index, ranges)
        lost = np.flatnonzero(plan.pages < 0)
        if len(lost):
            name, first = self._spaces[group].group.name, int(step.kv_index[lost[0]])
            step.failures.add(step.request[lost], f"group {name!r} has no page for KV index {first}")
        return plan

    def _layer(
        self, layer: int, group: int, plan: StepPages | None, step: ResolvedStep, rows: Words
    ) -> Words:
        salt = self._salts[layer][group]
        content, cache = mix(rows ^ salt), self.caches[group]
        if plan is not None and isinstance(cache, PagedCache):
            cache.write(layer, plan, content)
            seen = cache.read(layer, plan, len(rows))
        else:
            seen = self._recur(layer, group, step, content)
        return mix((rows * _THREE + seen) ^ salt)

    def _recur(self, layer: int, group: int, step: ResolvedStep, inputs: Words) -> Words:
        table, cache = step.batch.cache[group], self.caches[group]
        assert isinstance(table, StateTable)
        assert isinstance(cache, StateCache)
        before = cache.load(layer, step.slots_in[group])
        states = cache.advance(before, step.batch.indptr, step.request, inputs)
        owners = np.repeat(np.arange(step.batch.num_requests), np.diff(table.out_indptr))
        cache.store(layer, table.out_slots, states[step.batch.indptr[owners] + table.out_rows])
        return states

    def _embed(self, step: ResolvedStep, attachments: Attachments) -> Words:
        columns = step.tokens.astype(np.int64).reshape(len(step.tokens), -1)
        rows = mix(_folded(columns) + self._embedding)
        self._place_media(rows, step.batch.media, attachments.media, step)
        rows = mix(rows + _folded(step.positions))
        adapters = _adapter_words(step, attachments.adapters)
        if adapters.any():
            words = adapters[step.request]
            rows = np.where(words == NO_ADAPTER, rows, mix(rows ^ words))
        return rows

    def _place_media(
        self, rows: Words, spans: MediaSpans, encoded: Mapping[int, Words], step: ResolvedStep
    ) -> None:
        for row, handle, offset, length in zip(
            *(part.tolist() for part in (spans.rows, spans.handles, spans.offsets, spans.lengths)),
            strict=True,
        ):
            words = encoded.get(handle)
            if words is None or offset + length > len(words):
                has = "is unknown" if words is None else f"has {len(words)} rows"
                step.failures.add(
                    [step.request[row]], f"media {handle} {has}: rows {offset}+{length} asked for"
                )
                continue
            rows[row : row + length] = words[offset : offset + length]


def _new_cache(space: CacheSpace, scratch_pages: int, powers: Powers) -> PagedCache | StateCache:
    if space.group.kind == "state":
        return StateCache(space.num_pages + scratch_pages, space.num_host_pages, powers)
    return PagedCache(space.num_pages + scratch_pages, space.num_host_pages, space.page_size, powers)


def _folded(columns: Int64) -> Words:
    """[n]: one word for each row of numbers; the order of the columns counts."""
    folded = columns[:, 0].astype(np.uint64)
    for column in range(1, columns.shape[1]):
        folded = mix(folded * _GROWTH + columns[:, column].astype(np.uint64))
    return folded * _GROWTH


def _adapter_words(step: ResolvedStep, adapters: Mapping[int, np.uint64]) -> Words:
    """[R]: content and scale of the adapter as one word. Scale 0 adds nothing, as it would in a real model."""
    words = np.zeros(step.batch.num_requests, np.uint64)
    for request in np.flatnonzero(step.batch.adapter_ids >= 0).tolist():
        adapter, scale = int(step.batch.adapter_ids[request]), step.batch.adapter_scales[request]
        if adapter not in adapters:
            step.failures.add([request], f"adapter {adapter} is not loaded")
        elif scale != 0:
            words[request] = digest_word(
                adapters[adapter].tobytes(), np.float32(scale).tobytes()
            ) | np.uint64(1)
    return words


def check_page_ids(table: PageTable | StateTable, space: CacheSpace) -> str | None:
    """What is wrong with the ids of a table, if something is."""
    parts = (
        (table.pages,) if isinstance(table, PageTable) else (np.maximum(table.slots_in, 0), table.out_slots)
    )
    for ids in parts:
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= space.num_pages):
            return f"group {space.group.name!r} has pages 0 to {space.num_pages - 1}; named is {ids.tolist()}"
    return None
