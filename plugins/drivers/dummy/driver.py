"""The dummy driver: no model and no torch, yet every field of a batch decides what it answers."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.driver import (
    CacheGroup,
    CacheSpace,
    DriverCapabilities,
    Feature,
    GenerationRequest,
)
from pie_core.contracts.forward import Float32, ForwardBatch, ForwardResult, Int32, Int64, StateTable
from pie_core.contracts.media import MediaItem
from pie_core.errors import ForwardError, LoadError, Unsupported
from pie_core.ids import Ticket
from pie_plugins.drivers.dummy.audio import AudioDecoder
from pie_plugins.drivers.dummy.batch_tensors import FinishedStep, FinishedSteps, ResolvedStep, resolve
from pie_plugins.drivers.dummy.generation import generate
from pie_plugins.drivers.dummy.hashing import Words, digest_word, mix
from pie_plugins.drivers.dummy.hollow import FEATURES, hollow_result
from pie_plugins.drivers.dummy.kv_cache import UNIT_BYTES
from pie_plugins.drivers.dummy.model import Attachments, DummyModel, check_page_ids
from pie_plugins.drivers.dummy.options import DummyOptions
from pie_plugins.drivers.dummy.prefixes import read_together, wrong_groups
from pie_plugins.drivers.dummy.proposals import Proposer, scratch_pages
from pie_plugins.drivers.dummy.refusals import used_features
from pie_plugins.drivers.dummy.sampler import Head, read_probes, verify_drafts
from pie_plugins.drivers.dummy.timeline import Timeline, wait_until

REVISION = "dummy-1"  # changes when the pretended weights do


@dataclass(frozen=True, slots=True)
class _OpenStep:
    ticket: Ticket
    ready_at: float
    outcome: ForwardResult | ForwardError


class DummyDriver:
    """Interprets a step when it is submitted, and keeps the answer until its pretended device is done."""

    def __init__(self, options: DummyOptions, vocab_size: int) -> None:
        self._options = options
        self._step_level = _capabilities(options, vocab_size)
        self._capabilities = _of_level(self._step_level, options)
        cache = self._step_level.cache
        scratch = max(scratch_pages(options.max_batch_requests, space.page_size) for space in cache)
        self._model = DummyModel(options.seed, cache, scratch)
        self._head = Head(vocab_size, options.hidden_size, options.streams)
        self._proposer = Proposer(self._model, self._head, cache, vocab_size, options.proposal_accuracy)
        self._timeline = Timeline(options.step_ms, options.token_us)
        self._undeclared = frozenset(Feature) - self._step_level.features
        self._adapters: dict[int, np.uint64] = {}
        self._media: dict[int, Words] = {}
        self._attachments = Attachments(self._adapters, self._media)
        self._audio = AudioDecoder()
        self._finished = FinishedSteps()
        self._open: deque[_OpenStep] = deque()
        self._tickets = 0
        self._media_handles = 0
        self._closed = False

    @property
    def capabilities(self) -> DriverCapabilities:
        return self._capabilities

    def submit(self, batch: ForwardBatch) -> Ticket:
        if self._capabilities.level == "request":
            raise Unsupported(
                f"driver 'dummy' is of level 'request' and got a step of {len(batch.context_ids)} contexts: it runs "
                "whole generations"
            )
        self._check_open()
        if used := used_features(batch, self._undeclared):
            raise Unsupported(
                f"driver 'dummy' does not declare {', '.join(sorted(used))}; the batch asks for it"
            )
        if len(self._open) >= self._options.max_in_flight:
            raise ForwardError(
                f"driver 'dummy' has {len(self._open)} open steps, as many as max_in_flight allows: collect one first"
            )
        return self._enqueue(batch)

    def _enqueue(self, batch: ForwardBatch) -> Ticket:
        span = self._timeline.enqueue(perf_counter(), batch.num_tokens)
        ticket = Ticket(self._tickets)
        self._tickets += 1
        outcome: ForwardResult | ForwardError
        try:
            if self._options.interpret:
                outcome = self._interpret(batch, ticket, span.busy_s)
            else:
                outcome = hollow_result(batch, ticket, self._step_level.vocab_size, span.busy_s)
        except ForwardError as error:
            outcome = error
        self._open.append(_OpenStep(ticket, span.end, outcome))
        return ticket

    def is_done(self, ticket: Ticket) -> bool:
        return self._open[0].ready_at <= perf_counter()

    def collect(self, ticket: Ticket) -> ForwardResult:
        self._check_open()
        if not self._open or self._open[0].ticket != ticket:
            waiting = [step.ticket for step in self._open]
            raise ForwardError(
                f"ticket {ticket} cannot be collected now: open are {waiting}, to be taken in order"
            )
        step = self._open.popleft()
        wait_until(step.ready_at)
        if isinstance(step.outcome, ForwardError):
            raise step.outcome
        return step.outcome

    def _interpret(self, batch: ForwardBatch, ticket: Ticket, busy_s: float) -> ForwardResult:
        self._check_batch(batch, ticket)
        step = resolve(read_together(batch, self._step_level.cache), self._finished)
        self._check_requests(step)
        words = self._model.run(step, self._attachments)
        sampled = words[step.samplers.rows]
        tokens = self._head.sample(sampled, step)
        for sampler in self._head.nothing_allowed(step.samplers).tolist():
            owner = step.request[step.samplers.rows[sampler]]
            step.failures.add([owner], f"the logit mask of sampler {sampler} allows no token")
        finished = _finish(step, tokens)
        self._finished.add(ticket, finished.step)
        probes = read_probes(self._head, words[batch.probes.rows], batch)
        draft_indptr, drafts = self._proposer.propose(step, finished.step, self._attachments)
        return ForwardResult(
            ticket=ticket,
            tokens=tokens,
            accepted=finished.accepted,
            draft_indptr=draft_indptr,
            draft_tokens=drafts,
            probe_indptr=probes.indptr,
            probe_values=probes.values,
            probe_token_indptr=probes.token_indptr,
            probe_tokens=probes.tokens,
            failed=step.failures.causes,
            busy_s=busy_s,
        )

    def _check_batch(self, batch: ForwardBatch, ticket: Ticket) -> None:
        if self._options.fail_every and (ticket + 1) % self._options.fail_every == 0:
            raise ForwardError(f"driver 'dummy': step {ticket} fails, as option fail_every asks")
        for table, space in zip(batch.cache, self._step_level.cache, strict=True):
            if complaint := check_page_ids(table, space):
                raise ForwardError(f"driver 'dummy': {complaint}")
        if complaint := wrong_groups(batch):
            raise ForwardError(f"driver 'dummy': {complaint}")

    def _check_requests(self, step: ResolvedStep) -> None:
        vocab_size = self._step_level.vocab_size
        outside = (step.tokens < 0) | (step.tokens >= vocab_size)
        if outside.any():
            rows = np.unique(np.nonzero(outside)[0])
            step.failures.add(step.request[rows], f"a token id lies outside 0 to {vocab_size - 1}")
        if self._options.fail_token >= 0:
            rows = np.unique(np.nonzero(step.tokens == self._options.fail_token)[0])
            step.failures.add(
                step.request[rows], f"token {self._options.fail_token} fails, as option fail_token asks"
            )
        contexts = step.batch.context_ids.tolist()
        for context in _repeated(contexts):
            twice = np.flatnonzero(step.batch.context_ids == context)
            step.failures.add(twice, f"context {context} stands in the batch more than once")

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._check_open()
        self._model.caches[group].copy(sources, targets)

    def swap_out(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        self._require(Feature.SWAP)
        self._model.caches[group].swap_out(pages, host_pages)

    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        self._require(Feature.SWAP)
        self._model.caches[group].swap_in(host_pages, pages)

    def export_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        self._require(Feature.EXPORT)
        return self._model.caches[group].export(pages)

    def import_pages(self, group: int, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        self._require(Feature.EXPORT)
        self._model.caches[group].import_(pages, content)

    def load_adapter(self, adapter_id: int, path: Path) -> None:
        self._require(Feature.ADAPTERS)
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        try:
            contents = [file.read_bytes() for file in files if not file.is_dir()]
        except OSError as error:
            raise LoadError(f"adapter {adapter_id} cannot be read from {path}: {error}") from error
        if not contents:
            raise LoadError(f"adapter {adapter_id}: the folder {path} holds no file")
        self._adapters[adapter_id] = digest_word(*contents)

    def unload_adapter(self, adapter_id: int) -> None:
        self._require(Feature.ADAPTERS)
        self._adapters.pop(adapter_id, None)

    def encode_media(self, item: MediaItem) -> int:
        self._require(Feature.MEDIA)
        content = [name.encode() + item.tensors[name].tobytes() for name in sorted(item.tensors)]
        word = digest_word(item.kind, str(item.grid), *content)
        self._media_handles += 1
        self._media[self._media_handles] = mix(word + np.arange(item.token_count, dtype=np.uint64))
        return self._media_handles

    def release_media(self, handle: int) -> None:
        self._require(Feature.MEDIA)
        self._media.pop(handle, None)

    def decode_audio(self, stream: int, codes: Int32, final: bool) -> Float32:
        self._require(Feature.AUDIO)
        return self._audio.decode(stream, codes, final)

    def generate(self, request: GenerationRequest) -> Int32:
        if self._capabilities.level == "step":
            raise Unsupported(
                f"driver 'dummy' is of level 'step' and was asked for a generation of {request.max_tokens} tokens: "
                "these need its option level: request"
            )
        self._check_open()
        return generate(request, self._step_level, self._run_now)

    def _run_now(self, batch: ForwardBatch) -> ForwardResult:
        return self.collect(self._enqueue(batch))

    def close(self) -> None:
        self._closed = True
        self._open.clear()

    def _require(self, feature: Feature) -> None:
        self._check_open()
        if not self._capabilities.has(feature):
            raise Unsupported(f"driver 'dummy' does not declare the feature {feature.value!r}")

    def _check_open(self) -> None:
        if self._closed:
            raise ForwardError("driver 'dummy' is closed")


def _repeated(ids: Sequence[int]) -> list[int]:
    return [] if len(set(ids)) == len(ids) else [each for each, count in Counter(ids).items() if count > 1]


@dataclass(frozen=True, slots=True)
class _Finish:
    accepted: Int32
    step: FinishedStep


def _finish(step: ResolvedStep, tokens: Int32) -> _Finish:
    verified = verify_drafts(step, tokens)
    last_rows = verified.end_lengths - step.starts - 1
    end_slots = tuple(
        _end_slots(table, last_rows) if isinstance(table, StateTable) else np.empty(0, np.int64)
        for table in step.batch.cache
    )
    finished = FinishedStep(
        tokens=tokens,
        sampler_requests=step.request[step.samplers.rows],
        rejected=verified.rejected,
        last_samplers=verified.last_samplers,
        end_lengths=verified.end_lengths,
        end_slots=end_slots,
        failed=step.failures.causes,
    )
    return _Finish(verified.accepted, finished)


def _end_slots(table: StateTable, last_rows: Int64) -> Int64:
    owners = np.repeat(np.arange(len(table.slots_in)), np.diff(table.out_indptr))
    at_end = table.out_rows == last_rows[owners]
    slots = np.full(len(table.slots_in), -1, np.int64)
    slots[owners[at_end]] = table.out_slots[at_end]
    return slots


def _capabilities(options: DummyOptions, vocab_size: int) -> DriverCapabilities:
    return DriverCapabilities(
        driver="dummy",
        architecture="dummy",
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        max_model_len=options.max_model_len,
        max_batch_tokens=options.max_batch_tokens,
        max_batch_requests=options.max_batch_requests,
        cache=_cache(options),
        features=_features(options),
        weights_revision=_weights_revision(options, vocab_size),
        kv_dtype="uint64",
        position_axes=options.position_axes,
        streams=options.streams,
        max_in_flight=options.max_in_flight,
        can_poll=options.polled,
    )


def _of_level(capabilities: DriverCapabilities, options: DummyOptions) -> DriverCapabilities:
    if options.level == "step":
        return capabilities
    return replace(
        capabilities, cache=(), features=frozenset(), level="request", sampling="engine", pages="virtual"
    )


def _cache(options: DummyOptions) -> tuple[CacheSpace, ...]:
    names = [
        kind if options.groups.count(kind) == 1 else f"{kind}-{place}"
        for place, kind in enumerate(options.groups)
    ]
    return tuple(
        CacheSpace(
            CacheGroup(name, kind, UNIT_BYTES, options.window if kind == "window" else None),
            page_size=1 if kind == "state" else options.page_size,
            num_pages=options.num_pages,
            num_host_pages=options.num_host_pages,
        )
        for name, kind in zip(names, options.groups, strict=True)
    )


def _features(options: DummyOptions) -> frozenset[Feature]:
    without = set(options.without)
    if options.num_host_pages == 0:
        without.add(Feature.SWAP)
    if set(options.groups) == {"state"}:
        without |= {Feature.ATTENTION_MASK, Feature.NONCAUSAL_MASK}
    return frozenset((set(Feature) if options.interpret else FEATURES) - without)


def _weights_revision(options: DummyOptions, vocab_size: int) -> str:
    parts = (REVISION, options.seed, vocab_size, options.streams, options.groups, options.window)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
