"""The noise of sampling: a counter-based generator that every driver implements, so a seed fixes the tokens.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by a context's stream and
counted by what is drawn. A token is drawn by the Gumbel-max rule: argmax of logit / temperature + gumbel_noise, which
needs no sum over the vocabulary and so does not depend on the order of additions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Float32, UInt32, UInt64

_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds. counter: [..., 4] and key: [..., 2], 32-bit words in 64-bit cells; returns [..., 4] likewise.

    Words 0 and 2 of all counters go through a round together, and so do words 1 and 3.
    """
    ones = (1,) * (counter.ndim - 1)
    even, odd = (np.stack([counter[..., word], counter[..., word + 2]]) for word in (0, 1))
    multipliers = _MULTIPLIERS.reshape(2, *ones)
    keys = (np.moveaxis(key, -1, 0) + _KEY_STEPS.reshape(_ROUNDS, 2, *(1,) * (key.ndim - 1))) & _LOW
    for round_key in keys:
        product = (even * multipliers)[::-1]
        even, odd = (product >> _32) ^ odd ^ round_key, product & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=-1)


def random_words(stream: UInt64, index: UInt32, slot: UInt32, epoch: UInt32, vocab_size: int) -> UInt32:
    """[S, vocab_size] random words: token t takes word t % 4 of the block (t // 4, index, slot, epoch)."""
    blocks = (vocab_size + 3) // 4
    counter = np.empty((len(stream), blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    for word, values in enumerate((index, slot, epoch), start=1):
        counter[..., word] = values.astype(np.uint64)[:, None]
    key = np.stack([stream & _LOW, stream >> _32], axis=-1)[:, None, :]
    words = philox4x32(counter, key).reshape(len(stream), blocks * 4)
    return words[:, :vocab_size].astype(np.uint32)


def gumbel_noise(stream: UInt64, index: UInt32, slot: UInt32, epoch: UInt32, vocab_size: int) -> Float32:
    """[S, vocab_size] standard Gumbel noise from the top 23 bits of each word; always finite."""
    words = random_words(stream, index, slot, epoch, vocab_size)
    uniform = ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    noise: Float32 = np.negative(np.log(np.negative(np.log(uniform))), dtype=np.float32)
    return noise


def column_slots(slot: UInt32, column: int) -> UInt32:
    """The slots that draw one column of tokens of several streams: every column has noise of its own."""
    return slot + np.uint32(column << 16)


def derive_stream(parent: int, branch: int) -> int:
    """The stream of a fork or an opened snapshot: `branch` numbers the children of one parent stream."""
    counter = np.array([branch & 0xFFFFFFFF, (branch >> 32) & 0xFFFFFFFF, 0, 0xF0], np.uint64)
    key = np.array([parent & 0xFFFFFFFF, (parent >> 32) & 0xFFFFFFFF], np.uint64)
    words = philox4x32(counter, key)
    return int(words[0]) | int(words[1]) << 32
