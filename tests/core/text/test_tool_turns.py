"""Tools in conversations: described, called and answered, fed piece by piece as transformers renders the whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from pie_core.errors import InvalidRequest, Unsupported
from pie_core.text.chat import Transcript
from pie_core.text.templates import ChatTemplate, Message, TemplateSource
from pie_core.text.text_model import TextModel

NOON = datetime(2026, 1, 2, 12)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like <outside>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TIME = {"name": "time"}
TIME_WRAPPED = {
    "type": "function",
    "function": {"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}},
}

# Short templates of the kinds that families use.
TAGGED = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
{{- '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
NUMBERED = """\
{%- set queue = namespace(ids=[]) -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{ '<|im_start|>tool\\n' + queue.ids.pop(0) + '\\n' + m.content + '<|im_end|>' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- if m.tool_calls -%}{{ '<|tool_calls_section_begin|>' }}
{%- for call in m.tool_calls -%}{% set _ = queue.ids.append(call.id) -%}
{{ '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' + call.function.arguments | tojson }}
{{- '<|tool_call_end|>' }}{% endfor %}{{ '<|tool_calls_section_end|>' }}{% endif %}{{ '<|im_end|>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
# Looks for calls only where there is no content, and writes arguments as they come.
AS_TEXT = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.role == 'assistant' and m.content is none %}{{ '<|im_start|>assistant<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls %}{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name }}
{{- '\\n```json\\n' + call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}
{{- '<｜tool▁calls▁end｜>' + eos_token }}
{%- else %}{{ '<|im_start|>' + m.role + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}
"""
# Results stand in the assistant's turn, right behind the calls.
INSIDE = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|tool_response>' + m.name + ':' + m.content + '<tool_response|>' }}
{%- else %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|turn>' + m.role + '\\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{{ '<|tool_call>call:' + call.function.name + '{' }}
{%- for key, value in call.function.arguments.items() %}{{ key + ':<|"|>' ~ value ~ '<|"|>' }}{% endfor %}
{{- '}<tool_call|>' }}{% endfor %}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<turn|>\\n' }}{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>assistant\\n' }}{% endif %}
"""
# Calls are a list without an end of its own, and ids have nine characters.
LISTED = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}
{%- endfor %}
"""
KINDS = {"tagged": TAGGED, "numbered": NUMBERED, "as text": AS_TEXT, "inside": INSIDE, "listed": LISTED}
REPLIES = {
    "tagged": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "numbered": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>',
    "as text": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "inside": '<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>',
    "listed": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}, "id": "call00000"}]',
}
STOP = "</s>"


@pytest.fixture
def model_of(make_model: Callable[[str], TextModel]) -> Callable[[str], TextModel]:
    def make(template: str) -> TextModel:
        plain = make_model("deepseek")  # ends turns with </s>
        source = TemplateSource(KINDS.get(template, template), f"{template[:8]}.jinja")
        return TextModel(plain.tokenizer, ChatTemplate(source, {"eos_token": STOP}), plain.eos_tokens)

    return make


def text_of(transcript: Transcript, model: TextModel) -> str:
    return model.tokenizer.decode_continuation(transcript.fed_tokens + transcript.pending_tokens())


def answer(transcript: Transcript, model: TextModel, text: str) -> None:
    transcript.cue()
    transcript.drain()
    transcript.note_generated(model.tokenizer.encode(text))


def reference(kind: str, messages: list[Message], tools: Sequence[Any] | None, cue: bool) -> str:
    """What transformers renders; for a template that it refuses for changing a list, what ours does."""
    render: Any = chat_template_utils.render_jinja_template
    if kind == "numbered":
        source = TemplateSource(KINDS[kind], kind)
        return ChatTemplate(source, {"eos_token": STOP}).render(messages, cue, NOON, {"tools": tools})
    pieces, _ = render(
        [messages],
        tools=tools,
        chat_template=KINDS[kind],
        add_generation_prompt=cue,
        eos_token=STOP,
        bos_token="<s>",
    )
    return str(pieces[0])


def call_message(kind: str, *calls: tuple[str, str, str]) -> Message:
    def arguments(text: str) -> Any:
        return text if kind == "as text" else json.loads(text)

    functions = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments(text)}}
        for name, text, id_ in calls
    ]
    return {"role": "assistant", "content": None if kind == "as text" else "", "tool_calls": functions}


def result_message(name: str, content: str, id_: str) -> Message:
    return {"role": "tool", "name": name, "tool_call_id": id_, "content": content}


def ids(kind: str, *names: str) -> list[str]:
    numbered = [f"functions.{name}:{place}" for place, name in enumerate(names)]
    return numbered if kind == "numbered" else [f"call0000{place}" for place in range(len(names))]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_and_results_of_a_program_are_rendered_as_transformers_renders_them(
    kind: str, model_of: Callable[[str], TextModel]
) -> None:
    model = model_of(kind)
    transcript = model.transcript(NOON)
    if kind == "tagged":
        transcript.equip(json.dumps([WEATHER, TIME]))
    transcript.add_text("user", "Hi")
    transcript.add_tool_call("weather", '{"city": "Rome"}')
    transcript.add_tool_call("time", "{}")
    if kind != "inside":  # which ends a turn that no result follows yet
        transcript.drain()
    transcript.add_tool_result("time", "12")
    transcript.add_tool_result("", "3")
    transcript.add_text("assistant", "It is 3.")
    transcript.add_text("user", "Bye")
    transcript.cue()
    first, second = ids(kind, "weather", "time")
    messages = [
        {"role": "user", "content": "Hi"},
        call_message(kind, ("weather", '{"city": "Rome"}', first), ("time", "{}", second)),
        result_message("time", "12", second),
        result_message("weather", "3", first),
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Bye"},
    ]
    tools = [WEATHER, TIME_WRAPPED] if kind == "tagged" else None
    assert text_of(transcript, model) == reference(kind, messages, tools, True)


@pytest.mark.parametrize("stop", ["", STOP])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tool_answers_follows_the_calls_that_the_model_wrote(
    kind: str, stop: str, model_of: Callable[[str], TextModel]
) -> None:
    model = model_of(kind)
    transcript = model.transcript(NOON)
    transcript.add_text("user", "Hi")
    answer(transcript, model, REPLIES[kind] + (stop if kind in ("as text", "listed") else ""))
    transcript.add_tool_result("weather", "3")
    transcript.cue()
    (id_,) = ids(kind, "weather")
    messages = [
        {"role": "user", "content": "Hi"},
        call_message(kind, ("weather", '{"city": "Rome"}', id_)),
        result_message("weather", "3", id_),
    ]
    assert text_of(transcript, model) == reference(kind, messages, None, True)
    answer(transcript, model, "It is 3.")
    transcript.add_text("user", "Bye")
    messages += [{"role": "assistant", "content": "It is 3."}, {"role": "user", "content": "Bye"}]
    assert text_of(transcript, model) == reference(kind, messages, None, False)


def test_calls_in_another_spelling_stay_as_the_model_wrote_them(
    model_of: Callable[[str], TextModel],
) -> None:
    model = model_of("tagged")
    transcript = model.transcript(NOON)
    transcript.add_text("user", "Hi")
    reply = 'Let me see.\n\n<tool_call>{"arguments":{"city":"Rome"},"name":"weather"}</tool_call>'
    answer(transcript, model, reply)
    before = text_of(transcript, model)
    transcript.add_tool_result("weather", "3")
    assert before.endswith(reply)
    assert text_of(transcript, model) == (
        before + "<|im_end|>\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
    )
    assert transcript.conversation[1].text == "Let me see."
    assert [call.name for call in transcript.conversation[1].calls] == ["weather"]


CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
FOLLOWING = "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"


@pytest.mark.parametrize(
    ("reply", "appended"),
    [
        (CALL, "<|im_end|>\n"),
        (f"{CALL}<|im_end|>", "\n"),
        (f"{CALL}\n<|im_end|>", "\n"),
        (f"{CALL}\n", "<|im_end|>\n"),
        (f"{CALL} Done.", "<|im_end|>\n"),
        (f"{CALL} Done.<|im_end|>", "\n"),
    ],
)
def test_a_turn_with_calls_is_ended_once(
    reply: str, appended: str, make_model: Callable[[str], TextModel]
) -> None:
    plain = make_model("chatml")
    source = TemplateSource(TAGGED, "tagged.jinja")
    model = TextModel(plain.tokenizer, ChatTemplate(source, {}), plain.eos_tokens)
    transcript = model.transcript(NOON)
    transcript.add_text("user", "Hi")
    answer(transcript, model, reply)
    before = text_of(transcript, model)
    transcript.add_tool_result("f", "3")
    assert text_of(transcript, model) == before + appended + FOLLOWING


@pytest.mark.parametrize("text", ["<tool_call>{oh}</tool_call>", "no call", "<tool_call>{"])
def test_a_reply_without_a_whole_call_is_text(text: str, model_of: Callable[[str], TextModel]) -> None:
    model = model_of("tagged")
    transcript = model.transcript(NOON)
    transcript.add_text("user", "Hi")
    answer(transcript, model, text)
    transcript.add_text("user", "Bye")
    assert transcript.conversation[1].calls == ()
    assert text_of(transcript, model).endswith(f"{text}<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n")


def test_tools_calls_and_results_survive_a_snapshot_and_truncation(
    model_of: Callable[[str], TextModel],
) -> None:
    model = model_of("tagged")
    transcript = model.transcript(NOON)
    transcript.equip(json.dumps([WEATHER]))
    transcript.add_text("user", "Hi")
    length = len(transcript.drain())
    transcript.add_tool_call("weather", "{}", "mine")
    transcript.add_tool_result("weather", "3", "mine")
    opened = model.transcript(NOON)
    opened.restore(transcript.to_bytes())
    for each in (transcript, opened):
        each.add_text("user", "Bye")
    assert text_of(opened, model) == text_of(transcript, model)
    transcript.drain()
    transcript.truncate(length)
    transcript.add_text("assistant", "Hello")
    assert '"weather"' in text_of(transcript, model)
    assert "tool_response" not in text_of(transcript, model)
    transcript.truncate(0)
    transcript.add_text("user", "Hi")
    assert text_of(transcript, model) == "<|im_start|>user\nHi<|im_end|>\n"
    fresh = model.transcript(NOON)
    fresh.truncate(0)
    fresh.equip(json.dumps([WEATHER]))


def test_tools_are_described_before_anything_else(model_of: Callable[[str], TextModel]) -> None:
    transcript = model_of("tagged").transcript(NOON)
    transcript.equip(json.dumps([WEATHER]))
    transcript.equip("[]")
    transcript.add_text("user", "Hi")
    assert "weather" not in text_of(transcript, model_of("tagged"))
    transcript.drain()
    with pytest.raises(InvalidRequest, match="describes tools at the beginning"):
        transcript.equip(json.dumps([WEATHER]))


@pytest.mark.parametrize("tools", ["{", "{}", "[1]", '[{"name": ""}]', '[{"function": {"name": 3}}]'])
def test_descriptions_that_are_none_are_refused(tools: str, model_of: Callable[[str], TextModel]) -> None:
    with pytest.raises(InvalidRequest, match="tool"):
        model_of("tagged").transcript(NOON).equip(tools)


@pytest.mark.parametrize(("name", "arguments"), [("", "{}"), ("weather", "[]"), ("weather", "{")])
def test_calls_that_are_none_are_refused_and_change_nothing(
    name: str, arguments: str, model_of: Callable[[str], TextModel]
) -> None:
    model = model_of("tagged")
    transcript = model.transcript(NOON)
    transcript.add_text("user", "Hi")
    transcript.cue()
    before = text_of(transcript, model)
    with pytest.raises(InvalidRequest, match="tool call"):
        transcript.add_tool_call(name, arguments)
    assert text_of(transcript, model) == before


def test_a_turn_that_the_model_has_begun_takes_no_calls_of_the_program(
    model_of: Callable[[str], TextModel],
) -> None:
    model = model_of("tagged")
    transcript = model.transcript(NOON)
    transcript.add_text("user", "Hi")
    answer(transcript, model, "Well")
    with pytest.raises(InvalidRequest, match="opened for the model"):
        transcript.add_tool_call("weather", "{}")


def test_what_a_template_does_not_write_is_refused_by_name(
    make_model: Callable[[str], TextModel], model_of: Callable[[str], TextModel]
) -> None:
    transcript = make_model("gemma").transcript(NOON)
    with pytest.raises(Unsupported, match=r"gemma\.jinja describes no tools"):
        transcript.equip(json.dumps([WEATHER]))
    with pytest.raises(Unsupported, match=r"gemma\.jinja writes no tool calls"):
        transcript.add_tool_call("weather", "{}")
    with pytest.raises(Unsupported, match=r"mistral\.jinja writes no tool results"):
        make_model("mistral").transcript(NOON).add_tool_result("weather", "3")
    with pytest.raises(Unsupported, match="no description of tools on its own"):
        model_of("as text").tool_tokens(json.dumps([WEATHER]))


def test_descriptions_and_answers_can_be_had_as_tokens(model_of: Callable[[str], TextModel]) -> None:
    model = model_of("tagged")
    decode = model.tokenizer.decode_continuation
    described = decode(model.tool_tokens(json.dumps([TIME])))
    assert described == f"<|im_start|>system\n{json.dumps(TIME_WRAPPED)}\n<|im_end|>\n"
    answered = "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n"
    assert decode(model.result_tokens("time", "12")) == answered
    listed = model_of("listed")
    assert listed.tokenizer.decode_continuation(listed.result_tokens("time", "12")) == (
        '[TOOL_RESULTS]{"content": 12, "call_id": "call00000"}'
    )
