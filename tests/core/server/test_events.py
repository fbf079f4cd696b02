"""The events of a process: in order, counted, bounded; held back while somebody reads, dropped while nobody does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_core.sandbox.hosting import Pending
from pie_core.server.events import EventBuffer, ProcessOutput


def message(text: str) -> ProcessOutput:
    return ProcessOutput("message", text)


def taken(buffer: EventBuffer) -> list[tuple[int, str, int]]:
    """Everything that can be taken: number, text, how many were dropped before."""
    found = []
    while (event := buffer.take()) is not None:
        found.append((event.seq, str(event.output.value), event.dropped))
    return found


def test_a_full_buffer_holds_the_program_back_while_somebody_reads() -> None:
    buffer = EventBuffer(2, 10_000)
    buffer.attach(lambda: None)
    assert buffer.put(message("a")) is None
    held = buffer.put(message("b"))
    assert held is not None
    states = [(held.done, buffer.is_holding)]
    buffer.take()
    assert [*states, (held.done, buffer.is_holding)] == [(False, True), (True, False)]
    assert taken(buffer) == [(2, "b", 0)]


def test_a_program_is_let_go_when_its_reader_leaves() -> None:
    buffer = EventBuffer(1, 10_000)
    buffer.attach(lambda: None)
    held = buffer.put(message("a"))
    assert held is not None
    buffer.detach()
    assert held.done
    assert buffer.put(message("b")) is None
    buffer.attach(lambda: None)
    assert taken(buffer) == [(2, "b", 1)]


def test_bytes_count_as_well_as_events_but_one_event_always_fits() -> None:
    buffer = EventBuffer(100, 1000)
    for text in ("a" * 400, "b" * 400, "c" * 400):
        buffer.put(message(text))
    buffer.put(message("d" * 5000))
    assert [(seq, text[0], dropped) for seq, text, dropped in taken(buffer)] == [(4, "d", 3)]


def test_a_reader_is_told_of_what_is_there_when_it_comes_and_of_what_comes_later() -> None:
    calls: list[int] = []
    buffer = EventBuffer(10, 10_000)
    buffer.put(message("a"))
    buffer.attach(lambda: calls.append(1))
    buffer.put(message("b"))
    assert len(calls) == 2


def test_a_reader_that_comes_back_gets_what_it_has_not_got() -> None:
    buffer = EventBuffer(3, 10_000)
    buffer.attach(lambda: None)
    for text in "abcde":
        buffer.put(message(text))
        buffer.take()
    buffer.attach(lambda: None, after=3)
    assert taken(buffer) == [(4, "d", 0), (5, "e", 0)]
    buffer.attach(lambda: None, after=0)
    assert taken(buffer) == [(3, "c", 2), (4, "d", 0), (5, "e", 0)]
    buffer.attach(lambda: None, after=99)
    assert taken(buffer) == []


Step = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 300)),
    st.tuples(st.just("take"), st.just(0)),
    st.tuples(st.just("attach"), st.just(0)),
    st.tuples(st.just("return"), st.integers(0, 5)),
    st.tuples(st.just("detach"), st.just(0)),
)


@given(st.lists(Step, max_size=60), st.integers(1, 6))
def test_nothing_is_lost_uncounted_in_any_order_of_use(steps: list[tuple[str, int]], capacity: int) -> None:
    buffer = EventBuffer(capacity, 1000)
    is_attached = False
    put = reached = 0  # the last number that was given, and that the reader knows of
    held: list[Pending[None]] = []
    for step, value in steps:
        if step == "put" and not any(not each.done for each in held):
            put += 1
            pending = buffer.put(message("x" * value))
            held += [pending] if pending is not None else []
        elif step == "take" and is_attached and (event := buffer.take()) is not None:
            assert event.seq == reached + event.dropped + 1
            reached = event.seq
        elif step in ("attach", "return"):
            after = None if step == "attach" else max(0, reached - value)
            buffer.attach(lambda: None, after)
            is_attached = True
            reached = reached if after is None else after
        elif step == "detach":
            buffer.detach()
            is_attached = False
            assert all(each.done for each in held)
        assert buffer.last_seq == put
    buffer.attach(lambda: None)
    for event_seq, _, dropped in taken(buffer):
        assert event_seq == reached + dropped + 1
        reached = event_seq
    assert reached == put or put == 0
