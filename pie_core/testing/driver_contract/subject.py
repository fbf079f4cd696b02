"""What every part of the driver contract stands on: a driver to ask, and ways to compare its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from pie_core.contracts.driver import Driver, Feature
from pie_core.contracts.forward import ForwardResult, ProbeKind
from pie_core.contracts.media import MediaItem
from pie_core.testing.batches import Context, Probe, Request, Sample, Stepper, Token, probe_values

Answer = NDArray[
    np.float32
]  # [rows, vocab] logits, or [rows, streams] greedy tokens where no probe shows logits


class DriverSubject:
    """Subclasses say how to make the driver. What a driver does not declare is skipped, or shown to be refused."""

    tolerance: ClassVar[float] = (
        0.0  # of logits, as a fraction of their standard deviation; 0 = equal bit for bit
    )

    def make_driver(self, page_size: int | None = None) -> Driver:
        """A new driver of the same weights each time; with that page size where the driver lets one choose."""
        raise NotImplementedError(f"{type(self).__name__}.make_driver: a new driver of the same weights")

    page_sizes: ClassVar[Sequence[int]] = ()  # what `make_driver` takes; empty where it takes none

    def adapter_paths(self, folder: Path) -> tuple[Path, Path]:
        """Two different adapters for this model (Feature.ADAPTERS)."""
        raise NotImplementedError(f"{type(self).__name__}.adapter_paths: the driver declares adapters")

    def media_items(self) -> tuple[MediaItem, MediaItem]:
        """Two different items of the same token count, at least 4, for this model (Feature.MEDIA)."""
        raise NotImplementedError(f"{type(self).__name__}.media_items: the driver declares media")

    @pytest.fixture
    def driver(self) -> Iterator[Driver]:
        driver = self.make_driver()
        yield driver
        driver.close()

    @pytest.fixture
    def stepper(self, driver: Driver) -> Stepper:
        if driver.capabilities.level == "request":
            pytest.skip("runs whole generations, not steps")
        return Stepper(driver)

    def prompt(self, driver: Driver, count: int, seed: int = 0) -> list[Token]:
        """Arbitrary tokens."""
        streams, vocab_size = driver.capabilities.streams, driver.capabilities.vocab_size
        ids = np.random.default_rng(seed).integers(0, vocab_size, (count, streams)).tolist()
        return [tuple(columns) if streams > 1 else columns[0] for columns in ids]

    def other_token(self, driver: Driver, token: Token) -> Token:
        vocab_size = driver.capabilities.vocab_size
        assert isinstance(token, int | tuple)
        if isinstance(token, int):
            return (token + 1) % vocab_size
        return tuple((column + 1) % vocab_size for column in token)

    def asking(self, request: Request, driver: Driver, rows: Sequence[int] = (-1,)) -> Request:
        """The request, also asking for an answer at these rows."""
        if driver.capabilities.has(Feature.PROBE_LOGITS):
            return replace(request, probes=[Probe(ProbeKind.LOGITS, row) for row in rows])
        return replace(request, samples=[Sample(row) for row in rows])

    def answer(self, driver: Driver, result: ForwardResult, first: int, rows: int) -> Answer:
        """What the probes or samplers `first` to `first + rows` gave."""
        assert not result.failed, result.failed
        if driver.capabilities.has(Feature.PROBE_LOGITS):
            return np.stack([probe_values(result, first + row) for row in range(rows)])
        return result.tokens[first : first + rows].reshape(rows, -1).astype(np.float32)

    def ask(
        self,
        stepper: Stepper,
        context: Context,
        tokens: Sequence[Token],
        rows: Sequence[int] = (-1,),
        **fields: Any,
    ) -> Answer:
        """Feeds the tokens and gives the answer at those rows."""
        request = self.asking(Request(context, tokens, **fields), stepper.driver, rows)
        return self.answer(stepper.driver, stepper.run([request]), 0, len(rows))

    def ask_all(self, stepper: Stepper, requests: Sequence[Request]) -> list[Answer]:
        """One step; the answer of each request at its last row."""
        result = stepper.run([self.asking(request, stepper.driver) for request in requests])
        return [self.answer(stepper.driver, result, place, 1) for place in range(len(requests))]

    def same(self, one: Answer, other: Answer) -> bool:
        if self.tolerance == 0:
            return bool(np.array_equal(one, other))
        scale = max(float(one.std()), float(np.abs(one).mean()), 1e-6)  # a single value has no spread
        return bool(np.abs(one - other).max() <= self.tolerance * scale)

    def needs(self, driver: Driver, *features: Feature) -> None:
        missing = [feature.value for feature in features if not driver.capabilities.has(feature)]
        if missing:
            pytest.skip(f"does not declare {', '.join(missing)}")

    def groups(self, driver: Driver, *kinds: str) -> list[int]:
        """The cache groups of these kinds."""
        return [g for g, space in enumerate(driver.capabilities.cache) if space.group.kind in kinds]

    def rows_groups(self, driver: Driver) -> list[int]:
        """The groups that keep KV rows on pages."""
        return self.groups(driver, "paged", "window", "latent")

    def literal(self, token: NDArray[np.int32]) -> Token:
        """A sampled token, to be fed back."""
        return int(token) if token.ndim == 0 else tuple(token.tolist())

    def generated(
        self, stepper: Stepper, context: Context, first: Token, count: int, sample: Sample
    ) -> list[Token]:
        """The plain loop: one token at a time."""
        tokens, token = [], first
        for _ in range(count):
            result = stepper.run([Request(context, [token], samples=[sample])])
            token = self.literal(result.tokens[0])
            tokens.append(token)
        return tokens
