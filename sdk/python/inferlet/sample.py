"""How tokens are drawn (Sampler) and what else a pass can be asked for at a row (probes)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypedDict, Unpack

from wit_world.imports import forward as bindings

from inferlet.errors import not_in_this_version
from inferlet.host import call


class Additions(TypedDict, total=False):
    """What every factory of Sampler takes besides its own arguments."""

    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None


@dataclass(frozen=True, slots=True)
class Sampler:
    """How one token is drawn from a row's logits. Made by the factories below; 0 temperature is greedy.

    Penalties and bias come first, then temperature, top-k, top-p and min-p.
    """

    temperature: float = 0.0
    top_k_limit: int = 0
    top_p_mass: float = 1.0
    min_p_ratio: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    _made: list[bindings.Sampler] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def argmax(cls, **additions: Unpack[Additions]) -> Sampler:
        """The most probable token."""
        return cls(**additions)

    @classmethod
    def top_p(cls, temperature: float = 0.6, p: float = 0.95, **additions: Unpack[Additions]) -> Sampler:
        """From the smallest set of tokens whose probabilities add up to p."""
        return cls(temperature, top_p_mass=p, **additions)

    @classmethod
    def top_k(cls, temperature: float = 0.6, k: int = 40, **additions: Unpack[Additions]) -> Sampler:
        """From the k most probable tokens."""
        return cls(temperature, top_k_limit=k, **additions)

    @classmethod
    def min_p(cls, temperature: float = 0.6, p: float = 0.1, **additions: Unpack[Additions]) -> Sampler:
        """From the tokens at least p times as probable as the best one."""
        return cls(temperature, min_p_ratio=p, **additions)

    @classmethod
    def top_k_top_p(
        cls, temperature: float = 0.6, k: int = 40, p: float = 0.95, **additions: Unpack[Additions]
    ) -> Sampler:
        """From the k most probable tokens, cut to the smallest set that adds up to p."""
        return cls(temperature, top_k_limit=k, top_p_mass=p, **additions)

    @classmethod
    def multinomial(cls, temperature: float = 1.0, draws: int = 1, **additions: Unpack[Additions]) -> Sampler:
        """From all tokens."""
        if draws != 1:
            raise not_in_this_version(f"Sampler.multinomial(draws={draws}): one draw a row; sample more rows")
        return cls(temperature, **additions)

    def handle(self) -> bindings.Sampler:
        """The host's sampler, made on first use."""
        if not self._made:
            self._made.append(self._build())
        return self._made[0]

    def _build(self) -> bindings.Sampler:
        made = bindings.Sampler()
        call(made.temperature, self.temperature)
        if self.top_k_limit:
            call(made.top_k, self.top_k_limit)
        if self.top_p_mass != 1.0:
            call(made.top_p, self.top_p_mass)
        if self.min_p_ratio:
            call(made.min_p, self.min_p_ratio)
        self._add_corrections(made)
        return made

    def _add_corrections(self, made: bindings.Sampler) -> None:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if penalties != (1.0, 0.0, 0.0):
            call(made.penalties, *penalties)
        if self.logit_bias:
            call(made.logit_bias, list(self.logit_bias), list(self.logit_bias.values()))
        if self.seed is not None:
            call(made.seed, self.seed)


@dataclass(frozen=True, slots=True)
class Logits:
    """Raw logits of the row."""

    kind: ClassVar[str] = "logits"

    def attach(self, target: bindings.ForwardPass, row: int) -> None:
        call(target.probe_logits, row)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The k most probable tokens and their probabilities after temperature; k = 0 is the whole vocabulary."""

    temperature: float = 1.0
    k: int = 0

    kind: ClassVar[str] = "distribution"

    def attach(self, target: bindings.ForwardPass, row: int) -> None:
        call(target.probe_distribution, row, self.temperature, self.k)


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural-log probability of one token."""

    token: int

    kind: ClassVar[str] = "logprobs"

    def attach(self, target: bindings.ForwardPass, row: int) -> None:
        call(target.probe_logprobs, row, [self.token])


@dataclass(frozen=True, slots=True, init=False)
class Logprobs:
    """The natural-log probabilities of several tokens."""

    tokens: tuple[int, ...]

    kind: ClassVar[str] = "logprobs"

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        object.__setattr__(self, "tokens", tuple(tokens))

    def attach(self, target: bindings.ForwardPass, row: int) -> None:
        call(target.probe_logprobs, row, list(self.tokens))


@dataclass(frozen=True, slots=True)
class Entropy:
    """The entropy of the next-token distribution, in nats."""

    kind: ClassVar[str] = "entropy"

    def attach(self, target: bindings.ForwardPass, row: int) -> None:
        call(target.probe_entropy, row)


@dataclass(frozen=True, slots=True)
class Hidden:
    """The last layer's normalized hidden state."""

    kind: ClassVar[str] = "hidden"

    def attach(self, target: bindings.ForwardPass, row: int) -> None:
        call(target.probe_hidden, row)


Probe = Logits | Distribution | Logprob | Logprobs | Entropy | Hidden
