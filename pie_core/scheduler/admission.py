"""Typed refusals: a request becomes a pass here, or ends here before anything reaches the driver.

Nothing is changed by looking: a refused request leaves its context as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pie_core.contracts.driver import DriverCapabilities, Feature
from pie_core.contracts.forward import Float32, Int32, ProbeKind, UInt32
from pie_core.engine.context import Context
from pie_core.engine.messages import EvictRows, Forward, Generate, PinRows, Probe, Sample, SamplerSpec
from pie_core.engine.options import EngineOptions
from pie_core.errors import InvalidRequest, LimitExceeded, PageShared, Unsupported
from pie_core.kv_pages.context_pages import Cache
from pie_core.kv_pages.intervals import Range, hidden_too
from pie_core.kv_pages.raw_pages import RawPages
from pie_core.scheduler.request import REPETITION, Generation, Pass, ProbeRows, SampleRows, Settings

PROBE_FEATURES = {
    ProbeKind.LOGITS: Feature.PROBE_LOGITS,
    ProbeKind.DISTRIBUTION: Feature.PROBE_DISTRIBUTION,
    ProbeKind.LOGPROBS: Feature.PROBE_LOGPROBS,
    ProbeKind.ENTROPY: Feature.PROBE_ENTROPY,
    ProbeKind.HIDDEN: Feature.PROBE_HIDDEN,
    ProbeKind.COLUMNS: Feature.PROBE_COLUMNS,
}


class Admission:
    """What this model and driver can do, asked once for each request."""

    def __init__(self, capabilities: DriverCapabilities, options: EngineOptions) -> None:
        self._can = capabilities
        self._options = options
        windows = [space.group.window for space in capabilities.cache if space.group.kind == "window"]
        self._window = min((each for each in windows if each is not None), default=None)
        self._recurrent = [space.group.name for space in capabilities.cache if space.group.kind == "state"]

    def forward(self, command: Forward, context: Context, arrival: int) -> Pass:
        """The pass that a Forward asks for; its rows are on the context's history afterwards."""
        self._refuse_request_level()
        count = len(command.tokens)
        self._check_tokens(command.tokens, context)
        self._check_raw_pages(context, count)
        self._check_positions(command, context)
        masks = self._masks(command, context)
        samples = self._verified_samples(command)
        passed = Pass(
            request=command.request,
            context=context,
            base=context.length,
            arrival=arrival,
            samples=self._sample_rows(samples, count, context),
            probes=self._probe_rows(command.probes, count, context.length),
            logit_mask=self._logit_mask(command.logit_mask),
            num_drafts=command.num_drafts,
            predictable=_is_predictable(command),
            priority=context.priority if command.priority is None else command.priority,
        )
        context.history.extend(command.tokens, command.positions, masks)
        return passed

    def generate(self, command: Generate, context: Context, arrival: int) -> Pass:
        """The pass that a Generate starts with: its prompt, and a sampler on its last row."""
        self._refuse_request_level()
        count = len(command.tokens)
        if context.raw is not None:
            raise InvalidRequest(
                f"a generation takes pages as it goes, and the program manages {context.raw.count} of this context: "
                "step through it with forward passes, or end the managing first"
            )
        self._check_tokens(command.tokens, context)
        self._check_next_positions(context, count)
        if command.max_tokens < 0:
            raise InvalidRequest(f"max_tokens is {command.max_tokens}; expected 0 (no limit) or more")
        start = context.length + count
        space = self._can.max_model_len - max(start, context.position + count)
        if space == 0:
            raise InvalidRequest(
                f"the prompt fills the model's {self._can.max_model_len} tokens: none can follow"
            )
        sample = Sample(row=count - 1, sampler=command.sampler)
        passed = Pass(
            request=command.request,
            context=context,
            base=context.length,
            arrival=arrival,
            samples=self._sample_rows([sample], count, context),
            predictable=True,
            priority=context.priority if command.priority is None else command.priority,
            generation=Generation(
                start=start,
                stop_tokens=frozenset(command.stop_tokens),
                max_tokens=min(command.max_tokens or space, space),
                whole=command.whole,
            ),
        )
        context.history.extend(command.tokens)
        return passed

    def _require(self, feature: Feature) -> None:
        if feature not in self._can.features:
            offered = ", ".join(sorted(each.value for each in self._can.features)) or "none"
            raise Unsupported(
                f"driver {self._can.driver!r} with architecture {self._can.architecture!r} does not do "
                f"{feature.value}; its features: {offered}"
            )

    def _refuse_request_level(self) -> None:
        if self._can.level == "request":
            raise Unsupported(
                f"driver {self._can.driver!r} with architecture {self._can.architecture!r} serves whole "
                "generations only (level 'request'): this engine drives it by steps"
            )

    # ---- rows

    def _check_tokens(self, given: Sequence[int], context: Context) -> None:
        if not given:
            raise InvalidRequest("empty input: a pass needs at least one token")
        limit = self._can.vocab_size
        if min(given) < 0 or max(given) >= limit:
            row, token = next((row, each) for row, each in enumerate(given) if not 0 <= each < limit)
            raise InvalidRequest(
                f"input row {row}: token id {token} is not in the vocabulary (0 to {limit - 1})"
            )
        length = context.length + len(given)
        if length > self._can.max_model_len:
            raise InvalidRequest(
                f"too many tokens: {context.length} in the context and {len(given)} in the pass exceed the "
                f"model's length of {self._can.max_model_len}"
            )
        context.pages.refuse_what_never_fits(length)

    def raw_pages(self, cache: Cache, context: Context) -> RawPages:
        """For a context whose program is to manage its pages."""
        self._refuse_request_level()
        if not any(space.group.kind in ("paged", "latent") for space in self._can.cache):
            raise Unsupported(
                f"architecture {self._can.architecture!r} on driver {self._can.driver!r} keeps no pages of whole "
                "contexts: there is nothing to reserve"
            )
        return RawPages(cache, context.length)

    def check_reserve(self, length: int, context: Context) -> None:
        """Whether pages of which the last one begins with this row can ever be used."""
        if length > self._can.max_model_len:
            raise InvalidRequest(
                f"too many pages: the last of them would begin with row {length - 1}; the model has "
                f"{self._can.max_model_len} rows"
            )
        context.pages.refuse_what_never_fits(length)

    def _check_raw_pages(self, context: Context, count: int) -> None:
        raw = context.raw
        if raw is None:
            return
        if context.length + count > raw.rows:
            raise InvalidRequest(
                f"the pass writes rows {context.length} to {context.length + count - 1}, and the {raw.count} pages of "
                f"{raw.page_size} that the program has reserved end with row {raw.rows - 1}: reserve more first"
            )
        if context.pages.writes_shared(context.written):
            raise PageShared(
                f"row {context.written} belongs on a page that a fork, a snapshot or a cache shares, and pages that "
                "the program manages are not copied: fork and save where a page ends, truncate to there, or end the "
                "managing, so that the next pass copies it"
            )

    def _check_positions(self, command: Forward, context: Context) -> None:
        count, given = len(command.tokens), command.positions
        if given is None:
            self._check_next_positions(context, count)
            return
        if len(given) != count:
            raise InvalidRequest(f"{len(given)} positions for {count} tokens; expected one for each")
        limit = self._can.max_model_len
        if min(given) < 0 or max(given) >= limit:
            row, position = next((row, each) for row, each in enumerate(given) if not 0 <= each < limit)
            raise InvalidRequest(
                f"input row {row}: position {position} is outside the model's 0 to {limit - 1}"
            )

    def _check_next_positions(self, context: Context, count: int) -> None:
        last = context.position + count - 1
        if last >= self._can.max_model_len:
            raise InvalidRequest(
                f"the next {count} positions end at {last}; the model's last is {self._can.max_model_len - 1}"
            )

    # ---- attention masks

    def _masks(self, command: Forward, context: Context) -> list[Int32]:
        if not command.masks:
            return []
        self._require_masks(command.masks_attention_only)
        if len(command.masks) != len(command.tokens):
            raise InvalidRequest(
                f"{len(command.masks)} mask rows for {len(command.tokens)} tokens; expected one for each"
            )
        hidden = context.evictions.evicted
        return [self._mask(runs, row, context.length + row, hidden) for row, runs in enumerate(command.masks)]

    def _mask(self, runs: Sequence[int], row: int, own: int, hidden: Sequence[Range]) -> Int32:
        """The runs of one row, whose own KV index is `own`."""
        limit = self._can.max_model_len
        if runs and min(runs) < 0:
            raise InvalidRequest(f"mask row {row}: run length {min(runs)} is negative")
        if len(runs) > 2 * limit + 2 or sum(runs) > limit:
            raise InvalidRequest(
                f"mask row {row}: {len(runs)} runs over {sum(runs)} KV rows; the model has at most {limit} rows"
            )
        mask = np.array(runs, np.int32)
        left = hidden_too(mask, hidden).tolist() if hidden else runs
        lowest = 0 if self._window is None else max(own - self._window + 1, 0)
        if not _sees(left, lowest, own):
            raise InvalidRequest(
                f"mask row {row} hides every KV row from {lowest} to {own}: nothing is left to attend to; "
                "run lengths begin with hidden, so (0, n) shows the first n, and evicted rows are hidden anyway"
            )
        return mask

    def evict(self, command: EvictRows | PinRows, context: Context) -> None:
        """Whether rows of this model can be left out of what later rows read, and these rows are there."""
        self._require_masks(attention_only=False)
        if not 0 <= command.start <= command.stop <= context.length:
            what = "evict" if isinstance(command, EvictRows) else "pin"
            raise InvalidRequest(
                f"cannot {what} rows {command.start} to {command.stop}: the context has {context.length}"
            )

    def _require_masks(self, attention_only: bool) -> None:
        self._require(Feature.ATTENTION_MASK)
        if self._recurrent and not attention_only:
            raise Unsupported(
                f"architecture {self._can.architecture!r} on driver {self._can.driver!r} has recurrent layers "
                f"(cache groups {', '.join(self._recurrent)}): hiding rows from attention has no meaning there; "
                "the masks of a pass can be asked to hold for its attention layers alone"
            )

    # ---- samplers

    def _verified_samples(self, command: Forward) -> Sequence[Sample]:
        """The samples, and one on each row that verifies a draft: like that of the last input row."""
        drafts, count = command.num_drafts, len(command.tokens)
        if drafts == 0:
            return command.samples
        self._require(Feature.DRAFTS)
        if not 0 < drafts < count:
            raise InvalidRequest(f"{drafts} drafts among {count} tokens; expected at least one other token")
        if drafts >= min(self._options.max_batch_tokens, self._can.max_batch_tokens):
            raise LimitExceeded(f"{drafts} drafts do not fit in one step; propose fewer")
        verifying = range(count - drafts - 1, count)
        own = {each.row: each for each in command.samples if each.row in verifying}
        if verifying[0] not in own or len(own) < sum(each.row in verifying for each in command.samples):
            raise InvalidRequest(
                f"drafts are verified by one sampler on row {verifying[0]}, the last before them, and at most "
                "one on each draft"
            )
        others = [each for each in command.samples if each.row not in verifying]
        template = own[verifying[0]].sampler
        return [*others, *(own.get(row) or Sample(row=row, sampler=template) for row in verifying)]

    def _sample_rows(self, samples: Sequence[Sample], count: int, context: Context) -> SampleRows | None:
        if not samples:
            return None
        self._refuse_too_many_outputs(len(samples))
        order = sorted(range(len(samples)), key=lambda place: samples[place].row)
        rows = [_row(samples[place].row, count, "sampler") for place in order]
        specs = [samples[place].sampler for place in order]
        settings = [sampler_settings(each) for each in specs]
        return SampleRows(
            rows=[row + context.length for row in rows],
            order=order,
            settings=settings,
            streams=[context.stream if each.seed is None else each.seed for each in specs],
            slots=_places_within_runs(rows),
            biases=self._biases(specs),
            penalized=self._penalizes(settings),
        )

    def _penalizes(self, settings: Sequence[Settings]) -> bool:
        for each in settings:
            if each[REPETITION:] != (1, 0, 0):
                self._require(Feature.PENALTIES)
                return True
        return False

    def _biases(self, specs: Sequence[SamplerSpec]) -> tuple[tuple[Int32, Float32], ...]:
        for each in specs:
            if each.bias_tokens or each.bias_values:
                return tuple(map(self._bias, specs))
        return ()

    def _bias(self, spec: SamplerSpec) -> tuple[Int32, Float32]:
        tokens, values = spec.bias_tokens, spec.bias_values
        if not tokens and not values:
            return _NO_BIAS
        self._require(Feature.LOGIT_BIAS)
        if len(tokens) != len(values):
            raise InvalidRequest(
                f"logit bias: {len(tokens)} tokens and {len(values)} values; expected as many"
            )
        if min(tokens) < 0 or max(tokens) >= self._can.vocab_size:
            raise InvalidRequest(
                f"logit bias: token ids from {min(tokens)} to {max(tokens)}; the vocabulary has "
                f"0 to {self._can.vocab_size - 1}"
            )
        if len(set(tokens)) < len(tokens):
            ((twice, _),) = Counter(tokens).most_common(1)
            raise InvalidRequest(f"logit bias: token {twice} is named twice; give each one value")
        if not all(abs(each) <= _FLOAT32_MAX for each in values):
            token, value = next(
                each for each in zip(tokens, values, strict=True) if not abs(each[1]) <= _FLOAT32_MAX
            )
            raise InvalidRequest(
                f"logit bias: {value} of token {token} is not a finite number; use a logit mask to forbid a token"
            )
        return np.array(tokens, np.int32), np.array(values, np.float32)

    def _logit_mask(self, runs: Sequence[int] | None) -> UInt32 | None:
        if runs is None:
            return None
        self._require(Feature.LOGIT_MASK)
        if runs and min(runs) < 0:
            raise InvalidRequest(f"logit mask: run length {min(runs)} is negative")
        vocab = self._can.vocab_size
        if sum(runs) > vocab or len(runs) > 2 * vocab + 2:
            raise InvalidRequest(
                f"logit mask: {len(runs)} runs over {sum(runs)} tokens; the vocabulary has {vocab}"
            )
        if not any(runs[1::2]):
            raise InvalidRequest(
                f"logit mask: every token is forbidden by {len(runs)} runs; run lengths begin with forbidden"
            )
        allowed = np.zeros(-(-vocab // 32) * 32, np.uint8)
        allowed[: sum(runs)] = np.repeat(np.arange(len(runs)) % 2, runs)
        return np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)

    # ---- probes

    def _probe_rows(self, probes: Sequence[Probe], count: int, base: int) -> ProbeRows | None:
        if not probes:
            return None
        self._refuse_too_many_outputs(len(probes))
        values = sum(self._probe_size(each) for each in probes)
        if values > self._options.max_pass_values:
            raise LimitExceeded(
                f"the probes of this pass return {values} numbers; the limit is {self._options.max_pass_values}"
            )
        order = sorted(range(len(probes)), key=lambda place: probes[place].row)
        ordered = [probes[place] for place in order]
        return ProbeRows(
            rows=[base + _row(each.row, count, "probe") for each in ordered],
            order=order,
            kinds=[each.kind for each in ordered],
            temperatures=[each.temperature for each in ordered],
            counts=[min(each.k, self._can.vocab_size) for each in ordered],
            tokens=[each.tokens for each in ordered],
        )

    def _probe_size(self, probe: Probe) -> int:
        """How many numbers the probe returns; refuses what it cannot return."""
        vocab = self._can.vocab_size
        if probe.kind not in set(ProbeKind):
            raise InvalidRequest(f"probe on row {probe.row}: kind {probe.kind} is unknown")
        kind = ProbeKind(probe.kind)
        self._require(PROBE_FEATURES[kind])
        if kind is ProbeKind.DISTRIBUTION:
            _in_range("probe temperature", probe.temperature, 0, _FLOAT32_MAX, low_open=True)
            _in_range("probe k", probe.k, 0, _INT32_MAX)
            return 2 * min(probe.k or vocab, vocab)
        if kind is ProbeKind.LOGPROBS:
            if not probe.tokens or min(probe.tokens) < 0 or max(probe.tokens) >= vocab:
                raise InvalidRequest(
                    f"probe on row {probe.row}: expected one or more token ids from 0 to {vocab - 1}"
                )
            return len(probe.tokens)
        if kind is ProbeKind.COLUMNS:
            self._check_columns(probe)
            return self._can.streams * vocab
        return {ProbeKind.LOGITS: vocab, ProbeKind.HIDDEN: self._can.hidden_size}.get(kind, 1)

    def _check_columns(self, probe: Probe) -> None:
        streams, vocab = self._can.streams, self._can.vocab_size
        if len(probe.tokens) > streams or not all(0 <= token < vocab for token in probe.tokens):
            raise InvalidRequest(
                f"probe on row {probe.row}: expected at most {streams} columns of ids from 0 to {vocab - 1}"
            )

    def _refuse_too_many_outputs(self, count: int) -> None:
        if count > self._options.max_pass_outputs:
            raise LimitExceeded(
                f"{count} samplers or probes on one pass; the limit is {self._options.max_pass_outputs}: "
                "split the pass"
            )


_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_TINY = float(np.finfo(np.float32).tiny)
_INT32_MAX = (1 << 31) - 1
_NO_BIAS = (np.empty(0, np.int32), np.empty(0, np.float32))


@lru_cache(maxsize=1024)
def sampler_settings(spec: SamplerSpec) -> Settings:
    """The numbers of a sampler, in the columns of SampleRows.settings; raises InvalidRequest."""
    _in_range("temperature", spec.temperature, 0, _FLOAT32_MAX)
    if 0 < spec.temperature < _FLOAT32_TINY:
        raise InvalidRequest(f"sampler: temperature {spec.temperature} is too small for float32; 0 is greedy")
    _in_range("top_k", spec.top_k, 0, _INT32_MAX)
    _in_range("top_p", spec.top_p, 0, 1, low_open=True)
    _in_range("min_p", spec.min_p, 0, 1)
    _in_range("repetition penalty", spec.repetition, 0, _FLOAT32_MAX, low_open=True)
    _in_range("presence penalty", spec.presence, -_FLOAT32_MAX, _FLOAT32_MAX)
    _in_range("frequency penalty", spec.frequency, -_FLOAT32_MAX, _FLOAT32_MAX)
    if spec.seed is not None:
        _in_range("seed", spec.seed, 0, (1 << 64) - 1)
    penalties = (spec.repetition, spec.presence, spec.frequency)
    return (spec.temperature, spec.top_k, spec.top_p, spec.min_p, *penalties)


def _in_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if not low <= value <= high or (low_open and value == low):
        expected = f"{'more than' if low_open else 'at least'} {low:g} and at most {high:g}"
        raise InvalidRequest(f"sampler: {name} is {value}; expected {expected}")


def _is_predictable(command: Forward) -> bool:
    """Whether the next pass is probably this one's token, one row on, with the same sampler and nothing else."""
    plain = not (command.masks or command.probes or command.num_drafts) and command.logit_mask is None
    samples = command.samples
    on_last_row = len(samples) == 1 and samples[0].row == len(command.tokens) - 1
    return plain and on_last_row and command.pass_speculation


def _row(row: int, count: int, what: str) -> int:
    if not 0 <= row < count:
        raise InvalidRequest(f"{what} on row {row}; the pass has rows 0 to {count - 1}")
    return row


def _sees(runs: Sequence[int], lowest: int, highest: int) -> bool:
    """Whether a row from `lowest` to `highest` is visible."""
    start, visible = 0, False
    for run in runs:
        stop = start + run
        if visible and run and start <= highest and stop > lowest:
            return True
        start, visible = stop, not visible
    return False


def _places_within_runs(rows: Sequence[int]) -> list[int]:
    """For ascending rows: how many equal ones stand before each. [3, 3, 5] -> [0, 1, 0]"""
    firsts: dict[int, int] = {}
    return [place - firsts.setdefault(row, place) for place, row in enumerate(rows)]
