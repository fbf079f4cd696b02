"""`pie model logits`, `check` and `plan`: what a checkpoint computes, whether that is right, what it needs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pie_core.cli.examples import examples
from pie_core.cli.outcomes import FAILED, UsageProblem, reporting
from pie_core.cli.progress import ProgressDisplay

if TYPE_CHECKING:
    from pie_core.contracts.driver import Driver, DriverCapabilities
    from pie_core.models.plan import ModelPlan
    from pie_core.plugins import PluginRegistry

CHECKED_TOKENS, CHECKED_GREEDY = 24, 12

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face folder or a GGUF file.")]
FrameFile = Annotated[
    Path,
    typer.Option(
        "--tokens",
        help="A JSON file: a list of token ids. Where tokens have several columns, an id is one of text, and a frame"
        " is a list of its columns' ids.",
    ),
]
DriverName = Annotated[str, typer.Option("--driver", help="Which driver computes.")]
Device = Annotated[str, typer.Option("--device", help="Where, as the driver names it.")]
Dtype = Annotated[str, typer.Option("--dtype", help="The driver's option of that name.")]


def add_to(commands: typer.Typer) -> None:
    commands.command(
        epilog=examples("pie model logits ./tiny --tokens prompt.json --greedy 12 --out out.safetensors")
    )(logits)
    commands.command(epilog=examples("pie model check ./Qwen3-0.6B"))(check)
    commands.command(epilog=examples("pie model plan ./DeepSeek-V3", "pie model plan config.json"))(plan)


@reporting
def logits(
    directory: Directory,
    tokens: FrameFile,
    out: Annotated[Path, typer.Option("--out", help="Where to write tensors `logits` and `tokens`.")],
    greedy: Annotated[int, typer.Option("--greedy", min=0, help="How many tokens to go on with.")] = 0,
    driver: DriverName = "portable",
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Write the logits of every position of a token list, and its greedy continuation. Needs no tokenizer.

    Where tokens have several columns (speech), `logits` is [tokens, streams, vocab] and `tokens` [N, streams]. At a
    position that a frame follows in the file, each column's logits are given that frame's columns before it; at the
    others, the most probable ones.
    """
    from safetensors.numpy import save_file

    from pie_core.engine.frames import read_frames
    from pie_core.engine.one_context import read_logits
    from pie_core.plugins import load_plugins

    prompt = _read_rows(tokens)
    with _loaded(load_plugins(), directory, driver, device, dtype) as model:
        if model.capabilities.streams > 1:
            reading = read_frames(model, prompt, greedy)
        else:
            reading = read_logits(model, _only_tokens(tokens, prompt), greedy)
    save_file({"logits": reading.logits, "tokens": reading.greedy}, out)
    typer.echo(f"{out}: logits {list(reading.logits.shape)}, tokens {reading.greedy.tolist()}")


@reporting
def check(
    directory: Directory,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="A JSON file as for `logits`; else random tokens.")
    ] = None,
    driver: DriverName = "portable",
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Compare logits and greedy tokens with the architecture's reference: transformers, which must be installed."""
    from pie_core.engine.parity import TOLERANCE, compare
    from pie_core.errors import Unsupported
    from pie_core.plugins import load_plugins

    registry = load_plugins()
    with _loaded(registry, directory, driver, device, dtype) as model:
        can = model.capabilities
        reference = registry.architectures[can.architecture].reference
        if reference is None or not directory.is_dir():
            raise Unsupported(
                f"{directory}: architecture {can.architecture!r} names nothing to compare it with; a reference reads"
                " Hugging Face folders, and is named by the architecture's declaration"
            )
        prompt = _prompt(tokens, can)
        parity = compare(model, reference, directory, prompt, CHECKED_GREEDY)
    agreement = (
        "equal" if parity.first_difference is None else f"differ from token {parity.first_difference} on"
    )
    typer.echo(f"{can.architecture} through {driver} in {dtype}, {parity.num_tokens} tokens of prompt")
    typer.echo(
        f"logits   {parity.deviation:.1e} of their standard deviation apart ({TOLERANCE:.0e} are allowed)"
    )
    typer.echo(f"greedy   {parity.num_greedy} tokens {agreement}")
    if not parity.holds:
        raise typer.Exit(FAILED)


@reporting
def plan(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A config.json or a folder that has one.")],
) -> None:
    """Say what a model needs of memory and what fits on 1 and 8 H200, from its config.json alone."""
    from pie_core.models.plan import plan_model
    from pie_core.plugins import load_plugins

    for line in _told(plan_model(path, load_plugins().architectures)):
        typer.echo(line)


def _told(planned: ModelPlan) -> Iterator[str]:
    from pie_core.models.plan import FORMATS, GIB, GPU_COUNTS

    yield f"architecture   {planned.architecture}"
    count = planned.num_parameters
    yield f"parameters     {f'{count / 1e9:.2f} billion' if count >= 1e8 else f'{count / 1e6:.2f} million'}"
    for cache in planned.caches:
        size = f"{cache.bytes_per_token / 1024:.1f} KiB a token" if cache.bytes_per_token else ""
        state = f"{cache.bytes_per_context / 2**20:.1f} MiB a context" if cache.bytes_per_context else ""
        window = f" within {cache.window} tokens" if cache.window else ""
        yield f"cache          {cache.name}: {size or state}{window}"
    for form in FORMATS:
        fits = ", ".join(f"{count} x H200: {_fit(planned, form, count)}" for count in GPU_COUNTS)
        yield f"{form:<14} {planned.weight_bytes[form] / GIB:.1f} GiB of weights; {fits}"


def _fit(planned: ModelPlan, form: str, count: int) -> str:
    tokens = planned.tokens_that_fit(form, count)
    if tokens is None:
        return "no"
    if not planned.bytes_per_token:
        return "yes"
    return f"{tokens / 1e6:.1f} million tokens" if tokens >= 1e5 else f"{tokens} tokens"


@contextmanager
def _loaded(registry: PluginRegistry, path: Path, driver: str, device: str, dtype: str) -> Iterator[Driver]:
    from pie_core.config.options import parse_options
    from pie_core.contracts.driver import DriverRequest

    declaration = registry.driver(driver)
    options: object = parse_options(declaration.options, {"dtype": dtype})
    progress = ProgressDisplay()
    try:
        model = declaration.load(
            DriverRequest(path, device, options, registry.architectures, registry.media, progress)
        )
    finally:
        progress.close()
    try:
        yield model
    finally:
        model.close()


def _prompt(path: Path | None, can: DriverCapabilities) -> Sequence[int | list[int]]:
    if path is None:
        return _random_rows(can.vocab_size, can.streams)
    rows = _read_rows(path)
    return rows if can.streams > 1 else _only_tokens(path, rows)


def _read_rows(path: Path) -> list[int | list[int]]:
    """Tokens and frames."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageProblem(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(_is_token(row) or _is_frame(row) for row in rows):
        raise UsageProblem(f"{path}: expected a list of token ids, such as [1, 15, 27]")
    return rows


def _is_token(value: object) -> bool:
    return type(value) is int


def _is_frame(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_token, value))


def _only_tokens(path: Path, rows: list[int | list[int]]) -> list[int]:
    tokens = [row for row in rows if isinstance(row, int)]
    if len(tokens) < len(rows):
        raise UsageProblem(
            f"{path}: holds frames, and a token has one column: expected a list of ids, such as [1, 15]"
        )
    return tokens


def _random_rows(vocab_size: int, streams: int) -> list[int | list[int]]:
    """The same ones each time; where tokens have several columns, text and frames behind it."""
    chosen = random.Random(5)
    num_frames = CHECKED_TOKENS // 2 if streams > 1 else 0
    text: list[int | list[int]] = [chosen.randrange(vocab_size) for _ in range(CHECKED_TOKENS - num_frames)]
    return text + [[chosen.randrange(vocab_size) for _ in range(streams)] for _ in range(num_frames)]
