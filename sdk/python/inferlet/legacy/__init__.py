"""The API of pie 0.2, as a facade over the same engine.

from inferlet.legacy import Sampler, get_auto_model, stop_condition

model = get_auto_model()
ctx = model.create_context()
ctx.fill_user("Hello!")
stop = stop_condition.max_len(256).or_(stop_condition.ends_with_any(model.eos_tokens()))
text = await ctx.generate(Sampler.top_p(0.6, 0.95), stop)
"""

from __future__ import annotations

from inferlet.legacy import stop_condition
from inferlet.legacy.context import Context
from inferlet.legacy.model import Model, Tokenizer, get_all_models, get_auto_model, get_model
from inferlet.legacy.sampler import Sampler
from inferlet.legacy.stop_condition import StopCondition

__all__ = [
    "Context",
    "Model",
    "Sampler",
    "StopCondition",
    "Tokenizer",
    "get_all_models",
    "get_auto_model",
    "get_model",
    "stop_condition",
]
