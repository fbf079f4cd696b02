"""The older context: it is filled, and `generate` returns the text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from inferlet.context import Context as EngineContext
from inferlet.errors import not_in_this_version
from inferlet.forward import Forward
from inferlet.generation import Generator
from inferlet.legacy.sampler import AnySampler
from inferlet.legacy.stop_condition import StopCondition
from inferlet.model import Model as EngineModel
from inferlet.sample import Distribution, Sampler

WHOLE_VOCABULARY = 0


class Context:
    """A conversation or text in progress. After a generation, the next turn ends the assistant's first."""

    def __init__(self, context: EngineContext, answered: bool = False) -> None:
        self._context = context
        self._answered = answered

    @classmethod
    def on(cls, model: EngineModel) -> Context:
        return cls(EngineContext(model))

    # Filling

    def fill(self, text: str) -> None:
        """Adds text as it is."""
        self.fill_tokens(self._context.model.tokenizer().encode(text))

    def fill_tokens(self, tokens: Iterable[int]) -> None:
        self._context.append(tokens)

    def fill_token(self, token: int) -> None:
        self._context.append([token])

    def fill_system(self, text: str) -> None:
        self._next_turn().system(text)

    def fill_user(self, text: str) -> None:
        """Adds the user's turn and opens the assistant's."""
        self._next_turn().user(text).cue()

    def fill_user_only(self, text: str) -> None:
        """Adds the user's turn; more of it may follow."""
        self._next_turn().user(text)

    def fill_assistant(self, text: str) -> None:
        self._next_turn().assistant(text)

    def _next_turn(self) -> EngineContext:
        if self._answered:
            self._context.seal()
            self._answered = False
        return self._context

    async def flush(self) -> None:
        await self._context.flush()

    # Branching and reading

    def fork(self) -> Context:
        return Context(self._context.fork(), self._answered)

    def get_token_ids(self) -> list[int]:
        """Every token, written or waiting."""
        return self._context.tokens() + self._context.buffer()

    def get_text(self) -> str:
        return self._context.model.tokenizer().decode(self.get_token_ids())

    # Generating

    async def generate(self, sampler: AnySampler, stop: StopCondition) -> str:
        """The text up to the end that `stop` describes."""
        if isinstance(sampler, Sampler) and stop.stop_tokens() is not None:
            tokens = await self._loop(sampler, stop).collect_tokens()
        else:
            tokens = await self._generate_stepwise(sampler, stop)
        self._answered = True
        return self._context.model.tokenizer().decode(tokens)

    def _loop(self, sampler: Sampler, stop: StopCondition) -> Generator:
        return self._context.generate(
            sampler, max_tokens=stop.max_tokens, stop=stop.stop_tokens(), auto_flush=False
        )

    async def _generate_stepwise(self, sampler: AnySampler, stop: StopCondition) -> list[int]:
        tokens: list[int] = []
        while not stop.check(tokens):
            tokens.append(await self.decode_step(sampler))
            if stop.ending_of(tokens[-1:]) is None:
                self.fill_token(tokens[-1])
        return tokens[: len(tokens) - len(stop.ending_of(tokens) or ())]

    async def decode_step(self, sampler: AnySampler) -> int:
        """Writes what waits and draws the next token, which the caller fills in if it likes it."""
        if not isinstance(sampler, Sampler):
            return sampler.sample(*await self.decode_step_dist())
        step, last_row = self._pass_over_the_buffer()
        handle = step.sample([last_row], sampler)
        return (await step.execute()).tokens_at(handle)[0]

    async def decode_step_dist(self, temperature: float = 1.0) -> tuple[list[int], list[float]]:
        """Writes what waits; token ids and probabilities of what comes next."""
        step, last_row = self._pass_over_the_buffer()
        handle = step.probe(last_row, Distribution(temperature, WHOLE_VOCABULARY))
        found = (await step.execute()).distribution(handle)
        assert found is not None
        return found

    def _pass_over_the_buffer(self) -> tuple[Forward, int]:
        tokens = self._context.drain()
        return self._context.forward().input(tokens), max(0, len(tokens) - 1)

    async def generate_with_beam(self, stop: StopCondition, beam_size: int) -> NoReturn:
        raise not_in_this_version("Context.generate_with_beam")

    async def generate_with_drafter(self, drafter: Any, sampler: AnySampler, stop: StopCondition) -> NoReturn:
        raise not_in_this_version("Context.generate_with_drafter")

    # Attention

    def mask_tokens(self, indices: Iterable[int], masked: bool) -> NoReturn:
        raise not_in_this_version("Context.mask_tokens")

    def mask_token_range(self, start: int, end: int, masked: bool) -> NoReturn:
        raise not_in_this_version("Context.mask_token_range")

    def mask_token(self, index: int, masked: bool) -> NoReturn:
        raise not_in_this_version("Context.mask_token")

    def drop_masked_kv_pages(self) -> NoReturn:
        raise not_in_this_version("Context.drop_masked_kv_pages")

    def set_adapter(self, adapter: Any) -> NoReturn:
        raise not_in_this_version("Context.set_adapter")
