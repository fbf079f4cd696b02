"""A program finds the calls in tokens of a model whose template shows how it writes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pie_plugins.drivers.dummy.write_checkpoint import CHAT_TEMPLATE, write_checkpoint
from tests.flow.conftest import Pie, StartPie

PROGRAM = """
from inferlet import Model, errors, tools

async def main(input):
    model = Model.load()
    try:
        decoder = tools.Decoder(model)
    except errors.Unsupported as refusal:
        return str(refusal)
    seen = []
    for token in model.tokenizer().encode(input["text"]):
        event = decoder.feed([token])
        if not isinstance(event, tools.Event.Idle):
            seen.append(repr(event))
    return seen
"""
CALL = '<tool_call>{"name": "sum", "arguments": {"of": [1, 2]}}</tool_call> <tool_call>oh<|im_end|>'


def test_a_program_is_told_of_calls(start_pie: StartPie, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{# <tool_call> #}")

    async def main() -> Any:
        models = f"models:\n  - {{name: dummy, path: {json.dumps(str(tmp_path))}, driver: {{type: dummy}}}}"
        async with start_pie(models) as pie:
            return await pie.run(PROGRAM, text=CALL)

    assert asyncio.run(main()) == [
        "Event.Start()",
        "Event.Call(name='sum', arguments='{\"of\": [1, 2]}', id='')",
        "Event.Start()",
        "Event.Invalid(text='<tool_call>oh')",
    ]


CONVERSATION = """
from inferlet import Context, Model, chat, reasoning, tools

async def main(input):
    model = Model.load()
    tokenizer = model.tokenizer()
    ctx = Context(model).equip([{"name": "sum"}]).user("Hi")
    ctx.tool_call("sum", {"of": [1, 2]}).tool_result("sum", {"is": 3}).cue()
    called = tools.Decoder(model)
    called.feed(tokenizer.encode('<tool_call>{"name": "sum", "arguments": {}}'))
    thought = reasoning.Decoder(model)
    thought.feed(tokenizer.encode("<think>so"))
    said = chat.Decoder(model)
    said.feed(tokenizer.encode("Hel"))
    return {
        "buffer": tokenizer.decode(ctx.buffer()),
        "tools": tokenizer.decode(tools.equip_prefix(model, ['{"name": "sum"}'])),
        "answer": tokenizer.decode(tools.answer_prefix(model, "sum", 3)),
        "ends": [repr(event) for decoder in (called, thought, said) for event in decoder.finish()],
    }
"""
TEMPLATE = """\
{%- for tool in tools or [] %}{{ '[' + tool.function.name + ']' }}{% endfor %}
{%- for m in messages %}{{ m.role + ': ' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}</tool_call>' }}{% endfor %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}
"""


def test_a_program_describes_tools_and_answers_calls(start_pie: StartPie, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)

    async def main() -> Any:
        models = f"models:\n  - {{name: dummy, path: {json.dumps(str(tmp_path))}, driver: {{type: dummy}}}}"
        async with start_pie(models) as pie:
            return await pie.run(CONVERSATION)

    answer = asyncio.run(main())
    assert answer == {
        "buffer": "[sum]user: Hi\n"
        'assistant: <tool_call>{"name": "sum", "arguments": {"of": [1, 2]}}</tool_call>\n'
        'tool: {"is": 3}\nassistant: ',
        "tools": "[sum]",
        "answer": "tool: 3\n",
        "ends": [
            "Event.Call(name='sum', arguments='{}', id='')",
            "Event.Delta(text='so')",
            "Event.End(text='so')",
            "Event.Done(text='Hel')",
        ],
    }


def test_a_model_without_a_format_refuses_with_what_was_looked_for(on_pie: Callable[..., Any]) -> None:
    async def scenario(pie: Pie) -> None:
        refusal = await pie.run(PROGRAM, text="")
        assert "show no known way of writing tool calls; looked for" in refusal

    on_pie(scenario)
