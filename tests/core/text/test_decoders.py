"""Events from streamed tokens, however these are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from pie_core.errors import InvalidRequest
from pie_core.text.decoders import (
    ChatDecoder,
    Event,
    ReasoningDecoder,
    ReasoningMarkers,
    find_reasoning_markers,
)
from pie_core.text.text_model import TextModel
from pie_core.text.tokenizer import Tokenizer

MakeModel = Callable[[str], TextModel]
THINK = ReasoningMarkers("<think>", "</think>")
PIECES = ["<think>", "</think>", "<th", "ink>", "a", " 🎉", "<", "</", "<|im_end|>", "<|im_start|>", "über"]


class Decoder(Protocol):
    def feed(self, tokens: Sequence[int]) -> list[Event]: ...
    def finish(self) -> list[Event]: ...


def merged(events: list[Event]) -> list[Event]:
    """Events with neighbouring deltas joined: what must not depend on how tokens were cut into steps."""
    kept: list[Event] = []
    for event in events:
        if kept and kept[-1].kind == event.kind == "delta":
            kept[-1] = Event("delta", kept[-1].text + event.text)
        else:
            kept.append(event)
    return kept


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in merged(events)]


@pytest.fixture
def tokenizer(byte_level_backend: Backend) -> Tokenizer:
    return Tokenizer(byte_level_backend, "tiny")


@pytest.mark.parametrize("kind", ["chat", "reasoning", "begun reasoning"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_events_do_not_depend_on_how_tokens_are_cut(
    tokenizer: Tokenizer, kind: str, data: st.DataObject
) -> None:
    def decoder() -> Decoder:
        if kind == "chat":
            return ChatDecoder(tokenizer, [tokenizer.encode("<|im_end|>")[0]])
        markers = ReasoningMarkers("<think>", "</think>", begun=kind.startswith("begun"))
        return ReasoningDecoder(tokenizer, markers, [tokenizer.encode("<|im_end|>")[0]])

    texts = data.draw(st.lists(st.sampled_from(PIECES), max_size=8))
    loose = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=4))
    tokens = [token for text in texts for token in tokenizer.encode(text)] + loose
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
    at_once, in_steps = decoder(), decoder()
    expected = at_once.feed(tokens) + at_once.finish()
    events = [e for a, b in zip([0, *cuts], [*cuts, None], strict=True) for e in in_steps.feed(tokens[a:b])]
    assert merged(events + in_steps.finish()) == merged(expected)


def test_a_turn_is_deltas_and_then_done_with_all_of_it(make_model: MakeModel) -> None:
    model = make_model("chatml")
    decoder = model.decoder("chat")
    events = decoder.feed(model.tokenizer.encode("Hello 🎉<|im_end|>Next"))
    assert merged(events) == [Event("delta", "Hello 🎉"), Event("done", "Hello 🎉"), Event("delta", "Next")]


def test_a_character_is_shown_when_it_is_whole(make_model: MakeModel) -> None:
    model = make_model("chatml")
    decoder = model.decoder("chat")
    single_bytes = {data: index for index, data in model.tokenizer.vocabulary() if len(data) == 1}
    tokens = [single_bytes[bytes([byte])] for byte in "🎉".encode()]
    assert [decoder.feed([token]) for token in tokens] == [[], [], [], [Event("delta", "🎉")]]
    assert decoder.feed(tokens[:2]) == []
    assert decoder.finish() == [Event("delta", "�"), Event("done", "🎉�")], "cut off in the middle"


def test_a_control_token_that_is_no_stop_token_interrupts(make_model: MakeModel) -> None:
    model = make_model("chatml")
    start = model.tokenizer.token_id("<|im_start|>")
    assert start is not None
    events = model.decoder("chat").feed(model.tokenizer.encode("Hi<|im_start|>there"))
    assert merged(events) == [Event("delta", "Hi"), Event("interrupt", token=start), Event("delta", "there")]


def test_a_reset_decoder_is_as_new(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    for kind in ("chat", "reasoning"):
        decoder = model.decoder(kind)
        decoder.feed(model.tokenizer.encode("<think>half"))
        decoder.reset()
        fresh = model.decoder(kind)
        tokens = model.tokenizer.encode("a<think>b</think>c<|im_end|>")
        assert decoder.feed(tokens) == fresh.feed(tokens)


def test_ids_outside_the_vocabulary_are_refused_before_anything_is_read(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    for kind in ("chat", "reasoning"):
        decoder = model.decoder(kind)
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            decoder.feed([*model.tokenizer.encode("<think>a"), model.tokenizer.size])
        assert "start" not in kinds(decoder.finish())
    with pytest.raises(
        InvalidRequest, match="unknown decoder 'audio'; expected 'chat', 'reasoning' or 'tools'"
    ):
        model.decoder("audio")


def test_reasoning_starts_streams_and_completes(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    events = model.decoder("reasoning").feed(model.tokenizer.encode("Hm <think>one < two</think>three"))
    assert merged(events) == [Event("start"), Event("delta", "one < two"), Event("complete", "one < two")]


def test_reasoning_that_the_cue_began_needs_no_opening_marker(make_model: MakeModel) -> None:
    model = make_model("deepseek")
    assert model.reasoning_markers.begun
    events = model.decoder("reasoning").feed(model.tokenizer.encode("hm</think>Hello"))
    assert merged(events) == [Event("start"), Event("delta", "hm"), Event("complete", "hm")]


def test_reasoning_that_is_cut_off_is_completed_as_far_as_it_came(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    for end in ("<|im_end|>", ""):
        decoder = model.decoder("reasoning")
        events = decoder.feed(model.tokenizer.encode("<think>never ends </thi" + end)) + decoder.finish()
        assert merged(events) == [
            Event("start"),
            Event("delta", "never ends </thi"),
            Event("complete", "never ends </thi"),
        ]


def test_markers_come_from_the_template_or_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert find_reasoning_markers(tokenizer, "", "") == THINK
    assert find_reasoning_markers(tokenizer, "… [/THINK] …", "") == ReasoningMarkers("[THINK]", "[/THINK]")
    assert find_reasoning_markers(tokenizer, "", "<think>\n").begun
    assert not find_reasoning_markers(tokenizer, "", "<think>\n\n</think>\n\n").begun
