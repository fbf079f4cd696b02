"""One forward pass: tokens in, and at any of their rows tokens drawn and values probed."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wit_world.imports import forward as bindings

from inferlet.errors import InvalidRequest, not_in_this_version
from inferlet.host import call, finish, nanoseconds
from inferlet.sample import Probe, Sampler

if TYPE_CHECKING:
    from wit_world.imports.generate import Generation

    from inferlet.context import Context


@dataclass(frozen=True, slots=True)
class SampleHandle:
    """Where the tokens of one `sample` call stand in the output: `arity` of them from `slot` on."""

    slot: int
    arity: int = 1


@dataclass(frozen=True, slots=True)
class ProbeHandle:
    """Which probe of the pass this is, and of which kind."""

    slot: int
    kind: str


Handle = SampleHandle | ProbeHandle


class Forward:
    """A pass under construction; nothing reaches the engine before `execute`."""

    __slots__ = (
        "_attention_mask",
        "_context",
        "_inputs",
        "_logit_mask",
        "_masks_attention_only",
        "_priority",
        "_probes",
        "_run_ahead",
        "_sampled",
        "_samples",
        "_timeout",
    )

    def __init__(self, context: Context) -> None:
        self._context = context
        self._inputs: list[tuple[list[int], list[int] | None]] = []
        self._samples: list[tuple[list[int], Sampler]] = []
        self._sampled = 0
        self._probes: list[tuple[int, Probe]] = []
        self._logit_mask: list[int] | None = None
        self._attention_mask: list[list[int]] | None = None
        self._masks_attention_only = False
        self._run_ahead = True
        self._timeout: float | None = None
        self._priority: int | None = None

    def start_position(self) -> int:
        """The position that the first `input` token will get."""
        return self._context.position

    def input(self, tokens: Iterable[int]) -> Forward:
        """Adds tokens at the next positions."""
        self._inputs.append((list(tokens), None))
        return self

    def input_at(self, tokens: Iterable[int], positions: Iterable[int]) -> Forward:
        """Adds tokens at positions of the caller's choice."""
        tokens, positions = list(tokens), list(positions)
        if len(tokens) != len(positions):
            raise InvalidRequest(f"input_at: {len(tokens)} tokens but {len(positions)} positions")
        self._inputs.append((tokens, positions))
        return self

    def sample(self, indices: Sequence[int], sampler: Sampler) -> SampleHandle:
        """Draws one token at each of these input rows."""
        handle = SampleHandle(self._sampled, len(indices))
        self._samples.append((list(indices), sampler))
        self._sampled += len(indices)
        return handle

    def probe(self, index: int, probe: Probe) -> ProbeHandle:
        """Asks for a value at this input row; read it with the `Output` method named after the probe."""
        self._probes.append((index, probe))
        return ProbeHandle(len(self._probes) - 1, probe.kind)

    def mask(self, runs: Sequence[int]) -> Forward:
        """Run lengths over the vocabulary for every sampler of this pass, beginning with forbidden."""
        self._logit_mask = list(runs)
        return self

    def attention_mask(
        self, rows: Iterable[Sequence[int]], *, attention_layers_only: bool = False
    ) -> Forward:
        """One row for each input token: run lengths over KV rows, beginning with hidden.

        Models with recurrent layers refuse masks, because these layers take every row in; with
        `attention_layers_only` the mask holds for their attention layers.
        """
        self._attention_mask = [list(row) for row in rows]
        self._masks_attention_only = attention_layers_only
        return self

    def pass_speculation(self, allowed: bool) -> Forward:
        """False: the engine must not guess that the sampled token will be fed back."""
        self._run_ahead = allowed
        return self

    def timeout(self, seconds: float) -> Forward:
        """How long it may take, waiting included; beyond, `execute` raises DeadlineExceeded and nothing has changed."""
        self._timeout = seconds
        return self

    def priority(self, value: int) -> Forward:
        """Instead of the context's; see `Context.set_priority`."""
        self._priority = value
        return self

    def adapter(self, adapter: Any) -> Forward:
        raise not_in_this_version("Forward.adapter")

    def zo_seed(self, seed: int) -> Forward:
        raise not_in_this_version("Forward.zo_seed")

    def input_image(self, image: Any, anchor: int) -> Forward:
        raise not_in_this_version("Forward.input_image")

    def input_audio(self, clip: Any, anchor: int) -> Forward:
        raise not_in_this_version("Forward.input_audio")

    async def execute(self) -> Output:
        """Runs the pass; other tasks of the program run meanwhile. Cancelling the task takes the pass back."""
        pending = call(self._described().execute)
        tokens = await finish(pending.pollable, pending.tokens, pending.cancel)
        return Output(pending, list(tokens))

    def _described(self) -> bindings.ForwardPass:
        described = bindings.ForwardPass(self._context.settled())
        for tokens, positions in self._inputs:
            if positions is None:
                call(described.input, tokens)
            else:
                call(described.input_at, tokens, positions)
        for rows, sampler in self._samples:
            call(described.sample, rows, sampler.handle())
        for row, probe in self._probes:
            probe.attach(described, row)
        self._restrict(described)
        schedule(described, self._timeout, self._priority)
        return described

    def _restrict(self, described: bindings.ForwardPass) -> None:
        if self._logit_mask is not None:
            call(described.logit_mask, self._logit_mask)
        if self._attention_mask is not None:
            call(described.attention_mask, self._attention_mask)
        if self._masks_attention_only:
            call(described.mask_attention_layers_only)
        if not self._run_ahead:
            described.pass_speculation(False)


def schedule(
    described: bindings.ForwardPass | Generation, timeout: float | None, priority: int | None
) -> None:
    """How long it may take, and what it goes before."""
    if timeout is not None:
        call(described.timeout_ns, nanoseconds(timeout))
    if priority is not None:
        call(described.priority, priority)


class Output:
    """The results of one pass. A handle of another kind than the method asks for gives None."""

    __slots__ = ("_drawn", "_pending", "auto_sampler", "tokens")

    def __init__(
        self,
        pending: bindings.PendingPass | None,
        drawn: list[int],
        tokens: list[int] | None = None,
        auto_sampler: SampleHandle | None = None,
    ) -> None:
        self._pending = pending
        self._drawn = drawn
        self.tokens = tokens if tokens is not None else []
        """The tokens that a Generator kept of this step; empty for a pass made with `ctx.forward()`."""
        self.auto_sampler = auto_sampler

    def token(self, handle: Handle) -> int | None:
        """The first token of a `sample` call."""
        drawn = self.tokens_at(handle)
        return drawn[0] if drawn else None

    def tokens_at(self, handle: Handle) -> list[int]:
        """All tokens of a `sample` call, one for each of its rows."""
        if not isinstance(handle, SampleHandle):
            return []
        return self._drawn[handle.slot : handle.slot + handle.arity]

    def distribution(self, handle: Handle) -> tuple[list[int], list[float]] | None:
        """Token ids and their probabilities, most probable first."""
        found = self._values(handle, "distribution")
        return None if found is None else (list(found[0]), list(found[1]))

    def logits(self, handle: Handle) -> bytes | None:
        """Raw logits, float32 little-endian, one for each token of the vocabulary."""
        return self._bytes(handle, "logits")

    def logprobs(self, handle: Handle) -> list[float] | None:
        """Log-probabilities in the order in which the probe named its tokens."""
        found = self._values(handle, "logprobs")
        return None if found is None else list(found[1])

    def entropy(self, handle: Handle) -> float | None:
        found = self._values(handle, "entropy")
        return None if found is None else found[1][0]

    def hidden(self, handle: Handle) -> list[float] | None:
        """The hidden state, one number for each dimension."""
        found = self._bytes(handle, "hidden")
        return None if found is None else floats(found)

    def _values(self, handle: Handle, kind: str) -> tuple[list[int], list[float]] | None:
        if self._pending is None or not isinstance(handle, ProbeHandle) or handle.kind != kind:
            return None
        return call(self._pending.probe, handle.slot)

    def _bytes(self, handle: Handle, kind: str) -> bytes | None:
        if self._pending is None or not isinstance(handle, ProbeHandle) or handle.kind != kind:
            return None
        return base64.b64decode(call(self._pending.probe_bytes, handle.slot))


def floats(data: bytes) -> list[float]:
    """The numbers of a probe that came as bytes."""
    numbers = array.array("f", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
