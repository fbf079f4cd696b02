"""Limits of one program and of the programs of a tenant: refused by type, and given back when something ends."""

from __future__ import annotations

import pytest

from pie_core.engine.messages import DropContext, EndProcess, Failed, Forward, Generated
from pie_core.ids import ContextId, ProcessId
from tests.core.engine.stepping import SteppedEngine, dummy


def test_a_context_too_many_is_told_to_whoever_uses_it() -> None:
    engine = SteppedEngine(max_contexts_per_process=2, max_contexts_per_tenant=3)
    for context, process in ((1, "p"), (2, "p"), (3, "p"), (4, "q"), (5, "q"), (6, "r")):
        engine.create(context, process, tenant="u" if process == "r" else "t")
    failed = engine.refused(3)
    assert (failed.code, failed.message) == (
        "limit-exceeded",
        "'p' would have 3 contexts; the limit is 2 (limits.contexts_per_program of the model)",
    )
    assert "'t' would have 4 contexts; the limit is 3" in engine.refused(5).message
    for context in (1, 2, 4, 6):
        assert engine.forward(context, [1]).length == 1
    engine.fork(1, 7)
    assert "the limit is 2" in engine.refused(7).message
    engine.send(DropContext(ContextId(3)), DropContext(ContextId(2)))
    engine.fork(1, 8)
    assert engine.forward(8, [1]).length == 2


def test_requests_count_while_they_are_open() -> None:
    engine = SteppedEngine(max_requests_per_process=2, max_requests_per_tenant=3)
    for context, process in ((1, "p"), (2, "q")):
        engine.create(context, process)
    requests = [engine.submit(context, [1]) for context in (1, 1, 1, 2, 2)]
    failed = engine.final(requests[2], Failed)
    assert (failed.code, "would have 3 open requests; the limit is 2" in failed.message) == (
        "limit-exceeded",
        True,
    )
    assert "'t' would have 4" in engine.final(requests[4], Failed).message
    engine.run()
    assert engine.forward(1, [1]).length == 3


def test_a_program_may_feed_and_draw_so_many_tokens() -> None:
    engine = SteppedEngine(max_tokens_per_process=10)
    engine.create(1)
    engine.create(2, process="other")
    request = engine.begin_generation(1, [1, 2, 3], 0)
    engine.run()
    assert engine.final(request, Generated).finish == "length"
    assert len(engine.generated(request)) == 7
    assert "would have 11 tokens in all; the limit is 10" in engine.refused(1).message
    assert engine.forward(2, [1]).length == 1


@pytest.mark.parametrize("speculation_depth", [0, 2])
def test_a_tenant_s_programs_may_feed_and_draw_so_many_tokens_in_a_minute(speculation_depth: int) -> None:
    engine = SteppedEngine(max_tokens_per_minute_per_tenant=60, speculation_depth=speculation_depth)
    for context, process in ((1, "p"), (2, "q"), (3, "r")):
        engine.create(context, process, tenant="u" if process == "r" else "t")
    assert len(engine.generate(1, [1] * 10, 40)) == 40
    assert engine.forward(2, [1] * 9).length == 9
    assert len(engine.generate(2, [1], 30)) == 30  # one token is left, so it begins; and then it goes on
    failed = engine.refused(1)
    assert failed.code == "limit-exceeded"
    assert "'t' has fed and drawn 90 tokens" in failed.message
    assert "the limit is 60 in a minute (limits.tokens_per_minute_per_tenant" in failed.message
    assert engine.forward(3, [1]).length == 1
    engine.send(EndProcess(ProcessId("p")))
    engine.create(4, "s")
    assert engine.refused(4).code == "limit-exceeded"  # programs that end take nothing along
    engine.now = 29.0
    assert engine.refused(4).code == "limit-exceeded"
    engine.now = 31.0
    assert engine.forward(4, [1]).length == 1
    assert engine.refused(4).code == "limit-exceeded"
    engine.now = 1000.0
    assert len(engine.generate(4, [1], 20)) == 20


def test_a_program_may_fill_a_part_of_the_pages() -> None:
    engine = SteppedEngine(
        dummy(num_pages=16), max_page_share_per_process=0.25, max_page_share_per_tenant=0.5
    )
    for context, process in ((1, "p"), (2, "p"), (3, "q"), (4, "r")):
        engine.create(context, process)
    assert engine.forward(1, [1] * 12).length == 12
    assert (
        "'p' would have 5 pages of cache group 'paged'; the limit is 4" in engine.refused(2, [1] * 8).message
    )
    assert engine.forward(3, [2] * 16).length == 16
    assert "'t' would have 9 pages" in engine.refused(4, [3] * 8).message
    engine.send(EndProcess(ProcessId("q")))
    assert engine.forward(4, [3] * 8).length == 8


def test_programs_take_turns_whatever_the_number_of_their_contexts() -> None:
    engine = SteppedEngine(max_batch_requests=4, speculation_depth=0, max_in_flight=1)
    engine.create(100, process="small")
    for context in range(1, 40):
        engine.create(context, process="large")
    large = [engine.begin_generation(context, [1], 20) for context in range(1, 40)]
    small = engine.begin_generation(100, [1], 20)
    while not engine.is_answered(small):
        engine.start()
        engine.finish()
    assert len(engine.generated(small)) == 20
    assert sum(len(engine.generated(each)) for each in large) <= 3 * 21


def test_tenants_take_turns_before_their_programs_do() -> None:
    engine = SteppedEngine(max_batch_requests=2, speculation_depth=0, max_in_flight=1)
    engine.create(100, process="lonely", tenant="u")
    for context in range(1, 10):
        engine.create(context, process=f"p{context}")
    crowd = [engine.begin_generation(context, [1], 9) for context in range(1, 10)]
    lonely = engine.begin_generation(100, [1], 9)
    while not engine.is_answered(lonely):
        engine.start()
        engine.finish()
    assert sum(len(engine.generated(each)) for each in crowd) <= 10


def test_a_higher_priority_goes_first_and_keeps_its_pages() -> None:
    engine = SteppedEngine(dummy(num_pages=8), max_batch_requests=1, max_in_flight=1, speculation_depth=0)
    requests = []
    for context, priority in ((1, 0), (2, 0), (3, 5)):
        engine.create(context, process=str(context))
        request = engine.new_request()
        engine.send(Forward(request, ContextId(context), tuple([context] * 20), priority=priority))
        requests.append(request)
    while not engine.is_answered(requests[2]):
        engine.start()
        engine.finish()
    assert not engine.is_answered(requests[0])
    assert not engine.is_answered(requests[1])
    engine.run()
    assert all(engine.is_answered(each) for each in requests)
