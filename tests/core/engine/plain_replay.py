"""What a program of engine commands must give, computed the plain way: every draw reruns the whole context alone.

No pages are shared, nothing is batched, split or kept between draws, so it has nothing in common with the engine but
the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pie_core.contracts.driver import Driver
from pie_core.contracts.sampling import derive_stream
from pie_core.engine.messages import SamplerSpec
from pie_core.testing.batches import Mask, Request, Sample, Stepper

Runs = tuple[int, ...]


@dataclass(slots=True)
class PlainContext:
    stream: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    masks: list[Runs | None] = field(default_factory=list)
    epoch: int = 0
    children: int = 0
    pinned: set[int] = field(default_factory=set)
    since: dict[int, int] = field(default_factory=dict)  # evicted row -> rows that there were then

    def extend(
        self, tokens: Sequence[int], positions: Sequence[int] | None = None, masks: Sequence[Runs] = ()
    ) -> None:
        first = self.position
        self.tokens += tokens
        self.positions += positions if positions is not None else range(first, first + len(tokens))
        self.masks += masks or [None] * len(tokens)

    @property
    def position(self) -> int:
        return max(self.positions, default=-1) + 1

    def cut(self, length: int) -> None:
        del self.tokens[length:], self.positions[length:], self.masks[length:]
        self.pinned = {row for row in self.pinned if row < length}
        self.since = {row: min(since, length) for row, since in self.since.items() if row < length}

    def evict(self, start: int, stop: int) -> None:
        for row in range(start, stop):
            if row not in self.pinned:
                self.since.setdefault(row, len(self.tokens))

    def visible(self, row: int) -> list[tuple[int, int]] | None:
        """What a row reads, where that is not everything before it."""
        hidden = {each for each, since in self.since.items() if since <= row}
        runs = self.masks[row]
        if runs is None and not hidden:
            return None
        shown = _ranges(runs) if runs is not None else [(0, row + 1)]
        return [(each, each + 1) for low, high in shown for each in range(low, high) if each not in hidden]

    def truncate(self, length: int) -> None:
        self.epoch += length < len(self.tokens)
        self.cut(length)

    def child(self) -> PlainContext:
        self.children += 1
        stream = derive_stream(self.stream, self.children - 1)
        copy = PlainContext(stream, list(self.tokens), list(self.positions), list(self.masks))
        copy.pinned, copy.since = set(self.pinned), dict(self.since)
        return copy


class PlainReplay:
    def __init__(self, driver: Driver) -> None:
        self._stepper = Stepper(driver)

    def draw(
        self, context: PlainContext, asked: Sequence[tuple[int, SamplerSpec]], logit_mask: Runs | None = None
    ) -> list[int]:
        """One token for each (KV index, sampler)."""
        samples, seen = [], dict.fromkeys(range(len(context.tokens)), 0)
        for row, spec in asked:
            samples.append(_sample(context, row, seen[row], spec, logit_mask))
            seen[row] += 1
        scratch = self._stepper.context()
        visible = {row: context.visible(row) for row in range(len(context.tokens))}
        masks = [Mask(row, ranges) for row, ranges in visible.items() if ranges is not None]
        request = Request(scratch, context.tokens, context.positions, samples=samples, masks=masks)
        result = self._stepper.run([request])
        self._stepper.book.drop_context(scratch)
        assert not result.failed
        return [int(token) for token in result.tokens]

    def generate(
        self, context: PlainContext, sampler: SamplerSpec, max_tokens: int, stop_tokens: Sequence[int]
    ) -> list[int]:
        """The loop that an inferlet would write; the context has its tokens afterwards."""
        drawn: list[int] = []
        while len(drawn) < max_tokens:
            token = self.draw(context, [(len(context.tokens) - 1, sampler)])[0]
            if token in stop_tokens:
                break
            drawn.append(token)
            context.extend([token])
        return drawn


def _sample(context: PlainContext, row: int, slot: int, spec: SamplerSpec, logit_mask: Runs | None) -> Sample:
    penalized = (spec.repetition, spec.presence, spec.frequency) != (1.0, 0.0, 0.0)
    return Sample(
        row=row,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
        repetition=spec.repetition,
        presence=spec.presence,
        frequency=spec.frequency,
        stream=context.stream if spec.seed is None else spec.seed,
        index=row + 1,
        slot=slot,
        epoch=context.epoch,
        history=context.tokens[: row + 1] if penalized else (),
        bias=list(zip(spec.bias_tokens, spec.bias_values, strict=True)),
        allowed=None
        if logit_mask is None
        else [i for start, stop in _ranges(logit_mask) for i in range(start, stop)],
    )


def _ranges(runs: Runs) -> list[tuple[int, int]]:
    """Run lengths (hidden, visible, …) as the visible ranges."""
    ranges, start = [], 0
    for place, run in enumerate(runs):
        if place % 2 and run:
            ranges.append((start, start + run))
        start += run
    return ranges
