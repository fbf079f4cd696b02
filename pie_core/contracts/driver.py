"""A driver runs one model on one device group: it takes batches, keeps caches, and says what it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.contracts.forward import Float32, ForwardBatch, ForwardResult, Int32
from pie_core.contracts.media import MediaDeclaration, MediaItem
from pie_core.errors import LoadError
from pie_core.ids import Ticket

API_VERSION = 1

CacheKind = Literal["paged", "window", "latent", "state"]


class Feature(StrEnum):
    """What a driver may or may not do; the core refuses, by type, what is not declared."""

    ATTENTION_MASK = "attention-mask"
    NONCAUSAL_MASK = "noncausal-mask"
    LOGIT_MASK = "logit-mask"
    PENALTIES = "penalties"
    LOGIT_BIAS = "logit-bias"
    PROBE_LOGITS = "probe-logits"
    PROBE_DISTRIBUTION = "probe-distribution"
    PROBE_LOGPROBS = "probe-logprobs"
    PROBE_ENTROPY = "probe-entropy"
    PROBE_HIDDEN = "probe-hidden"
    PROBE_COLUMNS = "probe-columns"
    TICKET_TOKENS = "ticket-tokens"  # TokenRefs that name an earlier batch
    TICKET_LENGTHS = "ticket-lengths"  # ForwardBatch.length_tickets
    DRAFTS = "drafts"  # verifies ForwardBatch.num_drafts
    PROPOSALS = "proposals"  # answers ForwardBatch.num_proposals
    ADAPTERS = "adapters"
    MEDIA = "media"
    AUDIO = "audio"
    SWAP = "swap"
    EXPORT = "export"  # export_pages and import_pages


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose cache is kept alike. `unit_bytes` is per token, or per slot for kind "state"."""

    name: str
    kind: CacheKind
    unit_bytes: int
    window: int | None = None  # kind "window": rows older than this are never read again


@dataclass(frozen=True, slots=True)
class CacheSpace:
    """A group as the driver has laid it out. For kind "state", pages are slots and page_size is 1."""

    group: CacheGroup
    page_size: int  # tokens on a page
    num_pages: int
    num_host_pages: int  # swap space; 0 = none


@dataclass(frozen=True, slots=True)
class DriverCapabilities:
    """What the loaded model and driver offer; fixed for the driver's life."""

    driver: str
    architecture: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_batch_tokens: int
    max_batch_requests: int
    cache: tuple[CacheSpace, ...]
    features: frozenset[Feature]
    weights_revision: str  # digest of what was loaded: part of every prefix-cache key
    kv_dtype: str
    position_axes: int = 1  # 1, or 3 for M-RoPE
    streams: int = 1  # token columns; more than 1 for speech, where first columns from vocab_size on are text
    max_in_flight: int = 2  # tickets that may be submitted and not collected
    can_poll: bool = False  # it is a PolledDriver
    step_deadline_s: float = 60.0  # a step that takes longer hangs
    level: Literal["step", "request"] = "step"
    sampling: Literal["core", "engine"] = "core"
    pages: Literal["core", "virtual"] = "core"

    def has(self, feature: Feature) -> bool:
        return feature in self.features


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A whole generation, for drivers of level "request"."""

    prompt: Int32
    max_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


class Driver(Protocol):
    """One loaded model. Calls come from one thread at a time, `collect` possibly from a second one.

    Everything acts in the order of the calls: a copy after a submit sees what that step wrote. A method whose feature
    is not declared is never called.
    """

    @property
    def capabilities(self) -> DriverCapabilities: ...

    def submit(self, batch: ForwardBatch) -> Ticket:
        """Queues a step and returns at once. At most `max_in_flight` tickets are open."""
        ...

    def collect(self, ticket: Ticket) -> ForwardResult:
        """Waits for the step; tickets are collected once each, in order. ForwardError if the whole step failed;
        EngineLost if the device is gone with everything on it, so that only a new process can go on."""
        ...

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies pages or slots inside the device; targets are distinct and no source is a target."""
        ...

    def swap_out(self, group: int, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Copies device pages or slots to host space (Feature.SWAP)."""
        ...

    def swap_in(self, group: int, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        """Copies host space back to device pages or slots (Feature.SWAP)."""
        ...

    def export_pages(self, group: int, pages: Sequence[int]) -> NDArray[np.uint8]:
        """[pages, bytes of a page]: their content, for a snapshot on disk (Feature.EXPORT)."""
        ...

    def import_pages(self, group: int, pages: Sequence[int], content: NDArray[np.uint8]) -> None:
        """The reverse of `export_pages` (Feature.EXPORT)."""
        ...

    def load_adapter(self, adapter_id: int, path: Path) -> None:
        """Makes an adapter usable under this id (Feature.ADAPTERS). Raises LoadError."""
        ...

    def unload_adapter(self, adapter_id: int) -> None: ...

    def encode_media(self, item: MediaItem) -> int:
        """Runs the tower and keeps the rows; the handle for MediaSpans (Feature.MEDIA)."""
        ...

    def release_media(self, handle: int) -> None: ...

    def decode_audio(self, stream: int, codes: Int32, final: bool) -> Float32:
        """Codec frames [n, streams] of an audio stream to PCM in [-1, 1]; state lives until `final` (Feature.AUDIO)."""
        ...

    def generate(self, request: GenerationRequest) -> Int32:
        """A whole generation (level "request" only): the tokens, without the stop token."""
        ...

    def close(self) -> None:
        """Frees the device. Open tickets are dropped. Closing twice is allowed."""
        ...


class PolledDriver(Driver, Protocol):
    """A driver that need not be waited for by a thread: it is asked again and again, on the thread that submits."""

    def is_done(self, ticket: Ticket) -> bool:
        """Whether collecting the oldest open ticket would not wait: it returns or raises at once."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation is; `total` 0 means unknown."""

    label: str
    done: int
    total: int
    unit: str = "B"


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class DriverRequest:
    """Everything a driver needs to load a model."""

    model_path: (
        Path | None
    )  # a Hugging Face directory or a GGUF file; None for drivers that need no checkpoint
    device: str
    options: Any  # an instance of the declaration's options type
    architectures: Mapping[str, ArchitectureDeclaration]
    media: Mapping[str, MediaDeclaration]
    progress: ProgressCallback = field(default=lambda _: None)
    swap_bytes: int = 0  # host memory to swap to, for drivers whose own options do not say how much

    def checkpoint(self, driver: str) -> Path:
        """`model_path`, for a driver that reads one. Raises LoadError."""
        if self.model_path is None:
            raise LoadError(
                f"driver {driver}: no model is configured; name a Hugging Face directory or a GGUF file"
            )
        return self.model_path


@dataclass(frozen=True, slots=True)
class DriverDeclaration:
    """What a driver plugin returns from `pie_drivers`; light: nothing heavy is imported before `load`."""

    name: str
    summary: str
    options: type  # a frozen dataclass of plain fields, each with a default and metadata={"help": …}
    load: Callable[[DriverRequest], Driver]
    requires: tuple[str, ...] = ()  # importable modules that `load` needs
    needs_checkpoint: bool = True
    default_checkpoint: Path | None = None  # text files where the model names no checkpoint
    api_version: int = API_VERSION
