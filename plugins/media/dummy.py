"""The media front-end of the dummy model: PPM and PGM images and WAV recordings, cut into patches and frames.

An image is cut into squares of `patch_size` pixels, one KV row each, and advances positions by its longer side in
patches, as models with positions of three axes do. A recording has one KV row for every 40 ms.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import wave
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pie_core.contracts.forward import Float32
from pie_core.contracts.media import MediaDeclaration, MediaFrontend, MediaItem, MediaKind
from pie_core.errors import InvalidRequest, LoadError, Unsupported
from pie_core.hookspecs import hookimpl

VERSION = "1"
PATCH_SIZE = 16
ROWS_PER_SECOND = 25

# Magic, width, height and maximum, between them blanks and comments; one blank; then the pixels.
_BLANK = rb"(?:\s|#[^\n]*\n)+"
_NETPBM = re.compile(rb"P([56])" + (_BLANK + rb"(\d{1,9})") * 3 + rb"\s")


# What `wave` raises on damaged files, by accident for the most part.
_WAVE_ERRORS = (wave.Error, EOFError, RuntimeError, ArithmeticError, ValueError, struct.error)


class DummyMedia:
    """Decodes with the standard library; `prefix` and `suffix` are the checkpoint's tokens around media."""

    def __init__(self, prefix: tuple[int, ...] = (), suffix: tuple[int, ...] = ()) -> None:
        self._prefix = prefix
        self._suffix = suffix

    def decode(self, kind: MediaKind, content: bytes, options: Mapping[str, object]) -> MediaItem:
        if kind == "image":
            item = _image(content, _patch_size(options))
        elif kind == "audio":
            _no_options(options)
            item = _audio(content)
        else:
            raise Unsupported(f"media front-end 'dummy' decodes images and audio; asked for is {kind}")
        return replace(item, prefix_tokens=self._prefix, suffix_tokens=self._suffix)


def _image(content: bytes, patch_size: int) -> MediaItem:
    pixels = _pixels(content)
    height, width = (-(-side // patch_size) for side in pixels.shape[:2])
    padding = (
        (0, height * patch_size - pixels.shape[0]),
        (0, width * patch_size - pixels.shape[1]),
        (0, 0),
    )
    padded = np.pad(pixels, padding)
    patches = padded.reshape(height, patch_size, width, patch_size, 3).swapaxes(1, 2)
    tensor = np.ascontiguousarray(patches.reshape(height * width, -1))
    return _item("image", tensor, (1, height, width), max(height, width))


def _pixels(content: bytes) -> Float32:
    """[height, width, 3] in [0, 1]."""
    header = _NETPBM.match(content)
    if header is None:
        raise InvalidRequest(
            f"image: begins with {content[:8]!r}; expected a binary PPM (P6) or PGM (P5) file with width, height and"
            " maximum"
        )
    magic, width, height, maximum = (int(number) for number in header.groups())
    if not (width and height and 0 < maximum < 256):
        raise InvalidRequest(
            f"image: {width} x {height} pixels up to {maximum}; expected sides from 1, maximum 1 to 255"
        )
    channels, body = (3 if magic == 6 else 1), content[header.end() :]
    if len(body) < width * height * channels:
        raise InvalidRequest(
            f"image: ends after {len(body)} of {width * height * channels} bytes of pixels; the file is cut off"
        )
    values = np.frombuffer(body, np.uint8, width * height * channels).reshape(height, width, channels)
    return np.broadcast_to(values.astype(np.float32) / np.float32(maximum), (height, width, 3))


def _audio(content: bytes) -> MediaItem:
    samples, rate = _samples(content)
    per_row = max(rate // ROWS_PER_SECOND, 1)
    rows = -(-len(samples) // per_row)
    tensor = np.pad(samples, (0, rows * per_row - len(samples))).reshape(rows, per_row)
    return _item("audio", tensor, (0, 0, 0), rows)


def _samples(content: bytes) -> tuple[Float32, int]:
    """[samples] of all channels' mean in [-1, 1], and how many make a second."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            channels, width, rate, count = file.getparams()[:4]
            frames = file.readframes(count)
    except _WAVE_ERRORS as error:
        raise InvalidRequest(f"audio: not a PCM WAV file ({error}); begins with {content[:12]!r}") from error
    if width != 2 or not count or not 1_000 <= rate <= 384_000:
        raise InvalidRequest(
            f"audio: {count} samples of {8 * width} bits, {rate} a second; expected some, of 16 bits, 1000 to 384000"
        )
    if len(frames) < count * channels * width:
        raise InvalidRequest(
            f"audio: ends after {len(frames)} of {count * channels * width} bytes of samples; the file is cut off"
        )
    values = np.frombuffer(frames, "<i2").reshape(count, channels)
    return values.mean(axis=1, dtype=np.float32) / np.float32(32768), rate


def _item(kind: MediaKind, tensor: NDArray[Any], grid: tuple[int, int, int], position_span: int) -> MediaItem:
    digest = hashlib.sha256(f"dummy-media {VERSION} {kind} {grid} {tensor.shape}".encode())
    digest.update(tensor.tobytes())
    return MediaItem(kind, digest.digest(), len(tensor), position_span, grid, {"patches": tensor})


def _patch_size(options: Mapping[str, object]) -> int:
    _no_options({name: value for name, value in options.items() if name != "patch_size"})
    size = options.get("patch_size", PATCH_SIZE)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 256:
        raise InvalidRequest(f"option patch_size is {size!r}; expected 1 to 256")
    return size


def _no_options(options: Mapping[str, object]) -> None:
    if options:
        raise InvalidRequest(
            f"unknown option {next(iter(options))!r}; media front-end 'dummy' knows patch_size, of images"
        )


def _load(checkpoint: Path | None) -> MediaFrontend:
    if checkpoint is None or not (checkpoint / "config.json").is_file():
        return DummyMedia()
    config = json.loads((checkpoint / "config.json").read_text())
    return DummyMedia(_token(config, "media_start_token_id"), _token(config, "media_end_token_id"))


def _token(config: Mapping[str, object], key: str) -> tuple[int, ...]:
    """The token as a sequence; none where the model has none."""
    token = config.get(key)
    if token is not None and not isinstance(token, int):
        raise LoadError(f"config.json: {key} is {token!r}; expected a token id")
    return () if token is None else (token,)


@hookimpl
def pie_media() -> Sequence[MediaDeclaration]:
    return [
        MediaDeclaration(
            name="dummy",
            summary="PPM and PGM images and WAV recordings, for the dummy model",
            model_types=("dummy",),
            kinds=("image", "audio"),
            load=_load,
            version=VERSION,
        )
    ]
