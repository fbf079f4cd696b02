"""The contract suite of media front-ends. Whoever writes one subclasses it in a test module:

class TestMine(MediaFrontendContract):
    def make_frontend(self) -> MediaFrontend: ...
    def examples(self) -> Mapping[MediaKind, tuple[bytes, bytes]]: ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import get_args

import numpy as np
import pytest

from pie_core.contracts.media import MediaFrontend, MediaItem, MediaKind
from pie_core.errors import InvalidRequest, RequestError, Unsupported


class MediaFrontendContract:
    """Pure, complete and fearless: the same bytes give the same item, and bad bytes a typed error."""

    def make_frontend(self) -> MediaFrontend:
        raise NotImplementedError(f"{type(self).__name__}.make_frontend: the front-end to be tested")

    def examples(self) -> Mapping[MediaKind, tuple[bytes, bytes]]:
        """Two different files for every kind that the front-end decodes."""
        raise NotImplementedError(f"{type(self).__name__}.examples: two files for every kind that it decodes")

    @pytest.fixture
    def frontend(self) -> MediaFrontend:
        return self.make_frontend()

    def files(self) -> Iterator[tuple[MediaKind, bytes]]:
        for kind, contents in self.examples().items():
            for content in contents:
                yield kind, content

    def test_an_item_makes_sense(self, frontend: MediaFrontend) -> None:
        for kind, content in self.files():
            item = frontend.decode(kind, content, {})
            assert item.kind == kind
            assert item.key
            assert item.token_count > 0
            assert 0 < item.position_span <= item.token_count
            assert min(item.grid) >= 0
            assert item.tensors
            for tensor in item.tensors.values():
                assert tensor.size > 0
                assert tensor.flags.c_contiguous
                assert np.isfinite(tensor).all()

    def test_the_same_bytes_give_the_same_item(self, frontend: MediaFrontend) -> None:
        for kind, content in self.files():
            first = frontend.decode(kind, content, {})
            for other in (frontend.decode(kind, content, {}), self.make_frontend().decode(kind, content, {})):
                _assert_equal(first, other)

    def test_other_media_have_another_key(self, frontend: MediaFrontend) -> None:
        keys = [frontend.decode(kind, content, {}).key for kind, content in self.files()]
        assert len(set(keys)) == len(keys)

    @pytest.mark.parametrize("content", [b"", b"\0", b"nonsense" * 100, bytes(range(256)) * 20])
    def test_bytes_that_are_no_media_are_refused(self, frontend: MediaFrontend, content: bytes) -> None:
        for kind in self.examples():
            with pytest.raises(InvalidRequest, match=kind):
                frontend.decode(kind, content, {})

    def test_a_file_of_another_kind_is_refused(self, frontend: MediaFrontend) -> None:
        for kind, content in self.files():
            for other in self.examples().keys() - {kind}:
                with pytest.raises(InvalidRequest):
                    frontend.decode(other, content, {})

    @pytest.mark.parametrize("sixteenths", [1, 4, 8, 12, 15])
    def test_a_file_that_is_cut_off_is_refused(self, frontend: MediaFrontend, sixteenths: int) -> None:
        for kind, content in self.files():
            with pytest.raises(InvalidRequest):
                frontend.decode(kind, content[: len(content) * sixteenths // 16], {})

    @pytest.mark.parametrize("seed", range(20))
    def test_a_damaged_file_is_decoded_or_refused_but_never_raises_otherwise(
        self, frontend: MediaFrontend, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        for kind, content in self.files():
            damaged = np.frombuffer(content, np.uint8).copy()
            places = random.integers(0, min(len(damaged), 64), 3)
            damaged[places] = random.integers(0, 256, 3)
            with suppress(RequestError):
                assert frontend.decode(kind, damaged.tobytes(), {}).token_count > 0

    def test_a_kind_that_it_lacks_is_refused(self, frontend: MediaFrontend) -> None:
        for kind in set(get_args(MediaKind)) - self.examples().keys():
            with pytest.raises(Unsupported, match=kind):
                frontend.decode(kind, b"", {})

    def test_an_unknown_option_is_refused(self, frontend: MediaFrontend) -> None:
        for kind, content in self.files():
            with pytest.raises(InvalidRequest, match="no_such_option"):
                frontend.decode(kind, content, {"no_such_option": 1})


def _assert_equal(one: MediaItem, other: MediaItem) -> None:
    assert one.key == other.key
    assert (one.token_count, one.position_span, one.grid) == (
        other.token_count,
        other.position_span,
        other.grid,
    )
    assert (one.prefix_tokens, one.suffix_tokens) == (other.prefix_tokens, other.suffix_tokens)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, other.tensors[name])
