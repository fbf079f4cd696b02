"""Rendering against transformers, errors with their line, and templates that mean harm."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import SandboxedEnvironment

from pie_core.errors import InvalidRequest, LimitExceeded, LoadError
from pie_core.text.templates import (
    FALLBACK,
    ChatTemplate,
    Message,
    TemplateSource,
    template_from_directory,
    template_from_gguf,
)

Style = tuple[str, str, dict[str, str]]


def turns(*texts: str) -> list[Message]:
    """Texts as turns of user and assistant; a first text in brackets is the system's."""
    system = [{"role": "system", "content": texts[0][1:-1]}] if texts[0].startswith("[") else []
    rest = texts[len(system) :]
    return system + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(rest)]


def template(text: str, **named: str) -> ChatTemplate:
    return ChatTemplate(TemplateSource(text, "test.jinja"), named)


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize(
    "texts",
    [
        ("Hi",),
        ("[Be brief.]", "Hi"),
        ("Hi", " <think>\nhm\n</think>\n\nHello ", "More"),
        ("[Be brief.]", "Hi", "Hello", "More\n", "Yes"),
    ],
)
def test_rendering_equals_transformers(style: Style, texts: tuple[str, ...], generation_prompt: bool) -> None:
    from transformers.utils import chat_template_utils

    reference: Any = chat_template_utils.render_jinja_template
    _, text, named = style
    conversation = turns(*texts)
    try:
        pieces, _ = reference(
            [conversation], chat_template=text, add_generation_prompt=generation_prompt, **named
        )
    except Exception:  # the reference raises what Jinja raises
        with pytest.raises(InvalidRequest):
            template(text, **named).render(conversation, generation_prompt)
    else:
        assert template(text, **named).render(conversation, generation_prompt) == pieces[0]


def test_variables_reach_the_template(styles: dict[str, tuple[str, dict[str, str]]]) -> None:
    qwen = template(styles["qwen3"][0])
    assert qwen.render(turns("Hi"), True, variables={"enable_thinking": False}).endswith("</think>\n\n")
    assert not qwen.render(turns("Hi"), True).endswith("</think>\n\n")


def test_the_clock_of_a_rendering_can_be_held() -> None:
    dated = template("{{ strftime_now('%Y-%m-%d') }}")
    assert dated.render([], now=datetime(2024, 7, 26)) == "2024-07-26"


def test_what_the_template_refuses_names_origin_and_line() -> None:
    refusing = template("one\n{% if messages %}\n{{ raise_exception('No tools here') }}\n{% endif %}")
    with pytest.raises(InvalidRequest, match=r"chat template of test\.jinja, line 3: No tools here"):
        refusing.render(turns("Hi"))
    with pytest.raises(InvalidRequest, match=r"line 2: list object has no element 5"):
        template("\n{{ messages[5]['role'] }}").render(turns("Hi"))
    with pytest.raises(InvalidRequest, match=r"line 1: TypeError"):
        template("{{ 1 + 'a' }}").render(turns("Hi"))


@pytest.mark.parametrize(
    "text",
    [
        "{% if %}",
        "{{ 1 ",
        "{{ x | no_such_filter }}",
        "{% include 'x' ",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        " " * (2**20 + 1),
    ],
    ids=lambda text: text[:24],
)
def test_a_broken_template_is_a_load_error_with_its_origin(text: str) -> None:
    with pytest.raises(LoadError, match=r"chat template of test\.jinja"):
        template(text)


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(LoadError, match="line 3"):
        template("a\nb\n{% endfor %}")


HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "empty filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "exponential macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "long product": "{{ 'a' * 10000000000 }}",
    "long list": "{{ [0] * 10000000000 }}",
    "doubling by plus": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by tilde": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by join": "{% set n = namespace(x='aa') %}"
    "{% for i in range(60) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "doubling by join method": "{% set n = namespace(x='aa') %}"
    "{% for i in range(60) %}{% set n.x = n.x.join(['', '', '']) %}{% endfor %}",
    "replace": "{% set n = namespace(x='aa') %}"
    "{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
    "replace filter": "{% set n = namespace(x='aa') %}"
    "{% for i in range(60) %}{% set n.x = n.x | replace('a', 'aa') %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}"
    "{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested lists as json": "{% set n = namespace(x=[1]) %}"
    "{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "endless appending": "{% set x = [0] %}{% for i in x %}{% set _ = x.append(i) %}{% endfor %}",
    "doubling by extend": "{% set x = [0] %}{% for i in range(60) %}{% set _ = x.extend(x) %}{% endfor %}",
    "a list in itself": "{% set x = [0] %}{% set _ = x.append(x) %}{{ x }}",
    "a list in itself as json": "{% set x = [0] %}{% set _ = x.append(x) %}{{ x | tojson }}",
    "slow inserts": "{% set x = [0] * 200000 %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set _ = x.insert(0, x.pop()) %}{% endfor %}{% endfor %}",
    "comparing nested lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "nested tuples as keys": "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}"
    "{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}",
    "nested mappings": "{% set n = namespace(x=1, y=1) %}{% for i in range(60) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% set n.y = dict(a=n.y, b=n.y) %}{% endfor %}{{ n.x == n.y }}",
    "lists grown in lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set a = [] %}{% set _ = a.append(n.x) %}{% set _ = a.append(n.x) %}{% set n.x = a %}"
    "{% set b = [] %}{% set _ = b.extend([n.y, n.y]) %}{% set n.y = b %}{% endfor %}{{ n.x == n.y }}",
    "power": "{{ 9 ** 99999999 }}",
    "power by products": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "percent format": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "format width": "{{ '{:>999999999}'.format(1) }}",
    "format nested width": "{{ '{:>{}}'.format(1, 999999999) }}",
    "indent": "{{ 'a\nb' | indent(999999999, true) }}",
    "json indent": "{{ [1] | tojson(indent=999999999) }}",
    "much output": "{% for i in range(99999) %}{{ 'abcdefghij' * 100 }}{% endfor %}",
    "much output in a macro": "{% macro m() %}{% for i in range(99999) %}{{ 'abcdefghij' * 100 }}{% endfor %}"
    "{% endmacro %}{{ m() | length }}",
    "much output in a block": "{% set x %}{% for i in range(99999) %}{{ 'abcdefghij' * 100 }}{% endfor %}{% endset %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_with_a_typed_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pie_core.text.bounded_jinja.MAX_SECONDS", 0.3)
    with pytest.raises(LimitExceeded, match=r"chat template of test\.jinja"):
        template(HOSTILE[name]).render(turns("Hi"))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 'a'.ljust(99999999999) }}",
        "{{ (1).to_bytes(999999999) }}",
        "{{ namespace(__init__=1) }}",
        "{% include 'other' %}",
        "{{ 'a' | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_a_template_reaches_nothing_outside_its_sandbox(text: str) -> None:
    try:
        rendered = template(text).render(turns("Hi"))
    except (InvalidRequest, LoadError):
        return
    assert rendered == "", "an unsafe attribute prints as nothing"


QUEUE = """\
{%- set queue = namespace(ids=[]) -%}
{%- for m in messages -%}
    {%- if m.role == 'tool' -%}
        {%- if queue.ids -%}{%- set id = queue.ids.pop(0) -%}{%- else -%}{%- set id = 'none' -%}{%- endif -%}
        {{ 'Return of ' + id + ': ' + m.content }}
    {%- else -%}
        {{ m.content }}
        {%- for call in m.tool_calls or [] -%}
            {%- set _ = queue.ids.append(call.function.name ~ ':' ~ loop.index0) -%}
            {{ '[' + queue.ids[-1] + ']' }}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
"""


def test_a_template_may_change_lists_that_it_made() -> None:
    calls = [{"function": {"name": name}} for name in ("one", "two")]
    conversation: list[Message] = [
        {"role": "assistant", "content": "A", "tool_calls": calls},
        *({"role": "tool", "content": content} for content in ("x", "y", "z")),
    ]
    plain = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(QUEUE)
    rendered = template(QUEUE).render(conversation)
    assert rendered == "A[one:0][two:1]Return of one:0: xReturn of two:1: yReturn of none: z"
    assert rendered == plain.render(messages=conversation)


@pytest.mark.parametrize(
    "text",
    [
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].tags.pop() %}",
        "{% for m in messages %}{% set _ = m.tags.extend(['b']) %}{% endfor %}",
        "{% set n = namespace(x=tools) %}{% set _ = n.x.insert(0, 'b') %}",
        "{% set _ = messages[0].update(role='b') %}",
    ],
)
def test_a_template_changes_nothing_that_it_was_given(text: str) -> None:
    conversation: list[Message] = [{"role": "user", "content": "Hi", "tags": ["a"]}]
    with pytest.raises(InvalidRequest):
        template(text).render(conversation, variables={"tools": ["a"]})
    assert conversation == [{"role": "user", "content": "Hi", "tags": ["a"]}]


def test_a_rendering_can_follow_one_that_overstepped() -> None:
    mixed = template(
        "{% for m in messages %}{% if m.content == 'x' %}{{ 'a' * 10**10 }}{% endif %}ok{% endfor %}"
    )
    with pytest.raises(LimitExceeded):
        mixed.render(turns("x"))
    assert mixed.render(turns("y")) == "ok"


def test_a_directory_is_searched_in_order(tmp_path: Path) -> None:
    assert template_from_directory(tmp_path) is FALLBACK
    assert template_from_directory(tmp_path).is_fallback
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert template_from_directory(tmp_path) == TemplateSource("plain", str(config))
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert template_from_directory(tmp_path).text == "yes"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert template_from_directory(tmp_path).text == "own file"


def test_an_unusable_entry_is_refused_with_its_file(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "no"}]}))
    with pytest.raises(LoadError, match=r"tokenizer_config\.json: .*entry named 'default'"):
        template_from_directory(tmp_path)
    config.write_text("{")
    with pytest.raises(LoadError, match="not readable as JSON"):
        template_from_directory(tmp_path)


def test_a_gguf_file_carries_its_template(
    tmp_path: Path, byte_level_backend: Any, write_gguf_file: Any
) -> None:
    from pie_core.text.gguf_metadata import read_gguf_metadata

    path = write_gguf_file(tmp_path / "a.gguf", byte_level_backend, "gpt2", chat_template="hello")
    assert template_from_gguf(read_gguf_metadata(path)).text == "hello"
    plain = write_gguf_file(tmp_path / "b.gguf", byte_level_backend, "gpt2")
    assert template_from_gguf(read_gguf_metadata(plain)).is_fallback


def test_the_fallback_writes_turns_between_markers() -> None:
    rendered = ChatTemplate(FALLBACK).render(turns("[S]", "U"), add_generation_prompt=True)
    assert (
        rendered == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
