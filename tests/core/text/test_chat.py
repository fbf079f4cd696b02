"""Transcripts: fed piece by piece, rendered as a whole; forks, truncation, and templates that rewrite the past."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pie_core.errors import InvalidRequest, LoadError
from pie_core.text.chat import Transcript
from pie_core.text.templates import ChatTemplate, Message, TemplateSource
from pie_core.text.text_model import TextModel
from pie_core.text.turns import SystemStyle, TemplateTurns

MakeModel = Callable[[str], TextModel]
NOON = datetime(2026, 1, 2, 12)


class Context:
    """What a context does with its transcript: feeds what is pending, and lets a model answer."""

    def __init__(self, model: TextModel) -> None:
        self.model = model
        self.transcript = Transcript(model, now=NOON)

    def flush(self) -> str:
        return self.model.tokenizer.decode_continuation(self.transcript.drain())

    def answer(self, text: str) -> None:
        self.transcript.cue()
        self.flush()
        for token in self.model.tokenizer.encode(text):
            self.transcript.note_generated([token])

    @property
    def text(self) -> str:
        """All text, fed and waiting."""
        tokens = self.transcript.fed_tokens + self.transcript.pending_tokens()
        return self.model.tokenizer.decode_continuation(tokens)

    def whole(self, messages: list[Message], cue: bool = False) -> str:
        return self.model.template.render(messages, cue, NOON)


def said(*pairs: tuple[str, str]) -> list[Message]:
    return [{"role": role, "content": text} for role, text in pairs]


texts = st.lists(
    st.sampled_from(["Paris", "is", "12", "über", "日本", "🎉", "don't", "a\nb", "?"]), min_size=1, max_size=4
).map(" ".join)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "qwen3"])
@given(system=st.none() | texts, exchanges=st.lists(st.tuples(texts, texts, st.data()), max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_fed_piece_by_piece_is_the_whole_rendering(
    make_model: MakeModel, style: str, system: str | None, exchanges: list[tuple[str, str, st.DataObject]]
) -> None:
    context = Context(make_model(style))
    messages: list[Message] = []
    if system is not None:
        context.transcript.add_text("system", system)
        messages += said(("system", system))
    for question, answer, data in exchanges:
        choose = data.draw
        if choose(st.booleans()):
            context.flush()
        half = choose(st.integers(0, len(question)))
        context.transcript.add_text("user", question[:half])
        context.transcript.add_text("user", question[half:])
        if choose(st.booleans()):
            context.flush()
        if choose(st.booleans()) or style == "qwen3":
            context.answer(
                answer + choose(st.sampled_from(["", context.model.template.named_tokens["eos_token"]]))
            )
        else:
            context.transcript.add_text("assistant", answer)
        if choose(st.booleans()) and style != "gemma":
            context.transcript.seal()
        if choose(st.booleans()):
            context.flush()
        messages += said(("user", question), ("assistant", answer))
    context.transcript.add_text("user", "Last")
    context.transcript.cue()
    context.transcript.cue()
    expected = context.whole([*messages, *said(("user", "Last"))], cue=True)
    if style == "gemma":  # an answer that was ended by <eos>, not by the template's own end, keeps it
        assert context.text.replace("<eos>", "") == expected
    else:
        assert context.text == expected
    if style == "chatml":
        assert (
            context.transcript.fed_tokens + context.transcript.pending_tokens()
            == context.model.tokenizer.encode(expected)
        )


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_peeking_changes_nothing_and_truncation_goes_back(make_model: MakeModel, data: st.DataObject) -> None:
    context = Context(make_model(data.draw(st.sampled_from(["chatml", "mistral", "deepseek"]))))
    forks: dict[int, Transcript] = {}
    for step in range(data.draw(st.integers(1, 5))):
        context.transcript.add_text("user", f"question {step}")
        assert context.transcript.pending_tokens() == context.transcript.fork().drain()
        assert context.transcript.pending_tokens() == context.transcript.fork().drain()
        context.answer(f"answer {step}")
        forks[len(context.transcript.fed_tokens)] = context.transcript.fork()
    context.transcript.add_text("user", "dropped with the buffer")
    length = data.draw(st.sampled_from(sorted(forks)))
    context.transcript.truncate(length)
    assert context.transcript.fed_tokens == forks[length].fed_tokens
    assert context.transcript.conversation == forks[length].conversation
    opened = Transcript(context.model)
    opened.restore(context.transcript.to_bytes())
    for transcript in (context.transcript, forks[length], opened):
        transcript.add_text("user", "again")
    assert context.transcript.drain() == forks[length].fork().drain() == opened.drain()
    again = min(forks)
    for transcript in (context.transcript, opened):
        transcript.truncate(again)
        transcript.add_text("user", "and again")
    assert context.transcript.drain() == opened.drain()


def test_a_default_system_prompt_is_written_exactly_once(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    for number in range(3):
        context.transcript.add_text("user", f"q{number}")
        context.flush()
        context.answer(f"a{number}")
    assert context.text.count("You are Tiny.") == 1
    own = Context(make_model("chatml"))
    own.transcript.add_text("system", "Mine.")
    own.transcript.add_text("user", "q")
    assert "You are Tiny." not in own.text


def test_an_open_turn_takes_parts_until_another_role_a_cue_or_a_flush(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "one ")
    context.transcript.add_text("user", "two")
    assert context.text.endswith("<|im_start|>user\none two<|im_end|>\n")
    context.flush()
    context.transcript.add_text("user", "three")
    assert context.flush() == "<|im_start|>user\nthree<|im_end|>\n"


def test_cue_and_seal_do_their_work_once(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    context.answer("Hello")
    context.transcript.cue()
    assert context.flush() == "", "the turn is still open"
    context.transcript.seal()
    context.transcript.seal()
    assert context.flush() == "<|im_end|>\n"
    context.transcript.seal()
    assert context.flush() == ""
    context.transcript.cue()
    assert context.flush() == "<|im_start|>assistant\n"


def test_a_stop_token_that_was_fed_is_not_written_again(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    context.answer("Hello<|im_end|>")
    context.transcript.seal()
    assert context.flush() == "\n"
    again = Context(make_model("chatml"))
    again.transcript.add_text("user", "Hi")
    again.answer("Hello<|im_end|>")
    again.transcript.cue()
    assert again.flush() == "\n<|im_start|>assistant\n", "a finished turn can be followed by another"


def test_tokens_and_text_after_a_cue_begin_the_answer(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    context.transcript.cue()
    context.transcript.append(context.model.tokenizer.encode("Sure"))
    context.transcript.add_text("assistant", ", I am")
    assert context.flush().endswith("<|im_start|>assistant\nSure, I am")
    context.answer(" fine")
    context.transcript.add_text("user", "Bye")
    expected = said(("user", "Hi"), ("assistant", "Sure, I am fine"), ("user", "Bye"))
    assert context.text == context.whole(expected)
    assert [turn.text for turn in context.transcript.conversation] == ["Hi", "Sure, I am fine", "Bye"]


def test_raw_tokens_close_the_open_turn_and_stay_outside_of_turns(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    context.transcript.append(context.model.tokenizer.encode("RAW"))
    context.transcript.add_text("user", "Bye")
    assert context.text.endswith("Hi<|im_end|>\nRAW<|im_start|>user\nBye<|im_end|>\n")
    context.transcript.append(context.model.turn_tokens("cue"))
    context.transcript.append(context.model.tokenizer.encode("by hand"))
    context.transcript.seal()
    context.transcript.seal()
    assert context.text.endswith("<|im_start|>assistant\nby hand<|im_end|>\n")


def test_raw_tokens_outside_the_vocabulary_are_refused(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    before = context.text
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        context.transcript.append([context.model.tokenizer.size])
    assert context.text == before


def test_stripped_thinking_stays_in_the_context_and_the_next_turn_follows(make_model: MakeModel) -> None:
    context = Context(make_model("qwen3"))
    context.transcript.add_text("user", "Hi")
    context.answer("<think>\nhm\n</think>\n\nHello")
    context.transcript.add_text("user", "Bye")
    context.transcript.cue()
    assert context.flush() == "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    assert "hm" in context.text
    context.answer("Bye")
    context.transcript.seal()
    assert context.flush() == "<|im_end|>\n"


def test_a_cue_that_opens_the_thinking_is_followed_by_the_answer_as_it_came(make_model: MakeModel) -> None:
    context = Context(make_model("deepseek"))
    context.transcript.add_text("user", "Hi")
    context.answer("hm</think>Hello")
    context.transcript.add_text("user", "Bye")
    context.transcript.cue()
    assert context.flush() == "</s><|im_start|>Bye<|im_end|><think>\n"


def test_a_trimmed_answer_is_not_fed_again(make_model: MakeModel) -> None:
    context = Context(make_model("gemma"))
    context.transcript.add_text("user", "Hi")
    context.answer(" Hello \n")
    context.transcript.add_text("user", "Bye")
    assert context.flush() == "<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"


def test_an_answer_without_a_written_space_is_still_ended_by_the_template(make_model: MakeModel) -> None:
    context = Context(make_model("mistral"))
    context.transcript.add_text("user", "Hi")
    context.answer("Hello")
    context.transcript.add_text("user", "Bye")
    context.transcript.cue()
    assert context.flush() == "</s>[INST] Bye [/INST]"
    assert context.text == "<s>[INST] Hi [/INST]Hello</s>[INST] Bye [/INST]"


def test_the_systems_words_wait_for_a_user_turn_where_the_template_writes_them_there(
    make_model: MakeModel,
) -> None:
    context = Context(make_model("gemma"))
    context.transcript.add_text("system", "Be brief.")
    assert context.flush() == ""
    context.transcript.add_text("user", "Hi")
    assert context.flush() == "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"


def test_the_systems_words_begin_the_users_turn_where_the_template_refuses_them(
    make_model: MakeModel,
) -> None:
    context = Context(make_model("mistral"))
    context.transcript.add_text("system", "Be brief.")
    context.transcript.add_text("user", "Hi")
    assert context.flush() == "<s>[INST] Be brief.\n\nHi [/INST]"


@pytest.mark.parametrize("style", ["gemma", "mistral"])
def test_the_systems_words_are_never_lost_without_a_user_turn(make_model: MakeModel, style: str) -> None:
    context = Context(make_model(style))
    context.transcript.add_text("system", "Be brief.")
    context.transcript.cue()
    assert "Be brief." in context.flush()


def test_turns_that_a_strict_template_refuses_together_are_written_on_their_own(
    make_model: MakeModel,
) -> None:
    context = Context(make_model("gemma"))
    context.transcript.add_text("user", "Hi")
    context.flush()
    context.transcript.add_text("user", "And?")
    context.transcript.cue()
    assert context.flush() == "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n"
    context.answer("Yes")
    context.transcript.add_text("user", "Bye")
    assert context.flush() == "<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"


def test_a_beginning_that_the_template_refuses_is_refused_and_changes_nothing(make_model: MakeModel) -> None:
    context = Context(make_model("gemma"))
    context.transcript.add_text("assistant", "I begin")
    with pytest.raises(InvalidRequest, match=r"gemma\.jinja, line \d+: Roles must alternate"):
        context.transcript.drain()
    assert context.transcript.fed_tokens == []
    assert [turn.text for turn in context.transcript.conversation] == ["I begin"]


def test_an_unknown_role_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(InvalidRequest, match="unknown role 'tool'; expected one of system, user, assistant"):
        make_model("chatml").transcript().add_text("tool", "x")


def test_a_final_end_that_only_an_uncued_template_writes_is_left_out(make_model: MakeModel) -> None:
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>answer:' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    )
    plain = make_model("chatml")
    context = Context(
        TextModel(plain.tokenizer, ChatTemplate(TemplateSource(text, "final")), plain.eos_tokens)
    )
    context.transcript.add_text("user", "Hi")
    assert context.flush() == "<|im_start|>Hi<|im_end|>"
    context.transcript.cue()
    assert context.flush() == "<|im_start|>answer:"


def test_a_fork_goes_its_own_way(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    context.answer("Hel")
    twin = context.transcript.fork()
    twin.note_generated(context.model.tokenizer.encode("lo"))
    context.transcript.add_text("user", "Bye")
    assert [turn.text for turn in twin.conversation] == ["Hi", "Hello"]
    assert [turn.text for turn in context.transcript.conversation] == ["Hi", "Hel", "Bye"]


def test_a_saved_transcript_is_opened_with_its_buffer_and_its_date(make_model: MakeModel) -> None:
    model = make_model("llama3")
    context = Context(model)
    context.transcript.add_text("user", "Hi")
    context.answer("Hel")
    context.transcript.add_text("user", "Bye")
    opened = Transcript(model, now=datetime(2030, 1, 1))
    opened.restore(context.transcript.to_bytes())
    assert opened.conversation == context.transcript.conversation
    assert opened.drain() == context.transcript.drain()
    assert opened.fed_tokens == context.transcript.fed_tokens
    with pytest.raises(LoadError, match="transcript of a snapshot cannot be read"):
        opened.restore(context.transcript.to_bytes()[:-3])
    with pytest.raises(LoadError, match="transcript of a snapshot cannot be read"):
        opened.restore(b"\x00")


def test_a_stop_token_inside_an_answer_is_not_its_end(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    context.answer("Hel<|im_end|>lo")
    context.transcript.seal()
    assert context.flush() == "<|im_end|>\n"


def test_truncating_into_an_answer_keeps_its_beginning(make_model: MakeModel) -> None:
    context = Context(make_model("chatml"))
    context.transcript.add_text("user", "Hi")
    context.transcript.cue()
    context.flush()
    opened = len(context.transcript.fed_tokens)
    hello, bye = (context.model.tokenizer.encode(text) for text in ("Hello", " and bye"))
    context.transcript.note_generated(hello + bye)
    context.transcript.add_text("user", "More")
    context.flush()
    context.transcript.truncate(opened + len(hello))
    context.transcript.add_text("user", "Again")
    expected = said(("user", "Hi"), ("assistant", "Hello"), ("user", "Again"))
    assert context.text == context.whole(expected)
    with pytest.raises(InvalidRequest, match="cannot truncate to 100000 tokens"):
        context.transcript.truncate(100000)


def test_text_that_contains_a_marker_is_safe(make_model: MakeModel) -> None:
    context = Context(make_model("gemma"))
    context.transcript.add_text("user", "\ue0f10\ue0f2")
    context.answer(" \ue0f11\ue0f2 ")
    context.transcript.add_text("user", "\ue0f12\ue0f2")
    assert context.flush() == "<end_of_turn>\n<start_of_turn>user\n\ue0f12\ue0f2<end_of_turn>\n"


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", SystemStyle.OWN_TURN),
        ("llama3", SystemStyle.OWN_TURN),
        ("gemma", SystemStyle.WITH_USER),
        ("mistral", SystemStyle.REFUSED),
    ],
)
def test_what_a_template_does_with_the_system_is_found_out(
    make_model: MakeModel, style: str, expected: SystemStyle
) -> None:
    assert TemplateTurns(make_model(style).template).system_style is expected


def test_the_default_models_template_is_rendered_piece_by_piece(default_model: object) -> None:
    from pie_core.text.text_model import load_text

    model = load_text(str(default_model))
    context = Context(model)
    context.transcript.add_text("user", "Hi")
    context.answer("Hello!")
    context.transcript.add_text("user", "Bye")
    context.transcript.cue()
    whole = context.whole(said(("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")), cue=True)
    assert context.transcript.fed_tokens + context.transcript.pending_tokens() == model.tokenizer.encode(
        whole
    )
    assert model.stop_tokens == (2,)


actions = st.one_of(
    st.tuples(st.just("add_text"), st.sampled_from(["system", "user", "assistant"]), texts),
    st.tuples(st.sampled_from(["append", "note_generated"]), st.lists(st.integers(0, 300), max_size=3)),
    st.tuples(st.sampled_from(["cue", "seal", "drain"])),
    st.tuples(st.just("truncate"), st.integers(0, 40)),
)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma", "mistral", "qwen3", "deepseek"])
@given(steps=st.lists(actions, max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_whatever_order_it_is_used_nothing_fed_changes_and_copies_agree(
    make_model: MakeModel, style: str, steps: list[tuple[Any, ...]]
) -> None:
    transcript = Transcript(make_model(style), now=NOON)
    for name, *arguments in steps:
        fed, pending = transcript.fed_tokens, _pending(transcript)
        saved = Transcript(make_model(style))
        saved.restore(transcript.to_bytes())
        twin = transcript.fork()
        if name == "truncate":
            arguments = [min(arguments[0], len(fed))]
        outcomes = [_outcome(each, name, arguments) for each in (transcript, saved, twin)]
        assert outcomes[0] == outcomes[1] == outcomes[2]
        assert _pending(transcript) == _pending(saved) == _pending(twin)
        assert transcript.fed_tokens == saved.fed_tokens == twin.fed_tokens
        kept = arguments[0] if name == "truncate" else len(fed)
        assert transcript.fed_tokens[:kept] == fed[:kept]
        if name == "drain" and isinstance(pending, list):
            assert transcript.fed_tokens == fed + pending
            assert transcript.pending_tokens() == []


def _outcome(transcript: Transcript, name: str, arguments: list[Any]) -> object:
    try:
        return getattr(transcript, name)(*arguments)
    except InvalidRequest as refusal:
        return str(refusal)


def _pending(transcript: Transcript) -> list[int] | str:
    try:
        return transcript.pending_tokens()
    except InvalidRequest as refusal:
        return str(refusal)
