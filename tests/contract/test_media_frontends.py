"""The media contract over every front-end, and what the dummy's adds to it."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping

import numpy as np
import pytest

from pie_core.contracts.media import MediaFrontend, MediaKind
from pie_core.errors import InvalidRequest
from pie_core.testing.any_media_frontend import MediaFrontendContract
from pie_plugins.drivers.dummy import CHECKPOINT
from pie_plugins.media.dummy import pie_media


def ppm(
    width: int, height: int, seed: int = 0, header: bytes = b"P6\n# made by a test\n%d %d\n255\n"
) -> bytes:
    channels = 3 if header[:2] == b"P6" else 1
    pixels = np.random.default_rng(seed).integers(0, 256, width * height * channels).astype(np.uint8)
    return header % (width, height) + pixels.tobytes()


def wav(samples: int, seed: int = 0, channels: int = 1, sample_bytes: int = 2) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, samples * channels * sample_bytes).astype(np.uint8)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(sample_bytes)
        file.setframerate(16_000)
        file.writeframes(values.tobytes())
    return content.getvalue()


def frontend() -> MediaFrontend:
    (declaration,) = pie_media()
    return declaration.load(CHECKPOINT)


class TestDummyMedia(MediaFrontendContract):
    def make_frontend(self) -> MediaFrontend:
        return frontend()

    def examples(self) -> Mapping[MediaKind, tuple[bytes, bytes]]:
        return {
            "image": (ppm(40, 20), ppm(16, 16, header=b"P5 %d %d 255\n")),
            "audio": (wav(1500), wav(700, 1, 2)),
        }


def test_an_image_has_a_token_for_each_patch_and_spans_its_longer_side() -> None:
    item = frontend().decode("image", ppm(40, 20), {})
    assert (item.grid, item.token_count, item.position_span) == ((1, 2, 3), 6, 3)
    assert item.tensors["patches"].shape == (6, 16 * 16 * 3)
    finer = frontend().decode("image", ppm(40, 20), {"patch_size": 10})
    assert finer.grid == (1, 2, 4)


def test_a_patch_holds_its_own_pixels() -> None:
    content = ppm(32, 16, seed=4)
    pixels = np.frombuffer(content[-32 * 16 * 3 :], np.uint8).reshape(16, 32, 3) / np.float32(255)
    patches = frontend().decode("image", content, {}).tensors["patches"].reshape(2, 16, 16, 3)
    np.testing.assert_array_equal(patches[1], pixels[:, 16:])


def test_a_recording_has_25_tokens_a_second() -> None:
    item = frontend().decode("audio", wav(16_000), {})
    assert (item.token_count, item.position_span) == (25, 25)
    assert frontend().decode("audio", wav(16_001), {}).token_count == 26


def test_media_stand_between_the_tokens_that_the_checkpoint_names() -> None:
    item = frontend().decode("audio", wav(10), {})
    assert (item.prefix_tokens, item.suffix_tokens) == ((3,), (4,))
    (declaration,) = pie_media()
    assert declaration.load(None).decode("audio", wav(10), {}).prefix_tokens == ()


@pytest.mark.parametrize(
    ("kind", "content", "complaint"),
    [
        ("image", b"P6 0 4 255\n", "sides from 1"),
        ("image", b"P6 999999999 999999999 255\n", "cut off"),
        ("image", b"P6 1 1 65535\n" + bytes(6), "maximum 1 to 255"),
        ("audio", wav(8, sample_bytes=1), "8 bits"),
        ("audio", wav(0), "0 samples"),
    ],
)
def test_the_refusal_says_what_was_seen(kind: MediaKind, content: bytes, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        frontend().decode(kind, content, {})


@pytest.mark.parametrize("size", [0, 257, True, "16"])
def test_a_bad_patch_size_is_refused(size: object) -> None:
    with pytest.raises(InvalidRequest, match="patch_size"):
        frontend().decode("image", ppm(4, 4), {"patch_size": size})
