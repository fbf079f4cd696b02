"""Small kernels that show what the fused sampler uses inside: random words, noise, the logarithm."""

# Triton is a language of its own: arguments are typed by what is passed, constants are written in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pie_plugins.drivers.cuda_native.step_tensors import StepTensors
from pie_plugins.drivers.cuda_native.triton_sampling import accurate_log, gumbel, random_words

BLOCK = 128


@triton.jit
def _noise_kernel(low, high, index, slot, epoch, words, noise, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    key_low, key_high, counter = tl.load(low + row), tl.load(high + row), tl.load(index + row)
    slots, epochs = tl.load(slot + row), tl.load(epoch + row)
    at = tl.arange(0, BLOCK)
    found = random_words(0, counter, slots, epochs, key_low, key_high, BLOCK)
    tl.store(words + row * vocab_size + at, found.to(tl.int32, bitcast=True), mask=at < vocab_size)
    drawn = gumbel(0, counter, slots, epochs, key_low, key_high, BLOCK)
    tl.store(noise + row * vocab_size + at, drawn, mask=at < vocab_size)


@triton.jit
def _log_kernel(values, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + at, mask=at < count, other=1.0)
    tl.store(out + at, accurate_log(x), mask=at < count)


def fused_noise(step: StepTensors, vocab_size: int) -> tuple[Tensor, Tensor]:
    rows = step.sizes.samplers
    words = step.index.new_zeros((rows, vocab_size))
    noise = torch.zeros(words.shape, device=words.device)
    _noise_kernel[(rows,)](
        step.stream_low,
        step.stream_high,
        step.index,
        step.slot,
        step.epoch,
        words,
        noise,
        vocab_size,
        BLOCK=BLOCK,
    )
    return words, noise


def fused_log(values: Tensor) -> Tensor:
    out = torch.empty_like(values)
    _log_kernel[(triton.cdiv(len(values), BLOCK),)](values, out, len(values), BLOCK=BLOCK)
    return out
