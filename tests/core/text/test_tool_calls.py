"""Tool calls as each family writes them: whole, cut anywhere, malformed and truncated."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from pie_core.errors import InvalidRequest, Unsupported
from pie_core.text.decoders import Event
from pie_core.text.templates import ChatTemplate, TemplateSource
from pie_core.text.text_model import TextModel
from pie_core.text.tokenizer import Tokenizer
from pie_core.text.tool_calls import ToolDecoder, find_tool_format
from pie_core.text.tool_formats import TOOL_FORMATS

FORMATS = {known.name: known for known in TOOL_FORMATS}
WEATHER = ("weather", {"city": "東京", "days": 3, "units": ["C", "mm"]})
QUOTING = ("say", {"text": 'a </tool_call> "b" <tool_call> c\\'})
JSON = json.dumps(WEATHER[1], ensure_ascii=False)
CALL_JSON = f'{{"name": "weather", "arguments": {JSON}}}'
QUOTING_JSON = json.dumps({"name": QUOTING[0], "arguments": QUOTING[1]})

# name of the sample: format, text, the calls in it
SAMPLES: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "hermes": ("tool_call", f"Well.\n<tool_call>\n{CALL_JSON}\n</tool_call>\n", [WEATHER]),
    "hermes twice": (
        "tool_call",
        f"<tool_call>\n{CALL_JSON}\n</tool_call>\n<tool_call>{QUOTING_JSON}</tool_call>",
        [WEATHER, QUOTING],
    ),
    "xml": (
        "tool_call",
        "<tool_call>\n<function=weather>\n<parameter=city>\n東京\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=units>\n["C", "mm"]\n</parameter>\n</function>\n</tool_call>',
        [WEATHER],
    ),
    "xml with loose quotes and lines": (
        "tool_call",
        "<tool_call>\n<function=write>\n<parameter=code>\nif a < b:\n    print('\"')\n\n</parameter>\n</function>\n"
        "</tool_call>",
        [("write", {"code": "if a < b:\n    print('\"')\n"})],
    ),
    "xml with values as its template writes them": (
        "tool_call",
        "<tool_call>\n<function=f>\n<parameter=a>\nTrue\n</parameter>\n<parameter=b>\nNone\n</parameter>\n"
        "<parameter=c>\nTrue love\n</parameter>\n</function>\n</tool_call>",
        [("f", {"a": True, "b": None, "c": "True love"})],
    ),
    "glm with a word that is none of Python's": (
        "tool_call",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>None</arg_value>\n</tool_call>",
        [("f", {"a": "None"})],
    ),
    "xml without its frame": (
        "tool_call",
        "<function=ls>\n<parameter=path>\n/\n</parameter>\n</function>",
        [("ls", {"path": "/"})],
    ),
    "glm": (
        "tool_call",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>東京</arg_value>\n<arg_key>days</arg_key>\n"
        '<arg_value>3</arg_value><arg_key>units</arg_key><arg_value>["C", "mm"]</arg_value>\n</tool_call>',
        [WEATHER],
    ),
    "glm without arguments": ("tool_call", "<tool_call>now</tool_call>", [("now", {})]),
    "deepseek v3": (
        "DeepSeek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [WEATHER],
    ),
    "deepseek v3.1": (
        "DeepSeek",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [WEATHER, ("now", {})],
    ),
    "deepseek v3.2": (
        "DSML",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">東京</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="units" string="false">["C", "mm"]</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="pad">\n'
        '<｜DSML｜parameter name="with" string="true">5</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        [WEATHER, ("pad", {"with": "5"})],
    ),
    "kimi": (
        "Kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        f"{JSON}<|tool_call_end|><|tool_call_begin|>now<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        [WEATHER, ("now", {})],
    ),
    "nemotron": ("TOOLCALL", f"<TOOLCALL>[{CALL_JSON}, {QUOTING_JSON}]</TOOLCALL>", [WEATHER, QUOTING]),
    "gemma": (
        "Gemma",
        '<|tool_call>call:weather{city:<|"|>東京<|"|>,days:3,units:[<|"|>C<|"|>,<|"|>mm<|"|>]}<tool_call|>'
        '<|tool_call>call:now{}<tool_call|><|tool_call>call:a.b{x:{<|"|>y<|"|>:true,z:<|"|>}<tool_call|>"<|"|>}}'
        "<tool_call|>",
        [WEATHER, ("now", {}), ("a.b", {"x": {"y": True, "z": '}<tool_call|>"'}})],
    ),
    "function gemma": (
        "function_call",
        "<start_function_call>call:light{on:false,room:<escape>den<escape>}<end_function_call>",
        [("light", {"on": False, "room": "den"})],
    ),
    "llama": ("Llama", f'\n{{"name": "weather", "parameters": {JSON}}}', [WEATHER]),
    "llama, tagged": (
        "Llama",
        f'<|python_tag|>{{"name": "weather", "parameters": {JSON}}}; {QUOTING_JSON}',
        [WEATHER, QUOTING],
    ),
    "llama, built in": (
        "Llama",
        '<|python_tag|>brave_search.call(query="a, b", top=2)',
        [("brave_search", {"query": "a, b", "top": 2})],
    ),
    "mistral": ("Mistral", f"[TOOL_CALLS][{CALL_JSON}]", [WEATHER]),
    "mistral, named": (
        "Mistral",
        f"[TOOL_CALLS]weather[ARGS]{JSON}[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{{}}",
        [WEATHER, ("now", {})],
    ),
}


@pytest.fixture(scope="session")
def tokenizer(byte_level_backend: Backend) -> Tokenizer:
    return Tokenizer(byte_level_backend, "tiny")


@pytest.fixture(scope="session")
def single_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {data: index for index, data in tokenizer.vocabulary() if len(data) == 1}


def decoder_of(tokenizer: Tokenizer, name: str) -> ToolDecoder:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    return ToolDecoder(tokenizer, FORMATS[name], [end])


def events_of(tokenizer: Tokenizer, name: str, text: str) -> list[Event]:
    decoder = decoder_of(tokenizer, name)
    return decoder.feed(tokenizer.encode(text)) + decoder.finish()


def calls_in(events: list[Event]) -> list[tuple[str, dict[str, Any]]]:
    calls = [json.loads(event.text) for event in events if event.kind == "call"]
    return [(call["name"], call["arguments"]) for call in calls]


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_familys_calls_are_read(tokenizer: Tokenizer, sample: str) -> None:
    name, text, calls = SAMPLES[sample]
    events = events_of(tokenizer, name, text)
    assert calls_in(events) == calls
    assert {event.kind for event in events} == {"start", "call"}


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_call_is_reported_at_its_end_and_its_start_before(
    tokenizer: Tokenizer, single_bytes: dict[bytes, int], sample: str
) -> None:
    """Also: byte by byte gives the events of the whole text at once."""
    name, text, _ = SAMPLES[sample]
    decoder = decoder_of(tokenizer, name)
    steps = [decoder.feed([single_bytes[bytes([byte])]]) for byte in text.encode()] + [decoder.finish()]
    assert all(len(step) == 1 or step[0].kind != "start" for step in steps[:-1] if step), (
        "never both in one byte"
    )
    assert [event for step in steps for event in step] == events_of(tokenizer, name, text)


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_truncated_call_is_invalid_or_complete_but_never_wrong(tokenizer: Tokenizer, sample: str) -> None:
    name, text, calls = SAMPLES[sample]
    for end in range(len(text)):
        events = events_of(tokenizer, name, text[:end])
        assert calls_in(events) == calls[: len(calls_in(events))]
        starts = sum(event.kind == "start" for event in events)
        assert starts <= len(events) - starts, "whatever starts comes to an end"
        for event in events:
            assert event.kind != "invalid" or event.text in text[:end]


PIECES = [
    "<tool_call>", "</tool_call>", "<tool", "{", "}", '"', "\\", '"name"', ":", '"f"', '"arguments"', ",", "[", "]",
    "<function=", "f>", "</function>", "<parameter=", "</parameter>", "<arg_key>", "</arg_key>", " ", "\n", "é", "🎉",
    '{"name": "f", "arguments": {}}', "<|tool_call>", "<tool_call|>", "call:f{", '<|"|>', "<|python_tag|>", '{"name"',
    "[TOOL_CALLS]", "[ARGS]", "f.call(", "a=1", ")", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<|im_end|>", "<TOOLCALL>", "</TOOLCALL>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>", '<｜DSML｜invoke name="', 'f">', "</｜DSML｜invoke>",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_events_do_not_depend_on_how_tokens_are_cut(
    tokenizer: Tokenizer, name: str, data: st.DataObject
) -> None:
    own = [piece for sample in SAMPLES.values() if sample[0] == name for piece in (sample[1], sample[1][:-3])]
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES + own), max_size=10)))
    tokens = tokenizer.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    at_once, in_steps = decoder_of(tokenizer, name), decoder_of(tokenizer, name)
    expected = at_once.feed(tokens) + at_once.finish()
    events = [e for a, b in zip([0, *cuts], [*cuts, None], strict=True) for e in in_steps.feed(tokens[a:b])]
    assert events + in_steps.finish() == expected
    for call_name, arguments in calls_in(expected):
        assert call_name.strip()
        assert isinstance(arguments, dict)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tool_call", '<tool_call>{"name": "f"}</tool_call>', "a name and arguments, not {'name': 'f'}"),
        ("tool_call", '<tool_call>{"name": "", "arguments": {}}</tool_call>', "not '' and {}"),
        ("tool_call", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "not 'f' and [1]"),
        ("tool_call", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is no JSON"),
        ("tool_call", "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>", "Expecting property name"),
        ("tool_call", "<tool_call></tool_call>", "not '' and {}"),
        ("tool_call", "<tool_call>[]</tool_call>", "no call behind <tool_call>: '[]'"),
        (
            "tool_call",
            "<tool_call>" + '{"name": "f", "arguments": ' + "[" * 5000 + "</tool_call>",
            "recursion",
        ),
        (
            "tool_call",
            "<tool_call><function=f><parameter=x>1</function></tool_call>",
            "unexpected text at character 0",
        ),
        ("tool_call", "<tool_call>f<arg_key>x</arg_key></tool_call>", "unexpected text at character 0"),
        ("DeepSeek", "<｜tool▁call▁begin｜>f{}<｜tool▁call▁end｜>", "no <｜tool▁sep｜> in 'f{}'"),
        ("Kimi", "<|tool_call_begin|>f:0{}<|tool_call_end|>", "and JSON, not 'f:0{}'"),
        ("DSML", '<｜DSML｜invoke name="f">loose</｜DSML｜invoke>', "unexpected text at character 0"),
        ("DSML", '<｜DSML｜invoke name="f"</｜DSML｜invoke>', """an end: 'f"'"""),
        ("Gemma", '<|tool_call>call:f{x:<|"|>y<|"|>} z<tool_call|>', "nothing behind it, not 'call:f{x:"),
        ("Gemma", "<|tool_call>call:f{x:,}<tool_call|>", "a key or a value, not ',}'"),
        ("Gemma", "<|tool_call>call:f{x}<tool_call|>", "no colon behind the key 'x'"),
        ("Gemma", "<|tool_call>call:f{x:" + "[" * 5000 + "<tool_call|>", "recursion"),
        ("Llama", "<|python_tag|>print(1)", "KEYWORD=VALUE, not '1'"),
        ("Llama", "<|python_tag|>print", "NAME.call(...), not 'print'"),
        ("Llama", '{"name": "Ada", "age": 36}', "not {'name': 'Ada', 'age': 36}"),
        ("Mistral", "[TOOL_CALLS]f[ARGS]{x}", "Expecting property name"),
    ],
)
def test_malformed_calls_are_invalid_with_their_text_and_the_log_tells_why(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, name: str, text: str, reason: str
) -> None:
    caplog.set_level("DEBUG", "pie_core.text.tool_calls")
    assert events_of(tokenizer, name, text) == [Event("start"), Event("invalid", text)]
    assert reason in caplog.text


def test_a_forgotten_end_does_not_swallow_the_next_call(tokenizer: Tokenizer) -> None:
    good = f"<tool_call>{CALL_JSON}</tool_call>"
    events = events_of(tokenizer, "tool_call", "I think <tool_call> is the tag. " + good)
    assert [event.kind for event in events] == ["start", "invalid", "start", "call"]
    events = events_of(tokenizer, "tool_call", f"<tool_call>{CALL_JSON}\n" + good)
    assert calls_in(events) == [WEATHER, WEATHER]


def test_a_forgotten_quote_does_not_swallow_the_next_call(tokenizer: Tokenizer) -> None:
    bad = '<tool_call>{"name": "f", "arguments": {"x": "y}}</tool_call>'
    events = events_of(tokenizer, "tool_call", f"{bad}<tool_call>{CALL_JSON}</tool_call><|im_end|>")
    assert [event.kind for event in events] == ["start", "invalid", "start", "call"]
    assert (events[1].text, calls_in(events)) == (bad, [WEATHER])


def test_a_stop_token_ends_the_turn_and_a_reset_forgets_it(tokenizer: Tokenizer) -> None:
    decoder = decoder_of(tokenizer, "Llama")
    text = '{"name": "f", "parameters": {}}<|im_end|>'
    kinds = [event.kind for event in decoder.feed(tokenizer.encode(text + text + 'Say {"name": 1}'))]
    assert kinds == ["start", "call", "start", "call"]
    decoder.feed(tokenizer.encode('<|im_end|>{"name'))
    decoder.reset()
    assert decoder.feed(tokenizer.encode('": "f", "parameters": {}}<|im_end|>')) == []


def test_arguments_written_as_a_string_and_lone_surrogates_survive(tokenizer: Tokenizer) -> None:
    text = r'<tool_call>{"name": "f", "arguments": "{\"x\": \"\\ud800\"}"}</tool_call>'
    [_, call] = events_of(tokenizer, "tool_call", text)
    assert json.loads(call.text) == {"name": "f", "arguments": {"x": "\ud800"}}
    assert call.text.isascii()


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' }}", "DeepSeek"),
        ("{% set dsml_token = '｜DSML｜' %}", "DSML"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", "Kimi"),
        ("'<|tool_call>call:'", "Gemma"),
        ("<TOOLCALL>[", "TOOLCALL"),
        ("[TOOL_CALLS]", "Mistral"),
        ("\\n<tool_call>\\n<function=", "tool_call"),
        ("<|python_tag|>", "Llama"),
    ],
)
def test_the_format_is_what_the_template_shows(tokenizer: Tokenizer, template: str, name: str) -> None:
    assert find_tool_format(tokenizer, template, "x").name == name


def test_without_a_sign_in_the_template_the_vocabulary_decides(byte_level_backend: Backend) -> None:
    backend = Backend.from_str(byte_level_backend.to_str())
    model = TextModel(Tokenizer(backend, "tiny"), ChatTemplate(TemplateSource("x", "plain.jinja")), ())
    with pytest.raises(Unsupported, match=r"template of plain\.jinja and the vocabulary show no known way"):
        model.decoder("tools")
    backend.add_special_tokens(["<|python_tag|>"])
    model = TextModel(Tokenizer(backend, "tiny"), ChatTemplate(TemplateSource("x", "plain.jinja")), ())
    assert model.tool_format.name == "Llama"
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        model.decoder("tools").feed([model.tokenizer.size])
