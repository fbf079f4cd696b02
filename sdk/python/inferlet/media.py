"""Images, audio and video as input. This version has none of it yet."""

from __future__ import annotations

from typing import NoReturn

from inferlet.errors import not_in_this_version
from inferlet.model import Model


class Image:
    """A decoded picture."""

    @classmethod
    def from_bytes(cls, model: Model, data: bytes) -> NoReturn:
        raise not_in_this_version("Image.from_bytes")


class Video:
    """Frames of a decoded film."""

    @classmethod
    def from_bytes(cls, model: Model, data: bytes, max_frames: int) -> NoReturn:
        raise not_in_this_version("Video.from_bytes")


class Audio:
    """A decoded recording."""

    @classmethod
    def from_bytes(cls, model: Model, data: bytes) -> NoReturn:
        raise not_in_this_version("Audio.from_bytes")
