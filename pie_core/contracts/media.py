"""A media front-end turns the bytes of an image, clip or recording into tensors and knows their token count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

MediaKind = Literal["image", "audio", "video"]


@dataclass(frozen=True, slots=True)
class MediaItem:
    """Decoded and preprocessed media, ready for `Driver.encode_media`."""

    kind: MediaKind
    key: bytes  # digest of the processed tensors, the grid and the front-end's version
    token_count: int  # KV rows
    position_span: int  # how far positions advance
    grid: tuple[int, int, int]  # frames, height, width in patches; zeros where it has no meaning
    tensors: Mapping[str, NDArray[Any]]
    prefix_tokens: tuple[int, ...] = ()
    suffix_tokens: tuple[int, ...] = ()


class MediaFrontend(Protocol):
    """Pure: the same bytes and options give the same item. Runs in a process that may be killed."""

    def decode(self, kind: MediaKind, content: bytes, options: Mapping[str, object]) -> MediaItem:
        """Decodes everything. InvalidRequest on bytes that are not such media, Unsupported on a kind it lacks."""
        ...


@dataclass(frozen=True, slots=True)
class MediaDeclaration:
    """What a media plugin returns from `pie_media`; light: decoders are imported by `load`."""

    name: str
    summary: str
    model_types: tuple[str, ...]
    kinds: tuple[MediaKind, ...]
    load: Callable[[Any], MediaFrontend]  # takes the checkpoint's directory, None where there is none
    version: str = "1"
    api_version: int = 1
