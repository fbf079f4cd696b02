"""The engine through its messages, on the dummy driver: what passes, generations and contexts promise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pie_core.contracts.forward import ForwardBatch, ProbeKind
from pie_core.engine.messages import (
    Ack,
    BreakOff,
    Cancel,
    DropContext,
    EndProcess,
    Failed,
    ForwardDone,
    Generated,
    OpenSnapshot,
    Probe,
    ReadTokens,
    Sample,
    SamplerSpec,
    SaveSnapshot,
    SnapshotOpened,
    TruncateContext,
)
from pie_core.errors import ForwardError
from pie_core.ids import ContextId, ProcessId, RequestId, Tenant, Ticket
from pie_plugins.drivers.dummy.driver import DummyDriver
from tests.core.engine.stepping import GREEDY, RANDOM, SteppedEngine, dummy


@pytest.fixture
def engine() -> SteppedEngine:
    made = SteppedEngine()
    made.create(1)
    return made


def explicit_loop(
    engine: SteppedEngine, context: int, prompt: list[int], count: int, sampler: SamplerSpec
) -> list[int]:
    drawn, tokens = [], prompt
    for _ in range(count):
        drawn.append(engine.draw(context, tokens, sampler))
        tokens = [drawn[-1]]
    return drawn


def draw_alone(tokens: Sequence[int]) -> int:
    """What a fresh engine draws behind these tokens."""
    engine = SteppedEngine()
    engine.create(1)
    return engine.draw(1, tokens)


@pytest.mark.parametrize("sampler", [GREEDY, RANDOM, SamplerSpec(temperature=0.8, top_k=5, seed=3)])
def test_a_generation_gives_the_tokens_of_the_explicit_loop(
    engine: SteppedEngine, sampler: SamplerSpec
) -> None:
    engine.create(2)
    assert engine.generate(1, [1, 2, 3], 20, sampler) == explicit_loop(engine, 2, [1, 2, 3], 20, sampler)


def test_a_stop_token_ends_a_generation_and_is_not_part_of_it(engine: SteppedEngine) -> None:
    engine.create(2)
    tokens = engine.generate(2, [1, 2, 3], 8)
    request = engine.begin_generation(1, [1, 2, 3], 0, stop_tokens=[tokens[5]])
    engine.run()
    kept = tokens[: tokens.index(tokens[5])]
    assert engine.generated(request) == kept
    assert engine.final(request, Generated).finish == "stop"
    assert engine.history(1) == [1, 2, 3, *kept]


def test_a_generation_without_limit_fills_the_model(engine: SteppedEngine) -> None:
    engine = SteppedEngine(dummy(max_model_len=20))
    engine.create(1)
    request = engine.begin_generation(1, [1, 2, 3], 0)
    engine.run()
    final = engine.final(request, Generated)
    assert (final.finish, final.length, len(engine.generated(request))) == ("length", 20, 17)
    assert "exceed the model's length of 20" in engine.refused(1, [4]).message


def test_what_follows_a_generation_sees_its_last_token(engine: SteppedEngine) -> None:
    engine.create(2)
    tokens = engine.generate(1, [1, 2], 3)
    assert engine.draw(1, [9]) == engine.draw(2, [1, 2, *tokens, 9])


def test_forks_write_on_their_own_while_sharing_what_they_have_in_common(engine: SteppedEngine) -> None:
    engine.forward(1, range(10))
    for child in (2, 3, 4):
        engine.fork(1, child)
    free_before = engine.status().free_pages[0]
    drawn = {child: explicit_loop(engine, child, [child], 5, GREEDY) for child in (2, 3, 4, 1)}
    # Two pages each: a copy of the third, half filled one and a fourth; one of them keeps the original.
    assert engine.status().free_pages[0] == free_before - (4 * 2 - 1)
    for child, tokens in drawn.items():
        engine.create(10 + child)
        assert explicit_loop(engine, 10 + child, [*range(10), child], 5, GREEDY) == tokens


def test_a_fork_keeps_its_rows_when_its_parent_goes_back_into_a_shared_page(engine: SteppedEngine) -> None:
    engine.forward(1, range(10))
    engine.fork(1, 2)
    engine.forward(1, [50])
    engine.send(TruncateContext(ContextId(1), 6))
    engine.forward(1, [60, 61, 62])
    assert engine.draw(2, [70]) == draw_alone([*range(10), 70])
    assert engine.draw(1, [71]) == draw_alone([*range(6), 60, 61, 62, 71])


def test_forks_draw_from_noise_of_their_own(engine: SteppedEngine) -> None:
    engine.forward(1, [1, 2, 3])
    engine.fork(1, 2)
    engine.fork(1, 3)
    drawn = [tuple(explicit_loop(engine, context, [5], 12, RANDOM)) for context in (1, 2, 3)]
    assert len(set(drawn)) == 3


def test_a_seed_fixes_the_tokens_whatever_the_context_draws_from() -> None:
    engine, seeded = SteppedEngine(), SamplerSpec(temperature=1.0, seed=11)
    engine.create(1, seed=1)
    engine.create(2, seed=2)
    assert engine.generate(1, [4], 12, seeded) == engine.generate(2, [4], 12, seeded)
    assert engine.generate(1, [4], 12, RANDOM) != engine.generate(2, [4], 12, RANDOM)


def test_after_a_truncation_other_tokens_are_drawn(engine: SteppedEngine) -> None:
    first = engine.generate(1, [1, 2, 3], 12, RANDOM)
    engine.send(TruncateContext(ContextId(1), 0))
    assert engine.generate(1, [1, 2, 3], 12, RANDOM) != first
    assert engine.history(1)[:3] == [1, 2, 3]


def test_samplers_of_one_row_draw_apart(engine: SteppedEngine) -> None:
    samples = tuple(Sample(0, RANDOM) for _ in range(12))
    assert len(set(engine.forward(1, [1], samples=samples).tokens)) > 1


def test_positions_are_separate_from_the_number_of_rows(engine: SteppedEngine) -> None:
    done = engine.forward(1, [1, 2, 3], positions=(7, 30, 4))
    assert (done.length, done.position) == (3, 31)
    engine.send(TruncateContext(ContextId(1), 1))
    done = engine.forward(1, [5])
    assert (done.length, done.position) == (2, 9)


@pytest.mark.parametrize("groups", [("paged",), ("paged", "state"), ("window",)])
def test_a_split_prompt_gives_the_same_samples_and_probes(groups: tuple[str, ...]) -> None:
    prompt = [(7 * i) % 97 for i in range(23)]
    samples = tuple(Sample(row, RANDOM) for row in (22, 3, 3, 9))
    probes = (
        Probe(5, ProbeKind.LOGITS),
        Probe(22, ProbeKind.DISTRIBUTION, 0.7, 4),
        Probe(0, ProbeKind.LOGPROBS, tokens=(5, 6)),
        Probe(11, ProbeKind.ENTROPY),
        Probe(11, ProbeKind.HIDDEN),
    )
    answers = []
    for budget in (64, 5, 1):
        engine = SteppedEngine(dummy(groups=groups, window=6), max_batch_tokens=budget)
        engine.create(1)
        done = engine.forward(1, prompt, samples=samples, probes=probes)
        assert engine.status().steps == -(-23 // budget)
        answers.append((done.tokens, done.probes))
    assert answers[0] == answers[1] == answers[2]
    sizes = [len(each.values) // 4 for each in answers[0][1]]
    assert sizes == [97, 4, 2, 1, 16]
    assert len(answers[0][1][1].token_ids) == 4


def test_a_long_prompt_and_decoding_share_the_steps() -> None:
    engine = SteppedEngine(dummy(num_pages=400), max_batch_tokens=16)
    for context in range(1, 9):
        engine.create(context)
    decoding = [engine.begin_generation(context, [context], 40) for context in range(1, 8)]
    engine.start()
    engine.finish()
    prompt = engine.submit(8, [1] * 300)
    engine.start()
    engine.finish()
    assert all(len(engine.generated(each)) == 2 for each in decoding)
    assert engine.status().tokens == 7 + 16
    engine.run()
    engine.final(prompt, ForwardDone)


# ---- drafts


@pytest.mark.parametrize("groups", [("paged",), ("state",), ("paged", "window", "state")])
def test_drafts_that_are_right_are_kept_and_the_rest_never_happened(groups: tuple[str, ...]) -> None:
    engine = SteppedEngine(dummy(groups=groups, window=5))
    engine.create(1, seed=3)
    engine.create(2, seed=3)
    tokens = explicit_loop(engine, 1, [1, 2, 3], 5, RANDOM)
    wrong = (tokens[2] + 1) % 97
    drafts = [tokens[0], tokens[1], wrong, 4]
    done = engine.forward(2, [1, 2, 3, *drafts], samples=(Sample(2, RANDOM),), num_drafts=4)
    assert done.tokens == tokens[:3]
    assert (done.length, done.position) == (5, 5)
    assert engine.history(2) == [1, 2, 3, *tokens[:2]]
    assert explicit_loop(engine, 2, [tokens[2]], 2, RANDOM) == tokens[3:5]


def test_drafts_are_verified_in_one_step_however_the_prompt_is_split() -> None:
    engine = SteppedEngine(max_batch_tokens=4)
    engine.create(1)
    engine.create(2)
    tokens = explicit_loop(engine, 1, list(range(9)), 3, GREEDY)
    done = engine.forward(2, [*range(9), *tokens[:2]], samples=(Sample(8, GREEDY),), num_drafts=2)
    assert done.tokens == tokens


def test_drafts_need_a_sampler_on_the_row_before_them(engine: SteppedEngine) -> None:
    assert "verified by one sampler on row 1" in engine.refused(1, [1, 2, 3], num_drafts=1).message


# ---- order within a context


def test_commands_of_a_context_take_effect_in_the_order_they_were_sent(engine: SteppedEngine) -> None:
    first = engine.submit(1, [1, 2, 3, 4])
    engine.send(TruncateContext(ContextId(1), 2))
    engine.fork(1, 2)
    second = engine.submit(2, [9])
    third = engine.submit(1, [7])
    engine.run()
    assert engine.final(first, ForwardDone).length == 4
    assert engine.final(second, ForwardDone).length == engine.final(third, ForwardDone).length == 3
    assert (engine.history(1), engine.history(2)) == ([1, 2, 7], [1, 2, 9])


def test_what_was_queued_behind_a_failed_pass_fails_with_its_cause() -> None:
    engine = SteppedEngine(dummy(fail_token=13))
    engine.create(1)
    engine.forward(1, [1])
    failing, behind = engine.submit(1, [13]), engine.submit(1, [2])
    engine.send(TruncateContext(ContextId(1), 0))
    engine.fork(1, 2)
    on_fork = engine.submit(2, [3])
    engine.run()
    assert engine.final(failing, Failed).code == "forward"
    assert "token 13 fails" in engine.final(failing, Failed).message
    for request in (behind, on_fork):
        failed = engine.final(request, Failed)
        assert failed.code == "forward"
        assert "an earlier request on this context failed: " in failed.message
    assert engine.history(1) == [1]
    assert engine.forward(1, [2]).length == 2
    assert engine.refused(2).code == "forward", "the fork was never made"


def test_a_failed_step_ends_its_passes_and_the_engine_lives() -> None:
    engine = SteppedEngine(dummy(fail_every=2))
    engine.create(1)
    engine.create(2)
    assert engine.forward(1, [1]).length == 1
    requests = [engine.submit(1, [2]), engine.submit(2, [2])]
    engine.run()
    for request in requests:
        assert "step 1 fails" in engine.final(request, Failed).message
    assert engine.draw(1, [2]) == draw_alone([1, 2])


class BrokenDriver(DummyDriver):
    """Raises what a test wants, where it wants."""

    def __init__(self, working: DummyDriver) -> None:
        self.__dict__ = working.__dict__
        self.broken: str | None = None

    def submit(self, batch: ForwardBatch) -> Ticket:
        if self.broken == "submit":
            raise MemoryError("no room for the batch")
        return super().submit(batch)

    def copy_pages(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        if self.broken == "copy_pages":
            raise OSError("the device is gone")
        super().copy_pages(group, sources, targets)


@pytest.mark.parametrize(
    ("method", "cause"), [("submit", "MemoryError: no room"), ("copy_pages", "OSError: the")]
)
def test_a_driver_that_raises_changes_no_context(method: str, cause: str) -> None:
    driver = BrokenDriver(dummy())
    engine = SteppedEngine(driver)
    engine.create(1)
    engine.forward(1, [1, 2])
    engine.fork(1, 2)
    driver.broken = method
    requests = [engine.submit(1, [3]), engine.submit(2, [4])]
    engine.run()
    for request in requests:
        failed = engine.final(request, Failed)
        assert failed.code == "forward"
        assert cause in failed.message
    driver.broken = None
    assert (engine.draw(1, [3]), engine.draw(2, [4])) == (draw_alone([1, 2, 3]), draw_alone([1, 2, 4]))
    engine.send(EndProcess(ProcessId("p")))
    assert engine.all_pages_are_free()


@pytest.mark.parametrize("groups", [("paged",), ("paged", "state")])
def test_what_a_prompt_computes_behind_a_step_that_failed_means_nothing(groups: tuple[str, ...]) -> None:
    """The second part of the prompt was at the driver when the first failed."""
    engine = SteppedEngine(dummy(groups=groups), max_batch_tokens=8, speculation_depth=0)
    engine.create(1)
    prompt = [(7 * i) % 97 for i in range(16)]
    request = engine.submit(1, prompt)
    engine.start()
    engine.start()
    assert len(engine.in_flight) == 2
    ticket = engine.in_flight.popleft()
    engine.driver.collect(ticket)
    engine.engine.finish_step(ticket, ForwardError("the device failed"))
    engine.run()
    assert engine.final(request, Failed).code == "forward"
    assert engine.status().cached_pages == [0] * len(groups)
    alone = SteppedEngine(dummy(groups=groups))
    alone.create(1)
    assert engine.draw(1, prompt) == alone.draw(1, prompt)
    engine.send(EndProcess(ProcessId("p")))
    engine.run()
    assert engine.all_pages_are_free()


# ---- ending early


def test_breaking_off_keeps_the_prompt_and_what_was_consumed(engine: SteppedEngine) -> None:
    engine.create(2)
    expected = engine.generate(2, [1, 2, 3], 12, RANDOM)
    request = engine.begin_generation(1, [1, 2, 3], 0, RANDOM)
    while len(engine.generated(request)) < 6:
        engine.start()
        engine.finish()
    engine.start()
    breaking = engine.new_request()
    engine.send(BreakOff(breaking, request, 4))
    engine.run()
    engine.final(breaking, Ack)
    assert engine.final(request, Generated).finish == "cancelled"
    assert engine.history(1) == [1, 2, 3, *expected[:4]]
    # Breaking off is no truncation: the next tokens are those that the explicit loop would draw.
    assert explicit_loop(engine, 1, [expected[4]], 3, RANDOM) == expected[5:8]


def test_a_generation_can_be_broken_off_before_it_began_and_after_it_ended(engine: SteppedEngine) -> None:
    engine.submit(1, [1])
    queued = engine.begin_generation(1, [2, 3], 5)
    breaks = [engine.new_request() for _ in range(3)]
    engine.send(BreakOff(breaks[0], queued, 0))
    engine.run()
    assert engine.final(queued, Generated).finish == "cancelled"
    assert engine.history(1) == [1, 2, 3]
    ended = engine.begin_generation(1, [4], 5)
    engine.run()
    engine.send(BreakOff(breaks[1], ended, 2))
    engine.run()
    assert engine.history(1) == [1, 2, 3, 4, *engine.generated(ended)[:2]]
    engine.forward(1, [5])
    engine.send(BreakOff(breaks[2], ended, 1))
    assert engine.final(breaks[2], Failed).code == "not-found"
    for request in breaks[:2]:
        engine.final(request, Ack)


def test_no_more_can_be_kept_than_was_generated(engine: SteppedEngine) -> None:
    request = engine.begin_generation(1, [1], 3)
    breaking = engine.new_request()
    engine.send(BreakOff(breaking, request, 1))
    engine.run()
    assert "cannot keep 1 tokens of 0 generated" in engine.final(breaking, Failed).message
    assert engine.final(request, Generated).finish == "length"


def test_breaking_off_is_answered_whatever_becomes_of_the_generation(engine: SteppedEngine) -> None:
    generations = []
    for end in ("refused", "cancelled", "ended"):
        engine.submit(1, [1])
        generation = engine.begin_generation(1, [1] if end != "refused" else [97], 5)
        breaks = [engine.new_request(), engine.new_request()]
        engine.send(BreakOff(breaks[0], generation, 1), BreakOff(breaks[1], generation, 0))
        assert "cannot keep 1 tokens of 0" in engine.final(breaks[0], Failed).message
        if end == "cancelled":
            engine.send(Cancel(generation))
        if end == "ended":
            engine.send(EndProcess(ProcessId("p")))
        generations.append((generation, breaks[1], {"refused": "invalid-request"}.get(end, "cancelled")))
        engine.run()
    for generation, breaking, code in generations:
        assert engine.final(generation, Failed).code == code
        assert engine.final(breaking, Failed).code == code
    assert engine.all_pages_are_free()


@pytest.mark.parametrize("groups", [("paged",), ("window", "state")])
@pytest.mark.parametrize("in_flight", [True, False])
def test_a_cancelled_request_leaves_its_context_as_it_was(groups: tuple[str, ...], in_flight: bool) -> None:
    engine = SteppedEngine(dummy(groups=groups, window=3), max_batch_tokens=2)
    engine.create(1)
    engine.forward(1, [1, 2, 3])
    request = engine.begin_generation(1, [4, 5, 6], 9)
    for _ in range(4):
        engine.start()
        engine.finish()
    if in_flight:
        engine.start()
    engine.send(Cancel(request), Cancel(request))
    assert engine.final(request, Failed).code == "cancelled"
    later = engine.submit(1, [7], samples=(Sample(0, GREEDY),))
    engine.run()
    alone = SteppedEngine(dummy(groups=groups, window=3))
    alone.create(1)
    assert engine.final(later, ForwardDone).tokens == [alone.draw(1, [1, 2, 3, 7])]


def test_the_end_of_a_process_frees_everything_even_what_a_step_still_uses() -> None:
    engine = SteppedEngine(max_batch_tokens=4)
    engine.create(1)
    engine.create(2, process="other")
    requests = [engine.submit(1, range(9)), engine.submit(1, [1])]
    engine.fork(1, 3)
    requests.append(engine.submit(3, [1]))
    engine.start()
    engine.send(EndProcess(ProcessId("p")))
    for request in requests:
        assert engine.final(request, Failed).code == "cancelled"
    assert not engine.all_pages_are_free(), "the driver still writes to them"
    engine.run()
    assert engine.all_pages_are_free()
    assert engine.forward(2, [1]).length == 1


def test_a_dropped_context_is_gone_once_what_was_sent_before_is_done(engine: SteppedEngine) -> None:
    request = engine.submit(1, [1, 2, 3])
    engine.send(DropContext(ContextId(1)))
    engine.run()
    engine.final(request, ForwardDone)
    assert engine.all_pages_are_free()
    assert "there is no context 1" in engine.refused(1).message


# ---- what cannot be


def test_an_id_is_of_one_context_only(engine: SteppedEngine) -> None:
    engine.forward(1, [1])
    engine.create(1)
    assert "context 1 exists already" in engine.refused(1).message
    assert engine.forward(1, [2]).length == 2
    engine.fork(1, 1)
    assert "context 1 exists already" in engine.refused(1).message


def test_a_fork_of_nothing_is_nothing(engine: SteppedEngine) -> None:
    engine.fork(9, 2)
    for _ in range(2):
        assert "there is no context 9" in engine.refused(2).message


@pytest.mark.parametrize("length", [-1, 4])
def test_a_truncation_that_cannot_be_is_told_to_the_next_request(engine: SteppedEngine, length: int) -> None:
    engine.forward(1, [1, 2, 3])
    engine.send(TruncateContext(ContextId(1), length))
    assert f"cannot truncate to {length} rows: the context has 3" in engine.refused(1).message
    assert engine.forward(1, [4]).length == 4


def test_a_request_on_an_unknown_context_is_answered(engine: SteppedEngine) -> None:
    request = engine.new_request()
    engine.send(ReadTokens(request, ContextId(5)), TruncateContext(ContextId(5), 0), Cancel(RequestId(99)))
    assert engine.final(request, Failed).code == "not-found"


def test_a_driver_of_whole_generations_is_refused_by_name() -> None:
    engine = SteppedEngine(dummy(level="request"))
    engine.create(1)
    failed = engine.refused(1)
    assert failed.code == "unsupported"
    assert "'dummy'" in failed.message


# ---- memory


def test_a_pass_that_can_never_fit_fails_at_once(engine: SteppedEngine) -> None:
    failed = engine.refused(1, [1] * 300)
    assert failed.code == "out-of-pages"
    assert "300 tokens need 75 pages of 4" in failed.message


def test_passes_wait_for_pages_and_all_complete() -> None:
    engine = SteppedEngine(dummy(num_pages=10))
    requests = []
    for context in range(1, 13):
        engine.create(context, process=str(context))
        requests.append(engine.submit(context, [context] * 17))
        engine.send(DropContext(ContextId(context)))
    engine.run()
    for request in requests:
        engine.final(request, ForwardDone)
    assert engine.all_pages_are_free()


def test_when_every_holder_waits_the_younger_give_way_and_all_complete() -> None:
    engine = SteppedEngine(dummy(num_pages=8))
    for context in (1, 2, 3):
        engine.create(context, process=str(context))
    requests = [engine.begin_generation(context, [context], 30) for context in (1, 2, 3)]
    engine.run()
    for context, request in enumerate(requests, start=1):
        alone = SteppedEngine()
        alone.create(context)
        assert engine.generated(request) == alone.generate(context, [context], 30)
    assert engine.status().suspensions > 0


def test_idle_contexts_give_their_pages_up_and_go_on_as_if_they_had_not() -> None:
    engine = SteppedEngine(dummy(num_pages=8))
    for context in (1, 2, 3):
        engine.create(context)
        assert engine.forward(context, [context] * 24).length == 24
    for context in (1, 2, 3):
        assert engine.draw(context, [9]) == draw_alone([*[context] * 24, 9])
    assert engine.status().suspensions == 5


def test_a_snapshot_whose_pages_were_needed_opens_as_it_was() -> None:
    engine = SteppedEngine(dummy(num_pages=8))
    engine.create(1)
    engine.forward(1, [1] * 16)
    engine.send(SaveSnapshot(engine.new_request(), ContextId(1), "s", b""), DropContext(ContextId(1)))
    engine.create(2)
    engine.forward(2, [2] * 30)
    assert engine.status().free_pages == [0]
    opening = engine.new_request()
    engine.send(OpenSnapshot(opening, ContextId(3), ProcessId("p"), Tenant("t"), "s", take=True))
    assert engine.final(opening, SnapshotOpened).length == 16
    assert engine.draw(3, [9]) == draw_alone([*[1] * 16, 9])


@pytest.mark.parametrize("factor", [2, 8, 64])
def test_whatever_the_oversubscription_everything_completes(factor: int) -> None:
    engine = SteppedEngine(dummy(num_pages=8), max_batch_requests=64)
    requests = []
    for context in range(1, factor + 1):
        engine.create(context, process=str(context))
        requests.append(engine.begin_generation(context, [context] * (1 + context % 13), 17))
        engine.send(DropContext(ContextId(context)))
    engine.run()
    assert {engine.final(request, Generated).finish for request in requests} == {"length"}
    assert engine.all_pages_are_free()


def test_a_request_that_takes_too_long_ends_and_frees_its_pages() -> None:
    engine = SteppedEngine(request_timeout_s=5.0)
    engine.create(1)
    slow, own = engine.begin_generation(1, [1], 0), engine.submit(1, [2], timeout_s=3.0)
    engine.start()
    assert engine.engine.wakes_in_s == 3.0
    engine.now = 4.0
    engine.start()
    assert engine.final(own, Failed).code == "deadline-exceeded"
    engine.now = 5.0
    engine.run()
    assert engine.final(slow, Failed).code == "deadline-exceeded"
    assert engine.all_pages_are_free()


def test_a_prompt_longer_than_the_pages_of_a_window_still_gets_through() -> None:
    engine = SteppedEngine(dummy(groups=("window",), window=6, num_pages=4, page_size=2))
    engine.create(1)
    roomy = SteppedEngine(dummy(groups=("window",), window=6, num_pages=100, page_size=2))
    roomy.create(1)
    prompt = [(5 * i) % 97 for i in range(60)]
    assert engine.draw(1, prompt) == roomy.draw(1, prompt)


def test_states_kept_for_going_back_give_way_to_contexts_that_want_to_run() -> None:
    engine = SteppedEngine(dummy(groups=("state",), num_pages=4), checkpoint_tokens=1)
    for context in (1, 2, 3):
        engine.create(context)
        engine.forward(context, [1, 2, 3, 4])
        engine.forward(context, [5])
    assert [engine.forward(context, [6]).length for context in (1, 2, 3)] == [6, 6, 6]


def test_noise_is_counted_by_token_slot_and_epoch() -> None:
    seen: list[ForwardBatch] = []

    class Watched(BrokenDriver):
        def submit(self, batch: ForwardBatch) -> Ticket:
            seen.append(batch)
            return super().submit(batch)

    engine = SteppedEngine(Watched(dummy()))
    engine.create(1, seed=77)
    engine.forward(1, [1, 2], samples=(Sample(1, RANDOM), Sample(1, SamplerSpec(seed=5)), Sample(0, RANDOM)))
    engine.send(TruncateContext(ContextId(1), 1))
    engine.forward(1, [3], positions=(40,), samples=(Sample(0, RANDOM),))

    def column(name: str, batch: int) -> Any:
        return np.asarray(getattr(seen[batch].samplers, name)).tolist()

    assert [column(name, 0) for name in ("rows", "index", "slot", "stream", "epoch")] == [
        [0, 1, 1],
        [1, 2, 2],
        [0, 0, 1],
        [77, 77, 5],
        [0, 0, 0],
    ]
    assert [column(name, 1) for name in ("index", "stream", "epoch")] == [[2], [77], [1]]
