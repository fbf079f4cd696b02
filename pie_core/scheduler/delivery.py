"""A ForwardResult back to the passes of its step: rows become written, outputs go where they were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pie_core.contracts.forward import ForwardResult
from pie_core.engine.messages import ForwardDone, Generated, ProbeValues
from pie_core.scheduler.request import Chunk, Generation, Pass


def record_step(
    chunks: Sequence[Chunk],
    result: ForwardResult,
    checkpoint_tokens: int,
    max_checkpoints: int,
) -> None:
    """Notes on every pass what the step gave it; chunks of failed requests are left alone."""
    tokens: list[int] = result.tokens.tolist()
    drawn = probed = 0
    for request, chunk in enumerate(chunks):
        first_sample, first_probe = drawn, probed
        drawn += chunk.samples.stop - chunk.samples.start
        probed += chunk.probes.stop - chunk.probes.start
        running = chunk.running
        if request in result.failed or running.dropped:
            continue
        if running.ended is not None:  # an earlier step of it may have failed: its rows mean nothing
            running.context.pages.abort()
            continue
        if running.samples is not None:
            places = running.samples.order[chunk.samples]
            running.tokens.update(zip(places, tokens[first_sample:drawn], strict=True))
            if running.predictable and chunk.is_last:
                running.drawn = running.tokens[0]
        if running.probes is not None:
            _record_probes(running, chunk, result, first_probe)
        if running.request is not None:
            _write_rows(chunk, int(result.accepted[request]))
            _keep_state(chunk, checkpoint_tokens, max_checkpoints)


def _record_probes(running: Pass, chunk: Chunk, result: ForwardResult, first: int) -> None:
    assert running.probes is not None
    for probe, place in enumerate(running.probes.order[chunk.probes], start=first):
        low, high = result.probe_indptr[probe : probe + 2]
        low_token, high_token = result.probe_token_indptr[probe : probe + 2]
        running.probed[place] = ProbeValues(
            token_ids=result.probe_tokens[low_token:high_token].tolist(),
            values=np.ascontiguousarray(result.probe_values[low:high], "<f4").tobytes(),
        )


def _write_rows(chunk: Chunk, accepted: int) -> None:
    """The rows of the chunk have their KV now, but for the drafts that were rejected."""
    running, context = chunk.running, chunk.running.context
    stop = chunk.stop
    if running.num_drafts and chunk.is_last:
        stop -= running.num_drafts - accepted
        _forget_samples_behind(running, stop)
    context.pages.finish(stop)
    context.written = stop
    if stop < chunk.stop:
        context.rewind(stop)
    context.free_evicted()


def write_guess(running: Pass) -> None:
    """A guess that is computed has been claimed: its row counts."""
    running.context.pages.finish(running.stop)
    running.context.written = running.stop


def _forget_samples_behind(running: Pass, stop: int) -> None:
    samples = running.samples
    assert samples is not None
    for row, place in zip(samples.rows, samples.order, strict=True):
        if row >= stop:
            running.tokens.pop(place, None)


def _keep_state(chunk: Chunk, checkpoint_tokens: int, max_checkpoints: int) -> None:
    """Recurrent models: the state behind a prompt, and every so many tokens, is worth going back to."""
    many = chunk.stop - chunk.start > 1
    if many or chunk.stop // checkpoint_tokens != chunk.start // checkpoint_tokens:
        chunk.running.context.pages.checkpoint(max_checkpoints)


def forward_done(running: Pass) -> ForwardDone:
    assert running.request is not None
    return ForwardDone(
        request=running.request,
        tokens=[running.tokens[place] for place in sorted(running.tokens)],
        probes=[running.probed[place] for place in sorted(running.probed)],
        length=running.context.length,
        position=running.context.position,
    )


def continue_generation(running: Pass, generation: Generation) -> str | None:
    """Takes the token that was drawn: it is the next row, or the end. Why it ends, if it does."""
    token = running.tokens[0]
    if token in generation.stop_tokens:
        return "stop"
    generation.generated += 1
    running.context.history.append(token)
    return "length" if generation.generated == generation.max_tokens else None


def generated(running: Pass, fresh: int, finish: str | None) -> Generated:
    """The latest `fresh` tokens, or all of them where the program wants only these."""
    context, generation = running.context, running.generation
    assert generation is not None
    first = generation.start if generation.whole else context.length - fresh
    tokens = context.history.tokens[first:].tolist()
    assert running.request is not None
    return Generated(
        request=running.request,
        tokens=tokens,
        finish=finish,
        length=context.length,
        position=context.position,
    )
