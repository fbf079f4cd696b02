"""One step of the model: a `ForwardBatch` goes in, a `ForwardResult` comes out. Both are arrays; no object per row.

Letters used in the shapes:

    R requests (one context each)      T token rows of all requests, in order of the requests
    S samplers, P probes               G cache groups of the model (see `contracts.driver.CacheGroup`)

A token row is one input token: it writes one KV row and can be sampled or probed. *KV index* counts the rows that a
context has written, whatever their positions (DESIGN: KV length is not position). Ids and counts only: tensors live
below the driver line.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pie_core.ids import Ticket

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

NO_TICKET = -1


def last_accepted(request: int) -> int:
    """The value for `TokenRefs.rows` that means "the last token that this request's verification accepted"."""
    return -1 - request


@dataclass(frozen=True, slots=True)
class TokenRefs:
    """Tokens that are literal, or that an earlier batch samples: step n+1 is queued before step n is known."""

    ids: Int32  # [n] or [n, streams]; ignored where a ticket is named
    tickets: Int64  # [n]; NO_TICKET = literal
    rows: Int32  # [n]; >= 0: that ticket's sampler; < 0: `last_accepted(request)` of that ticket


@dataclass(frozen=True, slots=True)
class PageTable:
    """The pages of one paged, window or latent group. Pages that a context gave up are not listed: holes."""

    indptr: Int32  # [R + 1] into pages
    pages: Int32  # physical page ids
    logical: (
        Int32  # the same length: page `logical[i]` holds KV indexes from logical[i] * page_size; ascending
    )


@dataclass(frozen=True, slots=True)
class StateTable:
    """The slots of one state group. State is read from one slot and written to others, never in place.

    Where `ForwardBatch.length_tickets` is set, the state is read from the slot that the named request wrote after its
    last accepted row; `slots_in` holds only where it wrote none.
    """

    slots_in: Int32  # [R]; -1 = start from the empty state
    out_indptr: Int32  # [R + 1] into the two below
    out_rows: Int32  # row within the request; the state after this row ...
    out_slots: Int32  # ... goes to this slot


@dataclass(frozen=True, slots=True)
class AttentionMasks:
    """Which KV indexes some token rows may read, as run lengths: hidden, visible, hidden, …; past the end is hidden.

    A row that no entry names is causal. A row that is not listed for a group follows its entry for group -1.
    """

    rows: Int32  # [M] token row
    groups: Int32  # [M]; -1 = every group
    causal: Bool  # [M]; True: the mask is intersected with causality
    indptr: Int32  # [M + 1] into runs
    runs: Int32


@dataclass(frozen=True, slots=True)
class Samplers:
    """How tokens are drawn. Order: penalties, bias, logit mask, temperature, top-k, top-p, min-p, then noise.

    Sampler s of a request draws the token at index `index[s]` of the context's token history (0 is the first token);
    where the context's length lives on the device (`ForwardBatch.length_tickets`), `index` counts from the upper bound
    and the device corrects it. Noise is `contracts.sampling.gumbel_noise` of (stream, index, slot, epoch); with several
    streams every column is drawn alike, from `contracts.sampling.column_slots`.
    """

    rows: Int32  # [S] token row
    temperature: Float32  # [S]; 0 = greedy (lowest id wins a tie)
    top_k: Int32  # [S]; 0 = off; among equals the lower id is kept
    top_p: Float32  # [S]; 1 = off; the smallest set of most probable tokens whose sum reaches it
    min_p: Float32  # [S]; 0 = off; keeps tokens at least this fraction as probable as the best
    repetition: Float32  # [S]; 1 = off; seen tokens: logit / r if positive, else logit * r
    presence: Float32  # [S]; 0 = off; subtracted from the logits of seen tokens
    frequency: Float32  # [S]; 0 = off; times the count, subtracted
    stream: UInt64  # [S]
    index: UInt32  # [S]
    slot: UInt32  # [S] number of the sampler among those of its token row
    epoch: UInt32  # [S] how often the context was truncated
    history_indptr: Int32  # [S + 1] into the two below; empty where penalties are off
    history: TokenRefs  # the tokens seen so far; a sampler behind a rejected draft counts for nothing ...
    history_counts: Int32  # ... and how often (entries may name one token twice: counts add up)
    bias_indptr: Int32  # [S + 1] into the two below
    bias_tokens: Int32
    bias_values: Float32
    mask_index: Int32  # [S]; row of logit_masks, or -1
    logit_masks: UInt32  # [L, ceil(vocab / 32)]; bit i % 32 of word i // 32 allows token i


class ProbeKind(IntEnum):
    """With several streams, LOGITS to ENTROPY are of the first column."""

    LOGITS = 0  # [vocab] values, as the model gives them
    DISTRIBUTION = 1  # k token ids and their probabilities after temperature, most probable first
    LOGPROBS = 2  # natural-log probabilities of the named tokens, temperature 1
    ENTROPY = 3  # one value, nats, temperature 1
    HIDDEN = 4  # [hidden_size] the last normalized hidden state
    # [streams * vocab] the logits of every column of the next token, each given the columns before it: those that the
    # probe names, from the first on, and behind them the most probable. What greedy samplers draw, if none is named.
    COLUMNS = 5


@dataclass(frozen=True, slots=True)
class Probes:
    """Values read at token rows, from the model's own logits: no penalty, bias or mask."""

    rows: Int32  # [P] token row
    kinds: UInt8  # [P] ProbeKind
    temperature: Float32  # [P]; DISTRIBUTION only
    k: Int32  # [P]; DISTRIBUTION only; 0 = the whole vocabulary
    token_indptr: Int32  # [P + 1] into tokens; LOGPROBS and COLUMNS only
    tokens: Int32


@dataclass(frozen=True, slots=True)
class MediaSpans:
    """Token rows whose embeddings come from encoded media."""

    rows: Int32  # [M] first token row
    handles: Int64  # [M] what Driver.encode_media returned
    offsets: Int32  # [M] first row inside the encoded media
    lengths: Int32  # [M]


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """Runs of adjacent requests that share their first pages, so that a driver can read those once for all of them.

    The named KV rows lie on the same whole pages in every paged and latent group, are all listed (no holes), and were
    written before this step. Every request is in one group at most. Ignoring the groups is correct.
    """

    first: Int32  # [P] first request; ascending
    stop: Int32  # [P] one behind the last: two requests or more
    rows: Int32  # [P] KV rows that are shared, from the first one on

    @property
    def saved_rows(self) -> int:
        """How many rows are not read once more where every group is read once."""
        return int(np.sum((self.stop - self.first - 1) * self.rows))


_NONE: Int32 = np.empty(0, np.int32)
NO_PREFIX_GROUPS = PrefixGroups(_NONE, _NONE, _NONE)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step for R contexts: immutable, complete, and independent of the driver."""

    context_ids: Int64  # [R] stable identity, for drivers that keep pages of their own
    indptr: Int32  # [R + 1] token rows of each request
    tokens: TokenRefs  # [T]
    positions: Int32  # [T] or [T, 3]
    kv_lengths: Int32  # [R] rows written before this step; the upper bound where length_tickets is set
    length_tickets: Int64  # [R]; NO_TICKET = known
    length_requests: (
        Int32  # [R] ... the length that this request of that ticket ends with; positions shift alike
    )
    cache: tuple[PageTable | StateTable, ...]  # [G]
    masks: AttentionMasks
    samplers: Samplers
    probes: Probes
    num_drafts: Int32  # [R] how many of the request's last rows are drafts to verify
    num_proposals: Int32  # [R] how many drafts the driver shall propose for the next step
    adapter_ids: Int32  # [R]; -1 = none
    adapter_scales: Float32  # [R]
    media: MediaSpans
    prefixes: PrefixGroups = NO_PREFIX_GROUPS

    @property
    def num_requests(self) -> int:
        return len(self.context_ids)

    @property
    def num_tokens(self) -> int:
        return int(self.indptr[-1])


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What one step gave. A request in `failed` has undefined entries everywhere else."""

    ticket: Ticket
    tokens: Int32  # [S] or [S, streams]
    accepted: (
        Int32  # [R] drafts accepted: draft i is, if all before are and the token sampled before it equals it
    )
    draft_indptr: Int32  # [R + 1] into draft_tokens: proposals for the next step
    draft_tokens: Int32
    probe_indptr: Int64  # [P + 1] into probe_values
    probe_values: Float32
    probe_token_indptr: Int64  # [P + 1] into probe_tokens; DISTRIBUTION only
    probe_tokens: Int32
    failed: dict[int, str]  # request -> cause; empty as a rule
    busy_s: float  # how long the device worked on it
