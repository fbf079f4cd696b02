"""Whole generations, for the request level: a loop of one-token steps over pages of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pie_core.contracts.driver import DriverCapabilities, GenerationRequest
from pie_core.contracts.forward import ForwardBatch, ForwardResult, Int32
from pie_core.contracts.generation_step import generation_step, longest_generation
from pie_core.errors import ForwardError, InvalidRequest


def generate(
    request: GenerationRequest, capabilities: DriverCapabilities, run: Callable[[ForwardBatch], ForwardResult]
) -> Int32:
    """The tokens that the explicit loop would draw with `seed` as its stream, without the stop token."""
    longest = longest_generation(capabilities)
    if not 0 < len(request.prompt) <= longest:
        raise InvalidRequest(f"the prompt has {len(request.prompt)} tokens; expected 1 to {longest}")
    tokens: list[int] = []
    chunk, length = request.prompt, 0
    while len(tokens) < request.max_tokens and length + len(chunk) <= longest:
        result = run(generation_step(request, capabilities, chunk, length, turn=len(tokens)))
        if result.failed:
            raise ForwardError(f"the generation failed: {result.failed[0]}")
        length += len(chunk)
        chunk = result.tokens
        if int(chunk.flat[0]) in request.stop_tokens:
            break
        tokens.append(int(chunk.flat[0]))
    return np.array(tokens, np.int32)
