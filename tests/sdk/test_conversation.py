"""Chat and reasoning decoders, sessions, models and the run's surroundings."""

from __future__ import annotations

import asyncio
import base64

import pytest
from inferlet import Model, chat, get_return_value, reasoning, runtime, session, set_return, tools
from inferlet.errors import InferletError
from inferlet.event_loop import run
from inferlet.host import call

from tests.sdk.fake_host import CUE, END, World, refuse, turn


def test_token_helpers_render_single_turns() -> None:
    model = Model.load()
    assert chat.system(model, "s") == turn("system", "s")
    assert chat.user(model, "u") == turn("user", "u")
    assert chat.assistant(model, "a") == turn("assistant", "a")
    assert (chat.cue(model), chat.seal(model), chat.stop_tokens(model)) == ([CUE], [END], [END])


def test_a_chat_decoder_gives_one_event_for_a_batch() -> None:
    decoder = chat.Decoder(Model.load())
    assert decoder.feed([104, 105]) == chat.Event.Delta("hi")
    assert decoder.feed([]) == chat.Event.Idle()
    assert decoder.feed([33, END]) == chat.Event.Done("hi!")
    decoder.reset()
    assert decoder.feed([END]) == chat.Event.Done("")


def test_events_that_one_batch_has_no_room_for_come_with_the_next() -> None:
    decoder = chat.Decoder(Model.load())
    assert decoder.feed([104, 256, 105]) == chat.Event.Delta("h")
    assert decoder.feed([]) == chat.Event.Interrupt(256)
    assert decoder.feed([106]) == chat.Event.Delta("ij")


def test_a_reasoning_decoder_reports_the_block() -> None:
    decoder = reasoning.Decoder(Model.load())
    assert decoder.feed(b"no") == reasoning.Event.Idle()
    assert decoder.feed(b"<a") == reasoning.Event.Start()
    assert decoder.feed(b"b") == reasoning.Event.Delta("ab")
    assert decoder.feed(b"c>") == reasoning.Event.End("abc")


def test_a_tool_decoder_reports_calls_and_what_is_none() -> None:
    decoder = tools.Decoder(Model.load())
    assert decoder.feed(b"no") == tools.Event.Idle()
    assert decoder.feed(b"(x)") == tools.Event.Start()
    assert decoder.feed(b"(") == tools.Event.Call("f", '{"city": "東京"}')
    assert decoder.feed(b"") == tools.Event.Start()
    assert decoder.feed([END]) == tools.Event.Invalid("(oh")
    decoder.reset()
    assert decoder.feed([]) == tools.Event.Idle()


def test_tools_and_answers_can_be_had_as_tokens() -> None:
    model = Model.load()
    assert tools.equip_prefix(model, [{"name": "f"}]) == turn("user", '[{"name": "f"}]')
    assert tools.answer_prefix(model, "f", [1]) == turn("user", "f [1]")


def test_decoders_give_what_is_left_when_no_more_tokens_come() -> None:
    model = Model.load()
    spoken, thought, called = chat.Decoder(model), reasoning.Decoder(model), tools.Decoder(model)
    spoken.feed([104, 256, 105])
    assert spoken.finish() == [chat.Event.Interrupt(256), chat.Event.Delta("i"), chat.Event.Done("hi")]
    thought.feed(b"<ab")
    assert thought.finish() == [reasoning.Event.Delta("ab"), reasoning.Event.End("ab")]
    called.feed(b"(x)(")
    call = tools.Event.Call("f", '{"city": "東京"}')
    assert called.finish() == [call, tools.Event.Start(), tools.Event.Invalid("(oh")]
    assert (thought.finish(), called.finish()) == ([], [])


def test_messages_pass_while_other_tasks_run(world: World) -> None:
    world.inbox += [(2_000_000_000, "hello"), (3_000_000_000, None)]

    async def main() -> tuple[str | None, str | None, float]:
        sleep = asyncio.create_task(asyncio.sleep(1))
        first = await session.receive()
        assert sleep.done()
        return first, await session.receive(), asyncio.get_running_loop().time()

    assert run(main()) == ("hello", None, 3.0)


def test_what_is_sent_is_text_or_json(world: World) -> None:
    session.send("plain")
    session.send({"n": 1})
    session.send_file(b"\x00\xff")
    assert world.outbox == ["plain", '{"n": 1}', base64.b64encode(b"\x00\xff").decode()]


def test_a_file_arrives_as_bytes(world: World) -> None:
    world.inbox.append((0, base64.b64encode(b"\x00\xff").decode()))
    assert run(session.receive_file()) == b"\x00\xff"


def test_the_surroundings_are_known(world: World) -> None:
    assert (runtime.version(), runtime.instance_id(), runtime.username()) == ("1.2.3", "instance", "somebody")
    assert runtime.models() == ["fake"]
    runtime.log("careful", "warn")
    assert world.log == [("WARN", "careful")]


def test_models_and_tokenizers_describe_themselves() -> None:
    model = Model.load("fake")
    assert (model.name, model.describe()["vocab_size"]) == ("fake", 260)
    assert not model.default_system_speculation()
    tokenizer = model.tokenizer()
    assert tokenizer.decode(tokenizer.encode("über")) == "über"
    ids, texts = tokenizer.vocabs()
    assert texts[ids.index(97)] == b"a"
    assert tokenizer.special_tokens()[0] == [256, 257, 258, 259]


def test_an_unknown_code_is_kept() -> None:
    def fails() -> None:
        raise refuse("brand-new", "something else")

    with pytest.raises(InferletError) as caught:
        call(fails)
    assert (type(caught.value), caught.value.code) == (InferletError, "brand-new")


def test_a_return_value_can_be_set_from_anywhere() -> None:
    set_return("this")
    assert get_return_value() == "this"
