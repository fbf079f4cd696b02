"""Guests against other engines on the same weights: greedy tokens per second of whole runs, alternating in rounds.

    python -m benchmarks.peers --vllm PYTHON [--batches 1 8 32] [--rounds 5] [--quick] [--json FILE]
    python -m benchmarks.peers --llama-cpp FOLDER --batches 1

PYTHON is the interpreter of an environment with vLLM; FOLDER holds the node_modules with node-llama-cpp. Every engine
gets the same token ids and draws as many tokens, past any end token: ours through guests (`collect_tokens`), launch
and prefill included, vLLM through `LLM.generate`, llama.cpp (which multiplies in 8 bits) through `sequence.evaluate`.
Ratios are medians over the rounds, lowest and highest beside them; above 1 is faster than the peer.

CPU seconds count all threads of a process: where others use the machine too, compare tokens per CPU second rather than
the wall clock, and with `--threads 1`, since two threads that meet after every product wait for the one that is not
running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.hf_export import export
from benchmarks.pie_in_process import run_all, settings
from pie_core.app import Application
from pie_core.programs import PythonProgram

PROMPT_TOKENS = 32
SOURCE = """
from inferlet import Context, Model, Sampler

async def main(input):
    context = Context(Model.load()).append(input["prompt"])
    generation = context.generate(Sampler.argmax(), max_tokens=input["max_tokens"], stop=[], auto_flush=False)
    return await generation.collect_tokens()
"""
PROGRAM = PythonProgram("collect-tokens", (("main.py", textwrap.dedent(SOURCE)),), "main.py")


@dataclass(frozen=True, slots=True)
class Run:
    wall_s: float
    cpu_s: float
    tokens: list[list[int]]

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))


@dataclass(frozen=True, slots=True)
class Row:
    peer: str
    batch: int
    our_tokens_per_s: float
    peer_tokens_per_s: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    our_tokens_per_cpu_s: float
    peer_tokens_per_cpu_s: float
    cpu_ratio: float
    same_tokens: float  # part of the greedy tokens that agree, up to the first difference of each context


class Peer:
    """Another engine in a process of its own, asked by lines of JSON.

    It is stopped while it is not asked: threads of an idle engine may spin, and take the processor from the other.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | environment,
        )
        self._answer()
        self._process.send_signal(signal.SIGSTOP)

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Run:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        print(
            json.dumps({"prompts": prompts, "max_tokens": max_tokens}), file=self._process.stdin, flush=True
        )
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return Run(**answer)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self.close()
            raise SystemExit(
                f"{self.name} ended with status {status}; try its command: {self._process.args!r}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


async def ours(app: Application, prompts: Sequence[Sequence[int]], max_tokens: int) -> Run:
    given = [{"prompt": list(prompt), "max_tokens": max_tokens} for prompt in prompts]
    wall, cpu = time.perf_counter(), time.process_time()
    ran = await run_all(app, PROGRAM, given)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Run(wall, cpu, [tokens for tokens, _ in ran])


async def compare(app: Application, peer: Peer, batch: int, arguments: argparse.Namespace) -> Row:
    pairs = []
    for number in range(arguments.rounds):
        prompts = [_prompt(number * batch + place) for place in range(batch)]
        if number % 2:
            theirs = peer.run(prompts, arguments.tokens)
            pairs.append((await ours(app, prompts, arguments.tokens), theirs))
        else:
            mine = await ours(app, prompts, arguments.tokens)
            pairs.append((mine, peer.run(prompts, arguments.tokens)))
    return _row(peer.name, batch, pairs)


def _row(peer: str, batch: int, pairs: Sequence[tuple[Run, Run]]) -> Row:
    ratios = [theirs.wall_s / mine.wall_s for mine, theirs in pairs]
    return Row(
        peer=peer,
        batch=batch,
        our_tokens_per_s=median(mine.count / mine.wall_s for mine, _ in pairs),
        peer_tokens_per_s=median(theirs.count / theirs.wall_s for _, theirs in pairs),
        ratio=median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        our_tokens_per_cpu_s=median(mine.count / mine.cpu_s for mine, _ in pairs),
        peer_tokens_per_cpu_s=median(theirs.count / theirs.cpu_s for _, theirs in pairs),
        cpu_ratio=median(theirs.cpu_s / mine.cpu_s for mine, theirs in pairs),
        same_tokens=sum(_agreeing(mine, theirs) for mine, theirs in pairs)
        / sum(mine.count for mine, _ in pairs),
    )


def _agreeing(mine: Run, theirs: Run) -> int:
    return sum(map(_common, mine.tokens, theirs.tokens))


def _common(mine: list[int], theirs: list[int]) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=True))
    return len(list(same))


def _prompt(number: int) -> list[int]:
    return [(7919 * number + 104729 * place) % 40000 + 100 for place in range(PROMPT_TOKENS)]


@contextlib.contextmanager
def started(arguments: argparse.Namespace, model: Path) -> Iterator[list[Peer]]:
    """The peers that were asked for; vLLM reads an export of the weights."""
    here = Path(__file__).parent
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if arguments.vllm:
                folder = arguments.export or Path(scratch)
                export(model, folder)
                command = [
                    str(arguments.vllm),
                    str(here / "peer_vllm.py"),
                    str(folder),
                    *arguments.vllm_option,
                ]
                cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: arguments.threads]))
                peers.append(Peer("vLLM", command, {"VLLM_CPU_OMP_THREADS_BIND": cores}))
            if arguments.llama_cpp:
                command = ["node", str(here / "peer_llama_cpp.mjs"), str(model)]
                environment = {"NODE_MODULES": str(arguments.llama_cpp), "THREADS": str(arguments.threads)}
                peers.append(Peer("llama.cpp", command, environment))
            yield peers
        finally:
            for peer in peers:
                peer.close()


async def measure(arguments: argparse.Namespace) -> list[Row]:
    config = settings(arguments.config, {"cpu_threads": arguments.threads})
    model = config.models[0].path
    assert model is not None, "peers need a checkpoint"
    rows = []
    async with Application(config, lambda _: None) as app:
        with started(arguments, model) as peers:
            for peer in peers:
                await compare(app, peer, 1, argparse.Namespace(rounds=1, tokens=4))  # warms both up
                for batch in arguments.batches if peer.name != "llama.cpp" else [1]:
                    rows.append(await compare(app, peer, batch, arguments))
                    print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    return (
        f"{row.peer:9} batch {row.batch:2}: "
        f"ours {row.our_tokens_per_s:.1f} tok/s, theirs {row.peer_tokens_per_s:.1f}: "
        f"{row.ratio:.2f}x ({row.lowest_ratio:.2f} to {row.highest_ratio:.2f}); "
        f"per CPU second {row.our_tokens_per_cpu_s:.1f} and {row.peer_tokens_per_cpu_s:.1f}: {row.cpu_ratio:.2f}x; "
        f"{row.same_tokens:.0%} of the tokens agree"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="the interpreter of vLLM's environment")
    parser.add_argument("--vllm-option", action="append", default=[], help="--compiled: with torch.compile")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where node-llama-cpp is installed")
    parser.add_argument("--export", type=Path, help="keep the exported weights here")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of every engine; 1 where the machine is shared"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="that each context draws")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--config", type=Path, help="a configuration of one model; the default model otherwise"
    )
    parser.add_argument("--quick", action="store_true", help="one round of 8 tokens, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parsed = parser.parse_args(arguments)
    if parsed.vllm is None and parsed.llama_cpp is None:
        parser.error("name at least one peer: --vllm or --llama-cpp")
    if parsed.quick:
        parsed.rounds, parsed.tokens = 1, 8
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = _parse(arguments)
    rows = asyncio.run(measure(parsed))
    if parsed.json:
        parsed.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
