"""The default model gives the numbers that it should: the known log-probability, and the perplexity of a plain run."""

from __future__ import annotations

import asyncio
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pie_core.errors import FetchError
from pie_core.models.fetch import fetch_default_model
from tests.flow.conftest import StartPie, ignore_progress

pytestmark = pytest.mark.slow

# Of plain torch in float32 on the same dequantized weights.
LOGPROB_OF_PARIS = -0.258

TEXT = (Path(__file__).parent / "lighthouse.txt").read_text()

ASKING = """
from inferlet import Context, Logprobs, Model, Sampler, runtime

async def main(input):
    model = Model.load(runtime.models()[0])
    tokenizer = model.tokenizer()
    prompt, (paris,) = tokenizer.encode("The capital of France is"), tokenizer.encode(" Paris")
    forward = Context(model).forward()
    forward.input(prompt)
    token = forward.sample([len(prompt) - 1], Sampler.argmax())
    logprob = forward.probe(len(prompt) - 1, Logprobs([paris]))
    output = await forward.execute()
    return {"greedy": tokenizer.decode([output.token(token)]), "logprob": output.logprobs(logprob)[0]}
"""

SCORING = """
from inferlet import Context, Logprobs, Model, runtime

async def main(input):
    model = Model.load(runtime.models()[0])
    tokens = model.tokenizer().encode(input["text"])
    forward = Context(model).forward()
    forward.input(tokens)
    probes = [forward.probe(row, Logprobs([following])) for row, following in enumerate(tokens[1:])]
    output = await forward.execute()
    return {"tokens": tokens, "logprobs": [output.logprobs(probe)[0] for probe in probes]}
"""


@pytest.fixture(scope="module")
def default_model() -> Path:
    pytest.importorskip("torch")
    try:
        return fetch_default_model(ignore_progress)
    except FetchError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")


@pytest.mark.usefixtures("default_model")
def test_the_first_command_of_all_shows_a_right_answer() -> None:
    script = (Path(__file__).parents[2] / "scripts/run").read_text()
    (default,) = re.findall(r"set -- (.+)", script)
    command = [sys.executable, "-m", "pie_core", "run", *shlex.split(default)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "The capital of France is Paris.\n"


@pytest.fixture(scope="module")
def plain_model(default_model: Path) -> Any:
    """transformers in float32 on the dequantized file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, name = default_model.parent, default_model.name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)


@pytest.fixture
def on_default_model(start_pie: StartPie, default_model: Path) -> Callable[..., Any]:
    models = (
        f"models:\n  - {{name: default, path: '{default_model}', driver: {{options: {{dtype: DTYPE}}}}}}\n"
    )

    def run(dtype: str, source: str, **arguments: Any) -> Any:
        async def main() -> Any:
            async with start_pie(models.replace("DTYPE", dtype)) as pie:
                return await pie.run(source, **arguments)

        return asyncio.run(main())

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paris_follows_with_the_known_probability(on_default_model: Callable[..., Any], dtype: str) -> None:
    answer = on_default_model(dtype, ASKING)
    assert answer["greedy"] == " Paris"
    assert answer["logprob"] == pytest.approx(LOGPROB_OF_PARIS, abs=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_perplexity_of_a_text_is_that_of_a_plain_run(
    on_default_model: Callable[..., Any], plain_model: Any, dtype: str
) -> None:
    scored = on_default_model(dtype, SCORING, text=TEXT)
    ours = math.exp(-math.fsum(scored["logprobs"]) / len(scored["logprobs"]))
    assert ours == pytest.approx(_plain_perplexity(plain_model, scored["tokens"]), rel=0.01)


def _plain_perplexity(model: Any, tokens: list[int]) -> float:
    """The whole text in one pass."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    picked = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])
    return math.exp(-float(picked.double().mean()))
