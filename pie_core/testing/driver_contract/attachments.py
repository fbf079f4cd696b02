"""The contract of adapters, media and audio."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pie_core.contracts.driver import Driver, Feature
from pie_core.contracts.media import MediaItem
from pie_core.errors import LoadError
from pie_core.testing.batches import Media, Request, Stepper
from pie_core.testing.driver_contract.subject import Answer, DriverSubject


class AdapterContract(DriverSubject):
    @pytest.fixture
    def adapted(self, stepper: Stepper, tmp_path: Path) -> Stepper:
        """Adapters 7 and 8 are loaded."""
        self.needs(stepper.driver, Feature.ADAPTERS)
        for adapter_id, path in zip((7, 8), self.adapter_paths(tmp_path), strict=True):
            stepper.driver.load_adapter(adapter_id, path)
        return stepper

    def with_adapter(self, stepper: Stepper, adapter: int, scale: float = 1.0) -> Answer:
        prompt = self.prompt(stepper.driver, 9)
        return self.ask(stepper, stepper.context(), prompt, adapter=adapter, adapter_scale=scale)

    def test_every_adapter_and_scale_answers_differently(self, adapted: Stepper) -> None:
        settings = [(-1, 1.0), (7, 1.0), (8, 1.0), (7, 0.5), (7, -1.0)]
        answers = [self.with_adapter(adapted, *setting) for setting in settings]
        for place, answer in enumerate(answers):
            assert not any(self.same(answer, other) for other in answers[:place])
            assert self.same(self.with_adapter(adapted, *settings[place]), answer)

    def test_an_adapter_at_scale_zero_adds_nothing(self, adapted: Stepper) -> None:
        assert self.same(self.with_adapter(adapted, 7, 0.0), self.with_adapter(adapted, -1))

    def test_many_adapters_share_a_batch(self, adapted: Stepper) -> None:
        settings = [(8, 1.0), (-1, 1.0), (7, 1.0), (7, 0.5), (8, 1.0)]
        prompt = self.prompt(adapted.driver, 9)
        answers = self.ask_all(
            adapted,
            [Request(adapted.context(), prompt, adapter=a, adapter_scale=scale) for a, scale in settings],
        )
        for setting, answer in zip(settings, answers, strict=True):
            assert self.same(answer, self.with_adapter(adapted, *setting))

    def test_what_an_adapter_wrote_stays_written(self, adapted: Stepper) -> None:
        prompt, answers = self.prompt(adapted.driver, 9), []
        for adapter in (-1, 7):
            context = adapted.context()
            adapted.run([Request(context, prompt[:8], adapter=adapter)])
            answers.append(self.ask(adapted, context, prompt[8:]))
        assert not self.same(answers[0], answers[1])

    def test_an_id_can_be_given_again(self, adapted: Stepper, tmp_path: Path) -> None:
        expected = self.with_adapter(adapted, 8)
        adapted.driver.unload_adapter(7)
        adapted.driver.load_adapter(7, self.adapter_paths(tmp_path)[1])
        assert self.same(self.with_adapter(adapted, 7), expected)

    def test_a_request_for_an_unloaded_adapter_fails_alone(self, adapted: Stepper) -> None:
        adapted.driver.unload_adapter(7)
        prompt = self.prompt(adapted.driver, 9)
        expected = self.with_adapter(adapted, 8)
        requests = [Request(adapted.context(), prompt, adapter=adapter) for adapter in (8, 7)]
        result = adapted.run([self.asking(request, adapted.driver) for request in requests])
        assert list(result.failed) == [1]
        assert "7" in result.failed[1]
        assert self.same(self.answer(adapted.driver, replace(result, failed={}), 0, 1), expected)

    def test_an_adapter_that_is_not_there_is_refused(self, driver: Driver, tmp_path: Path) -> None:
        self.needs(driver, Feature.ADAPTERS)
        with pytest.raises(LoadError, match="no-such-adapter"):
            driver.load_adapter(9, tmp_path / "no-such-adapter")


class MediaContract(DriverSubject):
    @pytest.fixture
    def seeing(self, stepper: Stepper) -> Stepper:
        self.needs(stepper.driver, Feature.MEDIA)
        return stepper

    def with_media(
        self, stepper: Stepper, item: MediaItem, handle: int, chunks: tuple[int, ...], filler: int = 0
    ) -> Answer:
        """Two tokens, the item, two tokens; fed in chunks."""
        edge = self.prompt(stepper.driver, 4)
        media_token = edge[0] if filler == 0 else self.other_token(stepper.driver, edge[0])
        tokens = [*edge[:2], *[media_token] * item.token_count, *edge[2:]]
        context, start = stepper.context(), 0
        for size in (*chunks, len(tokens) - sum(chunks)):
            spans = _spans_of(handle, item.token_count, start, size)
            answer = self.ask(stepper, context, tokens[start : start + size], media=spans)
            start += size
        return answer

    def test_media_decide_and_the_tokens_in_their_place_do_not(self, seeing: Stepper) -> None:
        one, two = self.media_items()
        handles = [seeing.driver.encode_media(item) for item in (one, two, one)]
        assert len(set(handles)) == 3
        answers = [self.with_media(seeing, one, handle, ()) for handle in handles]
        assert not self.same(answers[0], answers[1])
        assert self.same(answers[0], answers[2])
        assert self.same(self.with_media(seeing, one, handles[0], (), filler=1), answers[0])

    @pytest.mark.parametrize("chunks", [(3,), (2, 1), (1, 2, 2), (5,)])
    def test_media_in_chunks_are_the_whole_media(self, seeing: Stepper, chunks: tuple[int, ...]) -> None:
        item, _ = self.media_items()
        handle = seeing.driver.encode_media(item)
        whole = self.with_media(seeing, item, handle, ())
        assert self.same(self.with_media(seeing, item, handle, chunks), whole)

    def test_the_offset_decides(self, seeing: Stepper) -> None:
        item, _ = self.media_items()
        handle = seeing.driver.encode_media(item)
        prompt = self.prompt(seeing.driver, 4)
        answers = [
            self.ask(seeing, seeing.context(), prompt, media=[Media(1, handle, offset, 2)])
            for offset in (0, 1)
        ]
        assert not self.same(answers[0], answers[1])

    def test_a_request_for_released_media_fails_alone(self, seeing: Stepper) -> None:
        item, other = self.media_items()
        gone, kept = seeing.driver.encode_media(item), seeing.driver.encode_media(other)
        seeing.driver.release_media(gone)
        prompt = self.prompt(seeing.driver, 4)
        expected = self.ask(seeing, seeing.context(), prompt, media=[Media(1, kept, 0, 2)])
        requests = [
            self.asking(Request(seeing.context(), prompt, media=[Media(1, handle, 0, 2)]), seeing.driver)
            for handle in (kept, gone)
        ]
        result = seeing.run(requests)
        assert list(result.failed) == [1]
        assert self.same(self.answer(seeing.driver, replace(result, failed={}), 0, 1), expected)


class AudioContract(DriverSubject):
    def codes(
        self, driver: Driver, frames: int, seed: int = 0
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        shape = (frames, driver.capabilities.streams)
        return np.random.default_rng(seed).integers(0, driver.capabilities.vocab_size, shape).astype(np.int32)

    def test_audio_in_chunks_is_the_whole_audio(self, driver: Driver) -> None:
        self.needs(driver, Feature.AUDIO)
        codes = self.codes(driver, 7)
        whole = driver.decode_audio(1, codes, True)
        chunks = [
            driver.decode_audio(2, codes[start:end], end == 7) for start, end in ((0, 1), (1, 5), (5, 7))
        ]
        assert whole.dtype == np.float32
        assert len(whole) > 0
        assert float(np.abs(whole).max()) <= 1
        assert self.same(np.concatenate(chunks), whole)

    def test_audio_streams_do_not_disturb_each_other(self, driver: Driver) -> None:
        self.needs(driver, Feature.AUDIO)
        one, two = self.codes(driver, 4), self.codes(driver, 4, seed=1)
        expected = driver.decode_audio(1, one, True)
        parts = []
        for frame in range(4):
            last = frame == 3
            parts.append(driver.decode_audio(1, one[frame : frame + 1], last))
            driver.decode_audio(2, two[frame : frame + 1], last)
        assert self.same(np.concatenate(parts), expected)
        assert not self.same(driver.decode_audio(1, two, True), expected)

    def test_a_finished_audio_stream_starts_anew(self, driver: Driver) -> None:
        self.needs(driver, Feature.AUDIO)
        codes = self.codes(driver, 3)
        first = driver.decode_audio(5, codes, True)
        assert self.same(driver.decode_audio(5, codes, False), first)
        assert not self.same(driver.decode_audio(5, codes, True), first)


def _spans_of(handle: int, length: int, start: int, size: int) -> list[Media]:
    """The part of an item at tokens 2 to 2 + length that rows start to start + size cover."""
    low, high = max(2, start), min(2 + length, start + size)
    return [Media(low - start, handle, low - 2, high - low)] if low < high else []
