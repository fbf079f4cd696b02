"""The driver copycat: a model without weights that continues a text by what followed the same token before.

The cache keeps the token and the position of every KV row. A row's logits are a sum over all rows that it may read:
the token that stands there counts the more, the nearer it is and if the token before it is the row's own.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from pie_core.contracts.driver import (
    CacheGroup,
    CacheSpace,
    DriverCapabilities,
    DriverRequest,
    Feature,
    GenerationRequest,
)
from pie_core.contracts.forward import (
    NO_TICKET,
    Float32,
    ForwardBatch,
    ForwardResult,
    Int32,
    PageTable,
    ProbeKind,
)
from pie_core.contracts.media import MediaItem
from pie_core.contracts.sampling_reference import distribution, entropy, log_softmax, sample_tokens
from pie_core.errors import ForwardError, LoadError, Unsupported
from pie_core.ids import Ticket

from pie_copycat.options import Options

NAME = "copycat"
MAX_IN_FLIGHT = 2
FOLLOWS = 8.0  # how much more a token counts that stood behind the row's own
REACH = 16.0  # the distance at which a token counts half
FEATURES = frozenset(
    {
        Feature.LOGIT_MASK,
        Feature.PENALTIES,
        Feature.LOGIT_BIAS,
        Feature.PROBE_LOGITS,
        Feature.PROBE_DISTRIBUTION,
        Feature.PROBE_LOGPROBS,
        Feature.PROBE_ENTROPY,
    }
)


def load(request: DriverRequest) -> CopyingDriver:
    """What the declaration's `load` does; raises LoadError."""
    assert isinstance(request.options, Options)
    if request.options.page_size < 1 or request.options.num_pages < 1:
        raise LoadError(f"driver {NAME}: page_size and num_pages are {request.options}; expected at least 1")
    return CopyingDriver(request.options, _vocab_size(request.model_path))


def _vocab_size(checkpoint: Path | None) -> int:
    path = Path("." if checkpoint is None else checkpoint) / "config.json"
    try:
        size = json.loads(path.read_text())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"driver {NAME}: {path}: no vocab_size can be read from it: {error!r}") from error
    if not isinstance(size, int) or size < 2:
        raise LoadError(f"driver {NAME}: {path}: vocab_size is {size!r}; expected a number from 2")
    return size


@dataclass(frozen=True, slots=True)
class _Rows:
    """KV rows of one context, in the order of their indexes."""

    indexes: NDArray[np.int64]
    tokens: Int32
    positions: Int32


class CopyingDriver:
    """Works a step off when it is submitted, and keeps the result until it is collected."""

    def __init__(self, options: Options, vocab_size: int) -> None:
        self._page_size = options.page_size
        self._tokens = np.zeros((options.num_pages, options.page_size), np.int32)
        self._positions = np.zeros((options.num_pages, options.page_size), np.int32)
        self._capabilities = _capabilities(options, vocab_size)
        self._done: deque[ForwardResult] = deque()
        self._tickets = 0
        self._closed = False

    @property
    def capabilities(self) -> DriverCapabilities:
        return self._capabilities

    def submit(self, batch: ForwardBatch) -> Ticket:
        self._check_open()
        _require_plain(batch)
        if len(self._done) >= MAX_IN_FLIGHT:
            raise ForwardError(f"driver {NAME}: {len(self._done)} steps are open, as many as may be")
        started = perf_counter()
        ticket = Ticket(self._tickets)
        self._tickets += 1
        failed: dict[int, str] = {}
        logits = self._forward(batch, failed)
        self._done.append(_result(batch, ticket, logits, failed, perf_counter() - started))
        return ticket

    def collect(self, ticket: Ticket) -> ForwardResult:
        self._check_open()
        if not self._done or self._done[0].ticket != ticket:
            open_tickets = [result.ticket for result in self._done]
            raise ForwardError(
                f"driver {NAME}: ticket {ticket}: open are {open_tickets}, to be taken in order"
            )
        return self._done.popleft()

    def _forward(self, batch: ForwardBatch, failed: dict[int, str]) -> dict[int, Float32]:
        """Token row -> its logits, for the rows that are asked for; whatever fails is added to `failed`."""
        logits: dict[int, Float32] = {}
        asked = {*batch.samplers.rows.tolist(), *batch.probes.rows.tolist()}
        for request in range(batch.num_requests):
            first, end = batch.indptr[request : request + 2].tolist()
            length = int(batch.kv_lengths[request])
            try:
                rows = self._written(batch, request, slice(first, end), length)
            except ForwardError as error:
                failed[request] = str(error)
                continue
            for row in sorted(asked & set(range(first, end))):
                logits[row] = self._logits(rows, length + row - first)
        return logits

    def _written(self, batch: ForwardBatch, request: int, span: slice, length: int) -> _Rows:
        """Writes a request's token rows to its pages, and reads all that these pages hold."""
        table = batch.cache[0]
        assert isinstance(table, PageTable)
        listed = slice(*table.indptr[request : request + 2])
        pages = dict(zip(table.logical[listed].tolist(), table.pages[listed].tolist(), strict=True))
        tokens, positions = batch.tokens.ids[span], batch.positions[span]
        if ((tokens < 0) | (tokens >= self._capabilities.vocab_size)).any():
            raise ForwardError(f"a token id lies outside 0 to {self._capabilities.vocab_size - 1}")
        for place, (token, position) in enumerate(zip(tokens, positions, strict=True), start=length):
            page = pages.get(place // self._page_size)
            if page is None:
                raise ForwardError(f"there is no page for KV index {place}")
            self._tokens[page, place % self._page_size] = token
            self._positions[page, place % self._page_size] = position
        return self._read(pages, length + len(tokens))

    def _read(self, pages: dict[int, int], length: int) -> _Rows:
        logical = np.array(list(pages), np.int64)
        physical = np.array(list(pages.values()), np.int64)
        indexes = (logical[:, None] * self._page_size + np.arange(self._page_size)).ravel()
        written = indexes < length
        return _Rows(
            indexes[written],
            self._tokens[physical].ravel()[written],
            self._positions[physical].ravel()[written],
        )

    def _logits(self, rows: _Rows, index: int) -> Float32:
        """Of the row with this KV index, from the rows up to it; the sum is in their order, whatever the pages."""
        count = int(np.searchsorted(rows.indexes, index, side="right"))
        tokens, positions, indexes = rows.tokens[:count], rows.positions[:count], rows.indexes[:count]
        distance = np.abs(positions[-1] - positions).astype(np.float32)
        weights = np.float32(1) / (np.float32(1) + distance / np.float32(REACH))
        follows = (indexes[1:] == indexes[:-1] + 1) & (tokens[:-1] == tokens[-1])
        weights[1:][follows] *= np.float32(FOLLOWS)
        logits = np.zeros(self._capabilities.vocab_size, np.float32)
        np.add.at(logits, tokens, weights)
        return logits

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._check_open()
        self._tokens[list(targets)] = self._tokens[list(sources)]
        self._positions[list(targets)] = self._positions[list(sources)]

    def swap_out(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        _refuse(Feature.SWAP)

    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        _refuse(Feature.SWAP)

    def export_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        _refuse(Feature.EXPORT)

    def import_pages(self, group: int, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        _refuse(Feature.EXPORT)

    def load_adapter(self, adapter_id: int, path: Path) -> None:
        _refuse(Feature.ADAPTERS)

    def unload_adapter(self, adapter_id: int) -> None:
        _refuse(Feature.ADAPTERS)

    def encode_media(self, item: MediaItem) -> int:
        _refuse(Feature.MEDIA)

    def release_media(self, handle: int) -> None:
        _refuse(Feature.MEDIA)

    def decode_audio(self, stream: int, codes: Int32, final: bool) -> Float32:
        _refuse(Feature.AUDIO)

    def generate(self, request: GenerationRequest) -> Int32:
        raise Unsupported(f"driver {NAME} is of level 'step': it runs no whole generations")

    def close(self) -> None:
        self._closed = True
        self._done.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ForwardError(f"driver {NAME} is closed")


def _refuse(feature: Feature) -> NoReturn:
    raise Unsupported(f"driver {NAME} does not declare the feature {feature.value!r}")


def _require_plain(batch: ForwardBatch) -> None:
    """The core asks for nothing that is not declared; should it, the answer is a refusal and not a wrong token."""
    asked = {
        Feature.ATTENTION_MASK: len(batch.masks.rows),
        Feature.TICKET_TOKENS: (batch.tokens.tickets != NO_TICKET).any(),
        Feature.TICKET_LENGTHS: (batch.length_tickets != NO_TICKET).any(),
        Feature.DRAFTS: batch.num_drafts.any(),
        Feature.PROPOSALS: batch.num_proposals.any(),
        Feature.ADAPTERS: (batch.adapter_ids >= 0).any(),
        Feature.MEDIA: len(batch.media.rows),
        Feature.PROBE_HIDDEN: (batch.probes.kinds == ProbeKind.HIDDEN).any(),
    }
    for feature, is_asked in asked.items():
        if is_asked:
            _refuse(feature)


def _result(
    batch: ForwardBatch, ticket: Ticket, logits: dict[int, Float32], failed: dict[int, str], busy_s: float
) -> ForwardResult:
    vocab_size = len(next(iter(logits.values()))) if logits else 1
    nothing = np.zeros(vocab_size, np.float32)  # stands for the rows of requests that failed
    sampled = np.array([logits.get(row, nothing) for row in batch.samplers.rows.tolist()], np.float32)
    tokens = sample_tokens(sampled.reshape(-1, vocab_size), batch.samplers, batch.samplers.history.ids)
    probes = [
        _probe(batch, place, logits.get(row, nothing)) for place, row in enumerate(batch.probes.rows.tolist())
    ]
    return ForwardResult(
        ticket=ticket,
        tokens=tokens,
        accepted=np.zeros(batch.num_requests, np.int32),
        draft_indptr=np.zeros(batch.num_requests + 1, np.int32),
        draft_tokens=np.zeros(0, np.int32),
        probe_indptr=np.cumsum([0, *(len(values) for _, values in probes)]),
        probe_values=np.concatenate([np.zeros(0, np.float32), *(values for _, values in probes)]),
        probe_token_indptr=np.cumsum([0, *(len(ids) for ids, _ in probes)]),
        probe_tokens=np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in probes)]),
        failed=failed,
        busy_s=busy_s,
    )


def _probe(batch: ForwardBatch, place: int, logits: Float32) -> tuple[Int32, Float32]:
    """The token ids (of a distribution only) and the values of one probe."""
    probes = batch.probes
    no_ids = np.zeros(0, np.int32)
    match ProbeKind(probes.kinds[place]):
        case ProbeKind.DISTRIBUTION:
            return distribution(logits, float(probes.temperature[place]), int(probes.k[place]))
        case ProbeKind.LOGPROBS:
            named = probes.tokens[slice(*probes.token_indptr[place : place + 2])]
            return no_ids, log_softmax(logits)[named].astype(np.float32)
        case ProbeKind.ENTROPY:
            return no_ids, np.array([entropy(logits)], np.float32)
    return no_ids, logits


def _capabilities(options: Options, vocab_size: int) -> DriverCapabilities:
    rows = CacheGroup("rows", "paged", unit_bytes=8)
    return DriverCapabilities(
        driver=NAME,
        architecture=NAME,
        vocab_size=vocab_size,
        hidden_size=1,
        max_model_len=options.max_model_len,
        max_batch_tokens=4096,
        max_batch_requests=256,
        cache=(CacheSpace(rows, options.page_size, options.num_pages, num_host_pages=0),),
        features=FEATURES,
        weights_revision=f"{NAME}-1-{vocab_size}",  # to be changed with whatever changes the logits
        kv_dtype="int32",
        max_in_flight=MAX_IN_FLIGHT,
    )
