"""Passes that run before anybody asks for them, so that the driver need not wait for the host.

    asked for:   pass ──► its token ──► program ──► the next pass      claims the guess, if it is what was guessed
    run ahead:   pass ──► guess: the same sampler, one row on, fed with the token that the driver is about to draw

A guess is a pass without a request. Its row lies behind the context's history until it is claimed, and whatever else
happens to the context (another pass, a fork, a truncation, a snapshot) drops it first. Generations claim by themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from pie_core.contracts.driver import DriverCapabilities, Feature
from pie_core.engine.context import Context
from pie_core.engine.options import EngineOptions
from pie_core.scheduler.request import Pass, SampleRows


class RunAhead:
    """The chain of guesses of each context, and the pass at its end that the next guess would follow."""

    def __init__(self, can: DriverCapabilities, options: EngineOptions) -> None:
        self.hits = 0  # passes that were served from a guess
        self.misses = 0  # ... and those that were not what was guessed
        self.drops = 0  # guesses that were computed for nothing, generations that ended included
        self._can = can
        self._refers = can.has(Feature.TICKET_TOKENS)
        self._depth = options.speculation_depth
        self._steps = min(options.max_in_flight, can.max_in_flight)
        self._chains: dict[
            Context, deque[Pass]
        ] = {}  # submitted guesses that nobody has claimed, oldest first
        self._tails: dict[Context, Pass] = {}  # what a guess can follow

    # ---- guessing

    def ripe(self) -> list[Pass]:
        """Passes that a guess can follow now."""
        return [tail for context, tail in self._tails.items() if self._may_follow(context, tail)]

    def guess(self, tail: Pass) -> Pass:
        """What probably follows."""
        context, samples = tail.context, tail.samples
        assert samples is not None
        return Pass(
            request=None,
            context=context,
            base=context.submitted,
            arrival=tail.arrival,
            samples=_on_row(samples, context.submitted),
            generation=tail.generation,
            priority=tail.priority,
            predictable=True,
            source=tail,
            position=context.position + context.ahead,
        )

    def submitted(self, running: Pass) -> None:
        """All rows of a pass are at the driver."""
        if running.predictable:
            self._tails[running.context] = running
        if running.request is None:
            running.context.ahead += 1
            self._chains.setdefault(running.context, deque()).append(running)

    def _may_follow(self, context: Context, tail: Pass) -> bool:
        if (tail.drawn is None and not self._refers) or context.raw is not None:
            return False
        row, position = context.submitted, context.position + context.ahead
        if max(row, position) >= self._can.max_model_len or not context.pages.can_ever_fit(row + 1):
            return False
        generation = tail.generation
        if generation is None:
            return context.ahead < self._depth
        drawing = generation.generated + 1 + context.ahead
        return context.ahead + 1 < self._steps and drawing < generation.max_tokens

    # ---- claiming

    def claim(self, asked: Pass) -> Pass | None:
        """The guess that computes what is asked for; None, and no guess is left, if there is none."""
        chain = self._chains.get(asked.context)
        if not chain:
            self.drop(asked.context)
            return None
        if not _is_same(chain[0], asked):
            self.misses += 1
            self.drop(asked.context)
            return None
        self.hits += 1
        claimed = self._take_first(asked.context)
        claimed.request, claimed.arrival, claimed.priority = asked.request, asked.arrival, asked.priority
        if not asked.predictable:
            self.drop(asked.context)
        return claimed

    def follow(self, running: Pass) -> Pass | None:
        """The guess that goes on with a generation, whose token has just been drawn."""
        if not self._chains.get(running.context):
            self._tails.pop(running.context, None)
            return None
        following = self._take_first(running.context)
        following.request, following.base = running.request, running.base
        return following

    def drop(self, context: Context) -> None:
        """Forgets what was guessed; steps that still compute it are ignored."""
        self._tails.pop(context, None)
        chain = self._chains.pop(context, None)
        if chain:
            self.drops += len(chain)
            context.submitted, context.ahead = chain[0].base, 0
            context.pages.drop_latest(len(chain), context.submitted)
            for guess in chain:
                guess.dropped, guess.source = True, None

    def drop_idle(self) -> bool:
        """Gives back the pages of guesses that nobody waits for; whether there were any."""
        idle = [context for context in self._chains if not context.busy]
        for context in idle:
            self.drop(context)
        return bool(idle)

    def _take_first(self, context: Context) -> Pass:
        chain = self._chains[context]
        first = chain.popleft()
        if not chain:
            del self._chains[context]
        context.ahead -= 1
        first.source = None  # its token is in the history now
        return first


def pending_rows(running: Pass) -> Iterator[Pass]:
    """The guesses up to this one whose tokens are not in the history, latest first."""
    while running.source is not None:
        yield running
        running = running.source


def _on_row(samples: SampleRows, row: int) -> SampleRows:
    return SampleRows(
        rows=[row],
        order=[0],
        settings=samples.settings,
        streams=samples.streams,
        slots=[0],
        biases=samples.biases,
        penalized=samples.penalized,
    )


def _is_same(guess: Pass, asked: Pass) -> bool:
    """Whether a guess computes the whole of what is asked for: row, position, masks, samplers, probes."""
    history, samples, source = asked.context.history, asked.samples, guess.source
    assert source is not None
    assert guess.samples is not None
    return (
        history.length == asked.base + 1 == guess.base + 1
        and int(history.tokens[-1]) == source.drawn
        and int(history.positions[-1]) == guess.position
        and asked.base not in history.masks
        and asked.logit_mask is None
        and asked.probes is None
        and asked.generation is None
        and samples is not None
        and samples.settings == guess.samples.settings
        and samples.streams == guess.samples.streams
        and _are_same_biases(samples, guess.samples)
    )


def _are_same_biases(some: SampleRows, others: SampleRows) -> bool:
    return len(some.biases) == len(others.biases) and all(
        np.array_equal(mine, other)
        for pair, pair_of_other in zip(some.biases, others.biases, strict=True)
        for mine, other in zip(pair, pair_of_other, strict=True)
    )
