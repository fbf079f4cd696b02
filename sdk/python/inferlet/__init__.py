"""The SDK of Python inferlets: contexts, forward passes and generations of the models that pie serves.

    async def main(input):
        model = Model.load()
        ctx = Context(model).system("Be brief.").user(input["prompt"])
        return await ctx.generate(Sampler.top_p(), max_tokens=64).collect_text()

The parts, from the bottom: `host` (calls and waiting), `event_loop`, `errors`; `model`, `sample`, `forward`,
`generation`, `context`; `chat`, `reasoning`, `session`, `runtime`, `children`; and `legacy`, the API of pie 0.2.
"""

from __future__ import annotations

from inferlet import chat, errors, mcp, messaging, reasoning, runtime, scheduling, session, tools, zo
from inferlet.adapter import Adapter
from inferlet.children import Child, launch
from inferlet.context import Context
from inferlet.errors import InferletError
from inferlet.forward import Forward, Output, ProbeHandle, SampleHandle
from inferlet.generation import Generator, GenStep, TextStream, TokenStream
from inferlet.grammar import (
    AnyJson,
    Constraint,
    Ebnf,
    Grammar,
    GrammarConstraint,
    JsonSchema,
    Matcher,
    Regex,
    Schema,
)
from inferlet.media import Audio, Image, Video
from inferlet.model import Model, Tokenizer
from inferlet.pages import RawPages
from inferlet.return_value import get_return_value, set_return
from inferlet.sample import Distribution, Entropy, Hidden, Logits, Logprob, Logprobs, Sampler
from inferlet.spec import Speculator

__all__ = [
    "Adapter",
    "AnyJson",
    "Audio",
    "Child",
    "Constraint",
    "Context",
    "Distribution",
    "Ebnf",
    "Entropy",
    "Forward",
    "GenStep",
    "Generator",
    "Grammar",
    "GrammarConstraint",
    "Hidden",
    "Image",
    "InferletError",
    "JsonSchema",
    "Logits",
    "Logprob",
    "Logprobs",
    "Matcher",
    "Model",
    "Output",
    "ProbeHandle",
    "RawPages",
    "Regex",
    "SampleHandle",
    "Sampler",
    "Schema",
    "Speculator",
    "TextStream",
    "TokenStream",
    "Tokenizer",
    "Video",
    "chat",
    "errors",
    "get_return_value",
    "launch",
    "mcp",
    "messaging",
    "reasoning",
    "runtime",
    "scheduling",
    "session",
    "set_return",
    "tools",
    "zo",
]

_OLDER_API = ("get_all_models", "get_auto_model", "get_model", "stop_condition")


def __getattr__(name: str) -> object:
    """Entry points of the older API, for programs that import them from here; see `inferlet.legacy`."""
    if name in _OLDER_API:
        from inferlet import legacy

        return getattr(legacy, name)
    raise AttributeError(f"module 'inferlet' has no attribute {name!r}")
