"""Tokens per second of the bare driver loop: greedy decode of equally long contexts, no engine in front.

    python -m benchmarks.driver_loop --model PATH --batches 1 8 32 --json FILE

CPU seconds are stated beside wall time: on a machine that others use too, only those compare.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pie_core.contracts.driver import Driver, DriverRequest
from pie_core.plugins import load_plugins
from pie_core.testing.batches import Context, FromTicket, Request, Sample, Stepper


@dataclass(frozen=True, slots=True)
class Measured:
    batch: int
    tokens_per_s: float
    tokens_per_cpu_s: float
    step_ms: float
    prefill_tokens_per_s: float


def main() -> None:
    arguments = _parse()
    driver = _load(arguments)
    results = []
    for batch in arguments.batches:
        best = max(
            (_measure(driver, batch, arguments.prompt, arguments.tokens) for _ in range(arguments.repeats)),
            key=lambda each: each.tokens_per_s,
        )
        results.append(best)
        print(
            f"batch {best.batch:3}: {best.tokens_per_s:8.1f} tok/s  {best.tokens_per_cpu_s:8.1f} tok/CPU-s "
            f" {best.step_ms:7.2f} ms/step  prefill {best.prefill_tokens_per_s:8.0f} tok/s",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory or a GGUF file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens of each context")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that each context generates")
    parser.add_argument("--repeats", type=int, default=3, help="the best run counts")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def _load(arguments: argparse.Namespace) -> Driver:
    registry = load_plugins()
    declaration = registry.driver("portable")
    options = declaration.options(dtype=arguments.dtype, cpu_threads=arguments.threads)
    return declaration.load(
        DriverRequest(arguments.model, "cpu", options, registry.architectures, registry.media)
    )


def _measure(driver: Driver, batch: int, prompt: int, tokens: int) -> Measured:
    stepper = Stepper(driver)
    contexts = [stepper.context() for _ in range(batch)]
    started = time.perf_counter()
    for context in contexts:
        ids = [(7 * context.id + 13 * place) % 1000 + 100 for place in range(prompt)]
        stepper.run([Request(context, ids)])
    prefilled = time.perf_counter()
    cpu = time.process_time()
    _decode(stepper, contexts, tokens)
    wall, cpu = time.perf_counter() - prefilled, time.process_time() - cpu
    generated = batch * tokens
    return Measured(
        batch, generated / wall, generated / cpu, 1e3 * wall / tokens, batch * prompt / (prefilled - started)
    )


def _decode(stepper: Stepper, contexts: Sequence[Context], tokens: int) -> None:
    """Two tickets in flight: each step takes its tokens from the one before."""
    ticket = stepper.submit([Request(context, [100], samples=[Sample()]) for context in contexts])
    for _ in range(tokens - 1):
        following = stepper.submit(
            [
                Request(context, [FromTicket(ticket, row)], samples=[Sample()])
                for row, context in enumerate(contexts)
            ]
        )
        stepper.collect(ticket)
        ticket = following
    stepper.collect(ticket)


if __name__ == "__main__":
    main()
