"""Programs of a simulation: what each asks of the engine, and what its contexts must consist of if all is well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from pie_core.contracts.driver import Driver
from pie_core.contracts.sampling import derive_stream
from pie_core.engine.messages import SamplerSpec
from pie_core.testing.batches import Mask, Request, Sample, Stepper

_CHECKED_PAGE = 16  # rows
_CHECKED_AT_ONCE = 64  # contexts of a step

SAMPLERS = (
    SamplerSpec(),
    SamplerSpec(temperature=1.0),
    SamplerSpec(temperature=0.8, top_k=7, top_p=0.9),
    SamplerSpec(temperature=1.0, seed=11),
)


@dataclass(frozen=True, slots=True)
class Draw:
    """A token that the engine drew behind a row."""

    row: int
    sampler: SamplerSpec
    epoch: int
    token: int


@dataclass(slots=True)
class Shadow:
    """What a context must be: its tokens, what was drawn on the way, and which rows are hidden since when."""

    stream: int
    tokens: list[int] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    hidden_since: dict[int, int] = field(default_factory=dict)
    epoch: int = 0
    children: int = 0

    def truncate(self, length: int) -> None:
        self.epoch += length < len(self.tokens)
        self.cut(length)

    def cut(self, length: int) -> None:
        del self.tokens[length:]
        self.draws = [draw for draw in self.draws if draw.row < length]
        since = self.hidden_since.items()
        self.hidden_since = {row: min(length, moment) for row, moment in since if row < length}

    def evict(self, start: int, stop: int) -> None:
        for row in range(start, stop):
            self.hidden_since.setdefault(row, len(self.tokens))

    def as_it_is(self) -> Shadow:
        """A copy that later changes leave alone."""
        return replace(
            self, tokens=list(self.tokens), draws=list(self.draws), hidden_since=dict(self.hidden_since)
        )

    def child(self) -> Shadow:
        """Draws of the parent stay the parent's: they came from its own noise."""
        self.children += 1
        stream = derive_stream(self.stream, self.children - 1)
        return Shadow(stream, list(self.tokens), [], dict(self.hidden_since))


class Checker:
    """Computes contexts alone and whole, on a driver of its own, and compares what was drawn on them."""

    def __init__(self, load: Callable[[int, int], Driver]) -> None:
        """`load` gives a driver with so many pages of so many rows."""
        self._load = load
        self._shadows: list[tuple[str, Shadow]] = []
        self.checked = 0

    def add(self, label: str, shadow: Shadow) -> None:
        """To be checked as it is now."""
        if shadow.draws:
            self._shadows.append((label, shadow.as_it_is()))

    def wrong_draws(self) -> list[str]:
        """Of all that was added: they share steps, but no rows."""
        if not self._shadows:
            return []
        pages = sum(-(-len(shadow.tokens) // _CHECKED_PAGE) for _, shadow in self._shadows)
        stepper = Stepper(self._load(pages + len(self._shadows), _CHECKED_PAGE))
        wrong: list[str] = []
        for first in range(0, len(self._shadows), _CHECKED_AT_ONCE):
            wrong += self._compared(stepper, self._shadows[first : first + _CHECKED_AT_ONCE])
        return wrong

    def _compared(self, stepper: Stepper, shadows: Sequence[tuple[str, Shadow]]) -> list[str]:
        tokens = iter(stepper.run([_request(stepper, shadow) for _, shadow in shadows]).tokens.tolist())
        drawn = [(label, draw, next(tokens)) for label, shadow in shadows for draw in shadow.draws]
        self.checked += len(drawn)
        return [
            f"{label}: drew {draw.token} on row {draw.row}, alone it draws {token}"
            for label, draw, token in drawn
            if draw.token != token
        ]


def _request(stepper: Stepper, shadow: Shadow) -> Request:
    samples = [_sample(draw, shadow.stream) for draw in shadow.draws]
    return Request(stepper.context(), shadow.tokens, samples=samples, masks=_masks(shadow))


def _sample(draw: Draw, stream: int) -> Sample:
    spec = draw.sampler
    return Sample(
        row=draw.row,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        stream=stream if spec.seed is None else spec.seed,
        index=draw.row + 1,
        slot=0,
        epoch=draw.epoch,
    )


def _masks(shadow: Shadow) -> Sequence[Mask]:
    if not shadow.hidden_since:
        return ()
    first = min(shadow.hidden_since.values())
    return [Mask(row, _visible(shadow.hidden_since, row)) for row in range(first, len(shadow.tokens))]


def _visible(hidden_since: dict[int, int], row: int) -> list[tuple[int, int]]:
    """What is not hidden from the row, as ranges."""
    hidden = sorted(each for each, since in hidden_since.items() if since <= row)
    bounds = zip([-1, *hidden], [*hidden, row + 1], strict=True)
    return [(before + 1, after) for before, after in bounds if before + 1 < after]


@dataclass(slots=True)
class Program:
    """One simulated guest with one context; it waits for at most one request."""

    name: str
    context: int
    shadow: Shadow
    waits_for: int | None = None
    received: list[int] = field(default_factory=list)  # of its running generation
    last: tuple[int, SamplerSpec] | None = None  # the token drawn last, and how: what a loop goes on with
    generates: bool = False
    persistence: float = 0.0  # how likely it goes on with its loop
    room: int | None = None  # rows that its context may have, while it manages the pages itself


def some_prompt(random: Random, vocabulary: int) -> list[int]:
    """Prompts that begin alike, so that there is something to share."""
    family = random.randrange(3)
    common = [(family + 5 * place) % vocabulary for place in range(random.choice((0, 8, 16)))]
    return common + [random.randrange(vocabulary) for _ in range(random.randint(1, 9))]
