"""What the dummy driver does beyond the contract: its clock, its faults, its proposals and its options."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.contracts.driver import Driver, DriverRequest, Feature, GenerationRequest
from pie_core.contracts.forward import ProbeKind
from pie_core.errors import ForwardError, InvalidRequest, LoadError, Unsupported
from pie_core.ids import Ticket
from pie_core.testing.batches import (
    Context,
    FromTicket,
    Mask,
    Media,
    Probe,
    Request,
    Sample,
    Stepper,
    proposals,
)
from pie_plugins.drivers.dummy import CHECKPOINT, pie_drivers
from pie_plugins.drivers.dummy.driver import DummyDriver
from pie_plugins.drivers.dummy.options import DummyOptions
from pie_plugins.drivers.dummy.sampler import Head
from pie_plugins.drivers.dummy.timeline import Span, Timeline


def load(model_path: Path | None = None, **options: Any) -> Driver:
    (declaration,) = pie_drivers()
    return declaration.load(DriverRequest(model_path, "cpu", DummyOptions(**options), {}, {}))


def stepper_of(**options: Any) -> Stepper:
    return Stepper(load(**options))


def first_tokens(stepper: Stepper, count: int = 8) -> list[int]:
    """What greedy decoding gives after a fixed prompt."""
    context, token, tokens = stepper.context(), 9, []
    for _ in range(count):
        token = int(stepper.run([Request(context, [token], samples=[Sample()])]).tokens[0])
        tokens.append(token)
    return tokens


def test_the_best_token_is_known_without_the_logits() -> None:
    words = np.random.default_rng(0).integers(0, 2**63, 500).astype(np.uint64)
    for vocab_size in (2, 33, 512):
        head = Head(vocab_size, 4, 1)
        np.testing.assert_array_equal(head.best_tokens(words), head.logits(words).argmax(axis=1))


def test_steps_follow_each_other_without_gaps_and_idle_time_is_not_made_up() -> None:
    timeline = Timeline(step_ms=2.0, token_us=10.0)
    spans = [timeline.enqueue(now, tokens) for now, tokens in ((1.0, 100), (1.001, 0), (5.0, 0))]
    assert [span.start for span in spans] == [1.0, pytest.approx(1.003), 5.0]
    assert [span.busy_s for span in spans] == pytest.approx([0.003, 0.002, 0.002])
    assert Span(1.0, 3.5).busy_s == 2.5


def test_a_result_says_how_long_the_device_worked_on_it() -> None:
    stepper = stepper_of(step_ms=0.5, token_us=100.0)
    result = stepper.run([Request(stepper.context(), [1, 2, 3, 4, 5])])
    assert math.isclose(result.busy_s, 1e-3, rel_tol=1e-6)


def test_tickets_are_collected_in_order_and_no_more_are_open_than_declared() -> None:
    stepper = stepper_of(max_in_flight=2)
    tickets = [stepper.submit([Request(stepper.context(), [n])]) for n in (1, 2)]
    with pytest.raises(ForwardError, match="max_in_flight"):
        stepper.submit([Request(stepper.context(), [3])])
    with pytest.raises(ForwardError, match=r"open are \[0, 1\]"):
        stepper.driver.collect(tickets[1])
    for ticket in tickets:
        stepper.collect(ticket)
    with pytest.raises(ForwardError, match="cannot be collected"):
        stepper.driver.collect(tickets[1])


def test_every_nth_step_fails_and_what_refers_to_it_fails_too() -> None:
    stepper = stepper_of(fail_every=3)
    contexts = [stepper.context() for _ in range(2)]
    for _ in range(2):
        stepper.run([Request(contexts[0], [1])])
    failing = stepper.submit([Request(contexts[0], [1], samples=[Sample()])])
    following = stepper.submit(
        [Request(contexts[0], [FromTicket(failing, 0)], samples=[Sample()]), Request(contexts[1], [4])]
    )
    with pytest.raises(ForwardError, match="step 2 fails"):
        stepper.collect(failing)
    result = stepper.collect(following)
    assert list(result.failed) == [0]
    assert "ticket 2" in result.failed[0]


def test_a_request_that_reads_the_fatal_token_fails_alone_and_so_does_what_it_feeds() -> None:
    stepper = stepper_of(fail_token=13)
    one = stepper.submit([Request(stepper.context(), [t], samples=[Sample()]) for t in (12, 13)])
    two = stepper.submit(
        [Request(stepper.context(), [FromTicket(one, n)], samples=[Sample()]) for n in (0, 1)]
    )
    assert list(stepper.collect(one).failed) == [1]
    result = stepper.collect(two)
    assert list(result.failed) == [1]
    assert "request 1 of ticket 0 failed" in result.failed[1]


def test_a_reference_too_far_back_fails() -> None:
    stepper = stepper_of()
    old = stepper.submit([Request(stepper.context(), [1], samples=[Sample()])])
    stepper.collect(old)
    for _ in range(20):
        stepper.run([Request(stepper.context(), [1])])
    result = stepper.run([Request(stepper.context(), [FromTicket(old, 0)])])
    assert "steps back" in result.failed[0]


def test_a_page_that_is_missing_or_does_not_exist_is_named() -> None:
    stepper = stepper_of(num_pages=8)
    context, other = stepper.context(), stepper.context()
    stepper.make_room(other, 1)
    missing = stepper.build([Request(context, [1]), Request(other, [1])])
    result = stepper.driver.collect(stepper.driver.submit(missing))
    assert result.failed == {0: "group 'paged' has no page for KV index 0"}
    other.pages[0][0] = 8
    ticket = stepper.driver.submit(stepper.build([Request(other, [1])]))
    with pytest.raises(ForwardError, match="pages 0 to 7"):
        stepper.driver.collect(ticket)


def test_a_context_stands_in_a_batch_once() -> None:
    stepper = stepper_of()
    context = stepper.context()
    requests = [Request(context, [1]), Request(stepper.context(), [2]), Request(context, [3])]
    assert set(stepper.run(requests).failed) == {0, 2}


def test_a_logit_mask_that_allows_nothing_fails_its_request() -> None:
    stepper = stepper_of()
    requests = [Request(stepper.context(), [1], samples=[Sample(allowed=allowed)]) for allowed in ([7], [])]
    result = stepper.run(requests)
    assert list(result.failed) == [1]
    assert result.tokens[0] == 7


@pytest.mark.parametrize(("accuracy", "all_accepted"), [(1.0, True), (0.0, False)])
def test_proposals_are_as_good_as_asked_for(accuracy: float, all_accepted: bool) -> None:
    stepper = stepper_of(proposal_accuracy=accuracy, groups=("paged", "state", "window"), page_size=3)
    sample = Sample(temperature=1.0, stream=8)
    context = stepper.context()
    result = stepper.run([Request(context, [1, 2, 3, 4], samples=[sample], proposals=8)])
    drafts = proposals(result, 0).tolist()
    tokens = [int(result.tokens[0]), *drafts]
    samples = [replace(sample, row=row) for row in range(9)]
    verified = stepper.run([Request(context, tokens, drafts=8, samples=samples)])
    assert verified.accepted.tolist() == [8 if all_accepted else 0]


def test_another_seed_is_another_model() -> None:
    drivers = [stepper_of(), stepper_of(seed=1)]
    assert first_tokens(drivers[0]) != first_tokens(drivers[1])
    revisions = {stepper.driver.capabilities.weights_revision for stepper in drivers}
    assert len(revisions) == 2


def test_the_vocabulary_is_that_of_the_checkpoint_unless_an_option_says_otherwise(tmp_path: Path) -> None:
    assert load().capabilities.vocab_size == load(CHECKPOINT).capabilities.vocab_size == 512
    assert load(vocab_size=77).capabilities.vocab_size == 77
    (tmp_path / "config.json").write_text('{"vocab_size": 1234}')
    assert load(tmp_path).capabilities.vocab_size == 1234


@pytest.mark.parametrize("content", [None, "{", "{}", '{"vocab_size": "many"}', '{"vocab_size": 1}', "[]"])
def test_a_checkpoint_without_a_vocabulary_size_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoadError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("page_size", 0),
        ("num_pages", -1),
        ("vocab_size", 1),
        ("groups", ()),
        ("proposal_accuracy", 1.5),
        ("step_ms", -0.1),
        ("without", ("telepathy",)),
        ("streams", 0),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value(option: str, value: Any) -> None:
    with pytest.raises(LoadError, match=option):
        load(**{option: value})


def test_every_option_has_a_default_and_a_help() -> None:
    for field in DummyOptions.__dataclass_fields__.values():
        assert field.metadata["help"]
    assert DummyOptions() == DummyOptions()


def test_without_host_pages_there_is_no_swap() -> None:
    driver = load(num_host_pages=0)
    assert not driver.capabilities.has(Feature.SWAP)
    with pytest.raises(Unsupported, match="swap"):
        driver.swap_out(0, [0], [0])


PROBED = {
    Feature.PROBE_LOGITS: ProbeKind.LOGITS,
    Feature.PROBE_DISTRIBUTION: ProbeKind.DISTRIBUTION,
    Feature.PROBE_LOGPROBS: ProbeKind.LOGPROBS,
    Feature.PROBE_ENTROPY: ProbeKind.ENTROPY,
    Feature.PROBE_HIDDEN: ProbeKind.HIDDEN,
    Feature.PROBE_COLUMNS: ProbeKind.COLUMNS,
}
USED: dict[Feature, dict[str, Any]] = {
    Feature.ATTENTION_MASK: {"masks": [Mask(0, [(0, 1)])]},
    Feature.NONCAUSAL_MASK: {"masks": [Mask(0, [(0, 2)], causal=False)]},
    Feature.LOGIT_MASK: {"samples": [Sample(allowed=[1])]},
    Feature.PENALTIES: {"samples": [Sample(presence=1.0)]},
    Feature.LOGIT_BIAS: {"samples": [Sample(bias=[(1, 1.0)])]},
    Feature.TICKET_TOKENS: {"tokens": [1, FromTicket(Ticket(0), 0)]},
    Feature.DRAFTS: {"drafts": 1},
    Feature.PROPOSALS: {"proposals": 1},
    Feature.ADAPTERS: {"adapter": 1},
    Feature.MEDIA: {"media": [Media(0, 1, 0, 1)]},
    **{feature: {"probes": [Probe(kind)]} for feature, kind in PROBED.items()},
}


@pytest.mark.parametrize("feature", USED)
def test_a_batch_that_uses_what_is_not_declared_is_refused_by_name(feature: Feature) -> None:
    stepper = stepper_of(without=(feature,))
    request = Request(stepper.context(), [1, 2])
    with pytest.raises(Unsupported, match=f"'dummy' does not declare {feature}"):
        stepper.submit([replace(request, **USED[feature])])
    assert stepper.run([request]).failed == {}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("groups", [("paged",), ("paged", "state", "window")])
def test_a_whole_generation_is_what_the_explicit_loop_gives(
    temperature: float, groups: tuple[str, ...]
) -> None:
    stepper, writer = stepper_of(groups=groups), load(groups=groups, level="request")
    sample = Sample(temperature=temperature, top_k=50, stream=6)
    context = stepper.context()
    tokens = [int(stepper.run([Request(context, [1, 2, 3], samples=[sample])]).tokens[0])]
    for _ in range(19):
        tokens.append(int(stepper.run([Request(context, [tokens[-1]], samples=[sample])]).tokens[0]))
    request = GenerationRequest(np.array([1, 2, 3], np.int32), 20, (), temperature, 50, 1.0, 0.0, 6)
    assert writer.generate(request).tolist() == tokens


def test_a_generation_ends_where_its_memory_does_and_refuses_a_longer_prompt() -> None:
    writer = load(level="request", num_pages=2, page_size=4)
    request = GenerationRequest(np.arange(5, dtype=np.int32), 20, (), 0.0, 0, 1.0, 0.0, 0)
    assert len(writer.generate(request)) == 4
    with pytest.raises(InvalidRequest, match="1 to 8"):
        writer.generate(replace(request, prompt=np.arange(9, dtype=np.int32)))
    with pytest.raises(ForwardError, match="token id"):
        writer.generate(replace(request, prompt=np.array([600], np.int32)))


class Plain:
    """The sequential run that everything is compared with: one token of one context at a time, on a fresh driver."""

    def __init__(self, options: DummyOptions) -> None:
        self._options = options

    def token_after(self, history: list[int]) -> int:
        stepper = Stepper(DummyDriver(self._options, 512))
        context = stepper.context()
        for token in history[:-1]:
            stepper.run([Request(context, [token])])
        return int(stepper.run([Request(context, history[-1:], samples=[Sample()])]).tokens[0])


SCHEDULES = st.lists(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()),
        min_size=1,
        max_size=3,
        unique_by=lambda t: t[0],
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(
    SCHEDULES,
    st.sampled_from([("paged",), ("window", "state"), ("paged", "latent")]),
    st.sampled_from([1, 3, 16]),
)
def test_any_schedule_gives_the_tokens_of_the_sequential_run(
    schedule: list[list[tuple[int, int, bool]]], groups: Any, page_size: int
) -> None:
    """Batches of any contexts, chunks of any size, forks at any moment, pages reused in any order."""
    options = DummyOptions(groups=groups, page_size=page_size, window=5, num_pages=256, max_batch_requests=8)
    stepper = Stepper(DummyDriver(options, 512))
    stepper.book.shuffle(page_size)
    contexts: list[Context] = [stepper.context() for _ in range(4)]
    histories: list[list[int]] = [[] for _ in range(4)]
    for step, batch in enumerate(schedule):
        requests = []
        for place, count, forks in batch:
            if forks and histories[place]:
                old, contexts[place] = contexts[place], stepper.fork(contexts[place])
                stepper.book.drop_context(old)
            tokens = [(7 * step + 3 * place + n) % 512 for n in range(count)]
            histories[place] += tokens
            requests.append(Request(contexts[place], tokens, samples=[Sample()]))
        found = stepper.run(requests).tokens.tolist()
        plain = Plain(options)
        assert found == [plain.token_after(histories[place]) for place, _, _ in batch]


def test_without_interpreting_a_token_depends_on_context_and_place_alone() -> None:
    alone, together = stepper_of(vocab_size=512, interpret=False), stepper_of(vocab_size=512, interpret=False)
    contexts = [together.context() for _ in range(3)]
    drawn = together.run([Request(each, [1, 2], samples=[Sample()]) for each in contexts]).tokens.tolist()
    assert len(set(drawn)) > 1
    again = [alone.run([Request(alone.context(), [3, 4], samples=[Sample()])]).tokens[0] for _ in contexts]
    assert again == drawn
    assert together.run([Request(contexts[0], [1], samples=[Sample()])]).tokens[0] != drawn[0]


def test_without_interpreting_it_refuses_what_would_have_to_be_interpreted() -> None:
    stepper = stepper_of(vocab_size=512, interpret=False)
    request = Request(stepper.context(), [1, 2], samples=[Sample()], masks=[Mask(1, [(1, 2)])])
    with pytest.raises(Unsupported, match="attention-mask"):
        stepper.run([request])
    with pytest.raises(LoadError, match="option interpret is False; expected true, but for level: step"):
        load(vocab_size=512, interpret=False, streams=2)
