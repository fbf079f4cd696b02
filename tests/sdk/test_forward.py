"""Passes, samplers and probes."""

from __future__ import annotations

import math
import struct

import pytest
from inferlet import (
    Context,
    Distribution,
    Entropy,
    Hidden,
    Logits,
    Logprob,
    Logprobs,
    Model,
    Sampler,
)
from inferlet.errors import InvalidRequest, Unsupported
from inferlet.event_loop import run

from tests.sdk.fake_host import World, logits, softmax


def test_samples_and_probes_are_read_by_their_handles() -> None:
    async def main() -> None:
        ctx = Context(Model.load())
        forward = ctx.forward().input([1, 2, 3])
        top = forward.probe(2, Distribution(1.0, 4))
        first = forward.sample([0], Sampler.argmax())
        raw = forward.probe(1, Logits())
        others = forward.sample([1, 2], Sampler.argmax())
        hidden = forward.probe(0, Hidden())
        output = await forward.execute()

        best = [max(range(260), key=logits([1, 2, 3][: row + 1]).__getitem__) for row in range(3)]
        assert output.token(first) == best[0]
        assert output.tokens_at(others) == best[1:]
        assert struct.unpack("<260f", output.logits(raw) or b"") == tuple(logits([1, 2]))
        found = output.distribution(top)
        assert found is not None
        assert found[0][0] == best[2]
        assert found[1] == sorted(found[1], reverse=True)
        assert output.hidden(hidden) == [1.0, 0.5]
        assert output.tokens == []
        assert ctx.seq_len == 3

    run(main())


def test_probabilities_agree_with_each_other() -> None:
    async def main() -> None:
        forward = Context(Model.load()).forward().input([9])
        one = forward.probe(0, Logprob(97))
        several = forward.probe(0, Logprobs([97, 98]))
        entropy = forward.probe(0, Entropy())
        output = await forward.execute()
        chances = softmax(logits([9]))
        assert output.logprobs(one) == [math.log(chances[97])]
        assert output.logprobs(several) == [math.log(chances[97]), math.log(chances[98])]
        assert output.entropy(entropy) == pytest.approx(-sum(p * math.log(p) for p in chances))

    run(main())


def test_a_handle_of_another_kind_gives_none() -> None:
    async def main() -> None:
        forward = Context(Model.load()).forward().input([9])
        sampled = forward.sample([0], Sampler.argmax())
        entropy = forward.probe(0, Entropy())
        output = await forward.execute()
        assert output.token(entropy) is None
        assert output.entropy(sampled) is None
        assert output.logits(entropy) is None

    run(main())


def test_a_logit_mask_forbids() -> None:
    async def main() -> None:
        forward = Context(Model.load()).forward().input([9]).mask([100, 1])
        handle = forward.sample([0], Sampler.argmax())
        assert (await forward.execute()).token(handle) == 100

    run(main())


def test_the_buffer_is_no_part_of_a_pass() -> None:
    async def main() -> None:
        ctx = Context(Model.load()).append([5])
        assert ctx.forward().start_position() == 0
        await ctx.forward().input([1]).execute()
        assert (ctx.tokens(), ctx.buffer()) == ([1], [5])

    run(main())


def test_an_empty_pass_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty input"):
        run(Context(Model.load()).forward().execute())


def test_positions_must_match_tokens() -> None:
    with pytest.raises(InvalidRequest, match="2 tokens but 1 positions"):
        Context(Model.load()).forward().input_at([1, 2], [0])


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (Sampler.argmax(), {"temperature": 0.0}),
        (Sampler.top_p(), {"temperature": 0.6, "top_p": 0.95}),
        (Sampler.top_k(), {"temperature": 0.6, "top_k": 40}),
        (Sampler.min_p(), {"temperature": 0.6, "min_p": 0.1}),
        (Sampler.top_k_top_p(), {"temperature": 0.6, "top_k": 40, "top_p": 0.95}),
        (Sampler.multinomial(), {"temperature": 1.0}),
        (
            Sampler.argmax(seed=3, presence_penalty=0.5),
            {"temperature": 0.0, "seed": 3, "penalties": (1.0, 0.5, 0.0)},
        ),
    ],
)
def test_the_factories_set_what_their_names_say(sampler: Sampler, settings: dict[str, object]) -> None:
    assert sampler.handle().settings == settings  # type: ignore[attr-defined]


def test_a_logit_bias_changes_the_choice() -> None:
    async def main() -> None:
        forward = Context(Model.load()).forward().input([9])
        handle = forward.sample([0], Sampler.argmax(logit_bias={3: 100.0}))
        assert (await forward.execute()).token(handle) == 3

    run(main())


def test_wrong_samplers_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        Sampler.top_p(-1.0).handle()
    with pytest.raises(Unsupported, match="draws=2"):
        Sampler.multinomial(1.0, 2)


def test_masks_can_be_asked_to_hold_for_attention_layers_alone(world: World) -> None:
    async def main() -> None:
        context = Context(Model.load())
        await context.forward().input([1]).attention_mask([[0, 1]]).execute()
        assert world.calls["attention layers only"] == 0
        await context.forward().input([2]).attention_mask([[0, 2]], attention_layers_only=True).execute()
        assert world.calls["attention layers only"] == 1

    run(main())
