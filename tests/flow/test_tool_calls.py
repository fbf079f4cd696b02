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
        "Event.Call(name='sum', arguments='{\"of\": [1, 2]}')",
        "Event.Start()",
        "Event.Invalid(text='<tool_call>oh')",
    ]


def test_a_model_without_a_format_refuses_with_what_was_looked_for(on_pie: Callable[..., Any]) -> None:
    async def scenario(pie: Pie) -> None:
        refusal = await pie.run(PROGRAM, text="")
        assert "show no known way of writing tool calls; looked for" in refusal

    on_pie(scenario)
