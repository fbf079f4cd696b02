"""The contract of failure, refusal and the end; and of whole generations, for drivers of level "request"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pie_core.contracts.driver import Driver, Feature, GenerationRequest
from pie_core.contracts.media import MediaItem
from pie_core.errors import ForwardError, PieError, Unsupported
from pie_core.testing.batches import Request, Sample, Stepper
from pie_core.testing.driver_contract.subject import DriverSubject

_ITEM = MediaItem("image", b"key", 4, 4, (1, 2, 2), {"pixels": np.zeros(4, np.float32)})
_BYTES = np.zeros((1, 16), np.uint8)
_METHODS: list[tuple[Feature, Callable[[Driver], object]]] = [
    (Feature.SWAP, lambda driver: driver.swap_out(0, [0], [0])),
    (Feature.SWAP, lambda driver: driver.swap_in(0, [0], [0])),
    (Feature.EXPORT, lambda driver: driver.export_pages(0, [0])),
    (Feature.EXPORT, lambda driver: driver.import_pages(0, [0], _BYTES)),
    (Feature.ADAPTERS, lambda driver: driver.load_adapter(0, Path("adapter"))),
    (Feature.ADAPTERS, lambda driver: driver.unload_adapter(0)),
    (Feature.MEDIA, lambda driver: driver.encode_media(_ITEM)),
    (Feature.MEDIA, lambda driver: driver.release_media(0)),
    (Feature.AUDIO, lambda driver: driver.decode_audio(0, np.zeros((1, 1), np.int32), True)),
]


class LifeContract(DriverSubject):
    @pytest.mark.parametrize("place", range(len(_METHODS)))
    def test_what_is_not_declared_is_refused_by_name(self, driver: Driver, place: int) -> None:
        feature, call = _METHODS[place]
        if driver.capabilities.has(feature):
            pytest.skip(f"declares {feature.value}")
        with pytest.raises(Unsupported) as caught:
            call(driver)
        assert feature.value in str(caught.value)
        assert driver.capabilities.driver in str(caught.value)

    def test_the_other_level_is_refused_by_name(self, driver: Driver) -> None:
        other = "request" if driver.capabilities.level == "step" else "step"
        with pytest.raises(Unsupported, match=driver.capabilities.driver):
            work(driver, other)

    def test_a_token_outside_the_vocabulary_fails_and_the_driver_goes_on(self, stepper: Stepper) -> None:
        prompt = self.prompt(stepper.driver, 3)
        expected = self.ask(stepper, stepper.context(), prompt)
        outside = stepper.driver.capabilities.vocab_size
        columns = (outside,) * stepper.driver.capabilities.streams
        wrong = Request(stepper.context(), [columns if len(columns) > 1 else outside])
        requests = [self.asking(Request(stepper.context(), prompt), stepper.driver), wrong]
        try:
            result = stepper.run(requests)
        except ForwardError:
            pass
        else:
            assert list(result.failed) == [1]
        assert self.same(self.ask(stepper, stepper.context(), prompt), expected)

    def test_closing_twice_is_allowed_and_drops_open_tickets(self) -> None:
        driver = self.make_driver()
        if driver.capabilities.level == "step":
            stepper = Stepper(driver)
            stepper.submit([Request(stepper.context(), self.prompt(driver, 3), samples=[Sample()])])
        driver.close()
        driver.close()

    def test_a_closed_driver_takes_no_more_work(self) -> None:
        driver = self.make_driver()
        driver.close()
        with pytest.raises(PieError):
            work(driver, driver.capabilities.level)


class GenerationContract(DriverSubject):
    @pytest.fixture
    def writer(self, driver: Driver) -> Driver:
        if driver.capabilities.level != "request":
            pytest.skip("runs steps, not whole generations")
        return driver

    def test_a_generation_has_as_many_tokens_as_asked_for(self, writer: Driver) -> None:
        tokens = writer.generate(generation(writer))
        assert len(tokens) == 12
        np.testing.assert_array_equal(writer.generate(generation(writer)), tokens)
        np.testing.assert_array_equal(writer.generate(replace(generation(writer), max_tokens=5)), tokens[:5])

    def test_a_generation_ends_before_a_stop_token(self, writer: Driver) -> None:
        tokens = writer.generate(generation(writer)).tolist()
        stop = tokens[4]
        found = writer.generate(replace(generation(writer), stop_tokens=(stop,)))
        assert found.tolist() == tokens[: tokens.index(stop)]

    def test_the_prompt_and_the_seed_decide(self, writer: Driver) -> None:
        seeded = replace(generation(writer), temperature=1.0, seed=4)
        plain = writer.generate(seeded)
        np.testing.assert_array_equal(writer.generate(seeded), plain)
        for changed in (
            replace(seeded, seed=5),
            replace(seeded, prompt=seeded.prompt[:3]),
            replace(seeded, top_k=1),
            replace(seeded, top_p=0.01),
            replace(seeded, min_p=0.99),
            replace(seeded, temperature=0.0),
        ):
            assert not np.array_equal(writer.generate(changed), plain)


def work(driver: Driver, level: str) -> None:
    if level == "request":
        driver.generate(generation(driver))
        return
    token = 1 if driver.capabilities.streams == 1 else (1,) * driver.capabilities.streams
    stepper = Stepper(driver)
    stepper.run([Request(stepper.context(), [token])])


def generation(driver: Driver) -> GenerationRequest:
    prompt = np.arange(1, 6, dtype=np.int32) % driver.capabilities.vocab_size
    return GenerationRequest(
        prompt=prompt,
        max_tokens=12,
        stop_tokens=(),
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=0,
    )
