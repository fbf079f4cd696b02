"""What the CUDA driver does on one GPU: decode, prefill and a mixed workload, beside the floor and beside vLLM.

    python -m benchmarks.gpu --models 0.6B 8B --batches 1 8 32 64 128 256 --json FILE [--vllm FILE ...]

Weights are random, of the real shapes; a row is the bare driver loop with a step queued behind the open one, or, with
`--guests`, as many programs: some whose loop the engine runs, some that ask for each token at run-ahead depths 0, 1 and
4. What a step of those takes more than the bare loop's is the tax. The floor is the least time the memory or the
arithmetic of an H200 allows (benchmarks/gpu_models.py). `--vllm` takes result files of vLLM's own run right behind on
the same machine: small models are bound by the host, which differs by 30 % and more from machine to machine, so only
such ratios count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.gpu_driver import driver_arguments, loaded
from benchmarks.gpu_loop import Story, Timed, run
from benchmarks.gpu_models import SHAPES, Shape, decode_floor_ms, prefill_floor_ms
from pie_core.contracts.driver import Driver

MIXED_TEMPERATURE = 0.6
MIXED_SEED = 0  # the workload of 133,966 tokens that other engines are measured with


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the table, and what it is measured against."""

    model: str
    name: str
    ms: float  # a step, a prompt; for the mixed workload the whole of it
    tokens_per_s: float
    floor_ms: float
    p99_ms: float = 0.0
    busy_ms: float = 0.0  # of a step, by the device's own clock
    idle_us: float = 0.0  # between two steps
    first_token_ms: float = 0.0
    vllm_ms: float = 0.0
    bare_ms: float = 0.0  # the bare loop's step, for programs

    def line(self) -> str:
        share = self.floor_ms / self.ms if self.ms else 0.0
        ratio = f"{self.vllm_ms / self.ms:6.2f}x" if self.vllm_ms else "      -"
        idle = f"{self.idle_us:7.0f}" if self.busy_ms else "      -"
        tax = f"{self.ms / self.bare_ms - 1:+6.1%}" if self.bare_ms else "     -"
        return (
            f"{self.model:9} {self.name:18} {self.ms:10.3f} {self.tokens_per_s:10.0f} {self.p99_ms:8.3f} {idle}"
            f" {self.first_token_ms:9.1f} {self.floor_ms:9.3f} {share:6.0%} {ratio} {tax}"
        )


HEADER = (
    f"{'model':9} {'cell':18} {'ms':>10} {'tok/s':>10} {'p99 ms':>8} {'idle us':>7} {'first ms':>9} {'floor ms':>9}"
    f" {'share':>6} {'vs vLLM':>7} {'tax':>6}"
)


def main() -> None:
    arguments = _parse()
    peers = [entry for file in arguments.vllm for entry in _peer_entries(file)]
    cells: list[Cell] = []
    print(HEADER, flush=True)
    for name in arguments.models:
        started = time.perf_counter()
        with loaded(SHAPES[name], arguments.device, arguments.option) as driver:
            print(f"{name}: loaded in {time.perf_counter() - started:.1f} s", flush=True)
            for cell in _cells(driver, SHAPES[name], arguments, peers):
                print(cell.line(), flush=True)
                cells.append(cell)
                if arguments.json:
                    arguments.json.write_text(json.dumps([asdict(each) for each in cells], indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = driver_arguments(__doc__, batches=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=[], help="also decode at these context lengths"
    )
    parser.add_argument(
        "--most-context-tokens",
        type=int,
        default=270_000,
        help="of a batch's contexts together; more is left out",
    )
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024, 8000])
    parser.add_argument(
        "--guests", action="store_true", help="also the same decoding, and the mixed workload, by programs"
    )
    parser.add_argument(
        "--pages",
        default="pool",
        choices=["pool", "scattered", "contiguous"],
        help="where the bare loop's contexts lie in the cache: as pie hands out its pages, each anywhere, in a row",
    )
    parser.add_argument("--mixed", action="store_true", help="also the mixed workload of 256 sequences")
    parser.add_argument("--depth", type=int, default=1, help="steps queued behind the open one")
    parser.add_argument("--repeats", type=int, default=2, help="the best run counts")
    parser.add_argument("--vllm", type=Path, nargs="*", default=[])
    return parser.parse_args()


def _cells(
    driver: Driver, shape: Shape, arguments: argparse.Namespace, peers: Sequence[dict[str, Any]]
) -> Iterator[Cell]:
    run(driver, [Story(arguments.prompt, 8)])  # compiles what the prefill needs
    for batch in arguments.batches:
        bare = _decode_cell(driver, shape, batch, arguments.prompt, arguments, peers)
        yield bare
        if arguments.guests:
            yield from _guest_cells(driver, batch, bare, arguments)
    for context in arguments.contexts:
        for batch in arguments.batches:
            fits = batch * (context + 64) * shape.row_bytes < _cache_bytes(driver, shape)
            if fits and batch * context <= arguments.most_context_tokens:
                yield _decode_cell(driver, shape, batch, context, arguments, peers)
    for tokens in arguments.prefill:
        yield _prefill_cell(driver, shape, tokens, arguments.repeats, peers)
    if arguments.mixed:
        mixed = _mixed_cell(driver, shape, arguments, peers)
        yield mixed
        if arguments.guests:
            yield from _mixed_guest_cells(driver, mixed, arguments)


def _cache_bytes(driver: Driver, shape: Shape) -> int:
    space = driver.capabilities.cache[0]
    return space.num_pages * space.page_size * shape.row_bytes


def _decode_cell(
    driver: Driver,
    shape: Shape,
    batch: int,
    prompt: int,
    arguments: argparse.Namespace,
    peers: Sequence[dict[str, Any]],
) -> Cell:
    tokens = arguments.tokens if prompt == arguments.prompt else 64
    best = _best(
        arguments.repeats if prompt == arguments.prompt else 1,
        lambda: run(
            driver, [Story(prompt, tokens)] * batch, arguments.temperature, arguments.depth, arguments.pages
        ),
        lambda timed: timed.decode_s,
    )
    step_ms = 1e3 * best.decode_s / (tokens - 1)
    same = {"bs": batch, "n_in": prompt, "n_out": tokens}
    return Cell(
        shape.name,
        f"decode {batch} @{prompt}",
        step_ms,
        best.tokens / (best.decode_s + best.first_token_s),
        decode_floor_ms(shape, batch, prompt + tokens // 2),
        p99_ms=1e3 * quantiles(best.periods_s, n=100)[-1],
        busy_ms=1e3 * median(best.busy_s),
        idle_us=best.idle_us,
        first_token_ms=1e3 * best.first_token_s,
        vllm_ms=_peer(peers, shape.name, same, "ms_per_step"),
    )


def _guest_cells(driver: Driver, batch: int, bare: Cell, arguments: argparse.Namespace) -> Iterator[Cell]:
    from benchmarks.gpu_guests import decode_with_guests  # needs all of pie; the bare loop needs torch alone

    _prepare_programs()
    for how, depth in (("offload", 1), ("depth 0", 0), ("depth 1", 1), ("depth 4", 4)):
        decode = asyncio.run(
            decode_with_guests(
                driver,
                batch,
                arguments.prompt,
                arguments.tokens,
                depth,
                is_offloaded=how == "offload",
                temperature=arguments.temperature,
            )
        )
        step_ms = 1e3 * batch / decode.tokens_per_s
        yield replace(
            bare,
            name=f"guests {batch} {how}",
            ms=step_ms,
            tokens_per_s=decode.tokens_per_s,
            p99_ms=decode.period_p99_us / 1e3,
            busy_ms=step_ms * decode.utilisation,
            idle_us=1e3 * step_ms * (1 - decode.utilisation),
            first_token_ms=0.0,
            bare_ms=bare.ms,
        )


def _prepare_programs() -> None:
    """As `pie serve` does."""
    from pie_core.processes.garbage import set_survivors_aside
    from pie_core.sandbox.quick_calls import build_if_possible

    build_if_possible()
    set_survivors_aside()


def _prefill_cell(
    driver: Driver, shape: Shape, tokens: int, repeats: int, peers: Sequence[dict[str, Any]]
) -> Cell:
    timed = _best(repeats + 1, lambda: run(driver, [Story(tokens, 1)]), lambda timed: timed.first_token_s)
    ms = 1e3 * timed.first_token_s
    peer = 1e3 * _peer(peers, shape.name, {"prefill": tokens}, "ttft_s")
    return Cell(
        shape.name, f"prefill {tokens}", ms, 1e3 * tokens / ms, prefill_floor_ms(shape, tokens), vllm_ms=peer
    )


def _mixed_cell(
    driver: Driver, shape: Shape, arguments: argparse.Namespace, peers: Sequence[dict[str, Any]]
) -> Cell:
    stories = mixed_stories()
    timed = run(driver, stories, MIXED_TEMPERATURE, arguments.depth, arguments.pages)
    seconds = timed.first_token_s + timed.decode_s
    peer = 1e3 * _peer(peers, shape.name, {"workload": "mixed256"}, "s")
    return Cell(
        shape.name,
        "mixed 256",
        1e3 * seconds,
        timed.tokens / seconds,
        _mixed_floor(shape, stories),
        vllm_ms=peer,
    )


def _mixed_guest_cells(driver: Driver, bare: Cell, arguments: argparse.Namespace) -> Iterator[Cell]:
    from benchmarks.gpu_guests import run_with_guests

    _prepare_programs()
    stories = mixed_stories()
    for how in ("offload", "depth 1"):
        whole = asyncio.run(
            run_with_guests(driver, stories, 1, is_offloaded=how == "offload", temperature=MIXED_TEMPERATURE)
        )
        yield replace(
            bare,
            name=f"mixed 256 {how}",
            ms=1e3 * whole.seconds,
            tokens_per_s=sum(story.tokens for story in stories) / whole.seconds,
            bare_ms=bare.ms,
        )


def mixed_stories() -> list[Story]:
    """256 sequences, prompts and answers of 100 to 1,024 tokens: 133,966 generated tokens."""
    random.seed(MIXED_SEED)
    prompts = []
    for _ in range(256):
        count = random.randint(100, 1024)
        prompts.append(len([random.randint(0, 10000) for _ in range(count)]))
    return [Story(prompt, random.randint(100, 1024)) for prompt in prompts]


def _mixed_floor(shape: Shape, stories: Sequence[Story]) -> float:
    steps = max(story.tokens for story in stories)
    total = sum(prefill_floor_ms(shape, story.prompt) for story in stories)
    for step in range(1, steps):
        live = [story.prompt + step for story in stories if story.tokens > step]
        total += decode_floor_ms(shape, len(live), sum(live) // len(live))
    return total


def _best(repeats: int, measure: Callable[[], Timed], key: Callable[[Timed], float]) -> Timed:
    return min((measure() for _ in range(repeats)), key=key)


def _peer_entries(file: Path) -> list[dict[str, Any]]:
    """vLLM's results: a list of cells, or such a list under "results" with the model said by the file's name."""
    content = json.loads(file.read_text())
    entries = content["results"] if isinstance(content, dict) else content
    model = next((name for name in SHAPES if name in file.name), "8B" if "check8" in file.name else "0.6B")
    return [{"model": model, **entry} for entry in entries]


def _peer(peers: Sequence[dict[str, Any]], model: str, wanted: dict[str, Any], figure: str) -> float:
    matching = [
        float(entry[figure])
        for entry in peers
        if entry["model"] == model
        and figure in entry
        and all(entry.get(name) == value for name, value in wanted.items())
    ]
    return min(matching, default=0.0)


if __name__ == "__main__":
    main()
