"""Compiles every kernel of the CUDA driver for Hopper, wherever Triton is: registers, stack, shared memory.

    python -m benchmarks.gpu_compile [--capability 90]

What a kernel needs of a multiprocessor says how many programs of it fit there, before a GPU is at hand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pie_plugins.drivers.cuda_native import (
    decode_attention,
    fused_sampling,
    invariant_linear,
    triton_attention,
    triton_decode,
    triton_groups,
    triton_layers,
    triton_products,
    triton_sampling,
    triton_steps,
    triton_work,
    tuned_linear,
)

WARP = 32
LITTLE = 32  # bytes of stack: a word or two, not registers that did not fit
HALVES = {"q", "pages", "out", "x", "weight", "bias", "delta", "qkv", "norm", "gate_up", "logits", "matrices"}
FLOATS = {
    "cos", "sin", "partial", "partial_max", "partial_sum", "temperature", "top_p", "min_p", "best", "score",
    "parts",
}  # fmt: skip
DOUBLES = {"facts"}
LONGS = {"listed", "weights"}
SCALARS = {
    "columns": "i32", "eps": "fp32", "scale": "fp32", "num_heads": "i32", "num_kv_heads": "i32", "heads": "i32",
    "q_stride": "i32", "mask_width": "i32", "tiles": "i32", "narrow_rows": "i32", "wide": "i32", "rows_each": "i32",
    "vocab_size": "i32", "chunks": "i32", "shares": "i32", "chunks_each": "i32", "splits": "i32",
    "num_rows": "i32", "num_requests": "i32", "num_pages": "i32", "num_samplers": "i32", "max_drafts": "i32",
    "accepted_at": "i32", "last_at": "i32", "length_at": "i32", "tokens_at": "i32", "live_at": "i32", "rows": "i32",
    "outputs": "i32", "inputs": "i32", "share": "i32", "tile_rows": "i32", "num_matrices": "i32",
}  # fmt: skip
MULTIPLES = {"q_stride", "vocab_size", "outputs", "inputs", "share"}  # of 16, in every real model


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its constants."""

    kernel: Any
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    pointers: frozenset[str] = frozenset()  # names that are scalars elsewhere

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True, slots=True)
class Needs:
    registers: int
    stack_bytes: int
    shared_bytes: int


def variants() -> Iterator[Variant]:
    """What a Qwen3 of 0.6B and of 8B uses."""
    for hidden in (1024, 4096):
        for kernel in (triton_layers.rms_norm_kernel, triton_layers.add_rms_norm_kernel):
            yield Variant(kernel, {"BLOCK": hidden}, warps=max(4, hidden // 512))
    yield Variant(triton_layers.silu_mul_kernel, {"BLOCK": 1024})
    yield Variant(
        triton_layers.place_heads_kernel, {"PAGE": 16, "DIM": 128, "HALF": 64, "HEADS": 8, "NORMED": True}
    )
    yield from _attention()
    yield from _work()
    yield from _decoding()
    yield Variant(
        triton_steps.prepare_kernel,
        {"PAGE": 16, "DEPENDENCY": 1, "FIRST": True, "BLOCK": 256},
        pointers=_COLUMNS,
    )
    yield Variant(triton_steps.settle_kernel, {"BLOCK": 256})
    yield from _sampling()
    yield from _products()


_COLUMNS = frozenset({"columns"})


def _attention() -> Iterator[Variant]:
    same = {"DIM": 128, "DIMS": 128, "PAGE": 16, "SHORTEST": 256, "TURNS": False, "PRECISION": "tf32"}
    for group in (2, 4):
        for masked in (False, True):
            narrow = {
                "GROUP": group,
                "ROWS": 16,
                "COLUMNS": 64,
                "NARROW": True,
                "MASKED": masked,
                "CASCADE": False,
                "PREFIX": False,
            }
            yield Variant(triton_attention.attend_kernel, same | narrow, pointers=_COLUMNS)
        invariant = narrow | {"MASKED": False, "SHORTEST": 512, "TURNS": True}
        yield Variant(triton_attention.attend_kernel, same | invariant, pointers=_COLUMNS)
        plain = {"GROUP": group, "COLUMNS": 64, "MASKED": False}
        behind = plain | {"ROWS": 16, "NARROW": True, "CASCADE": True, "PREFIX": False}
        yield Variant(triton_attention.attend_kernel, same | behind, pointers=_COLUMNS)
        prefix = plain | {"ROWS": 16 * group, "NARROW": False, "CASCADE": False, "PREFIX": True}
        yield Variant(triton_attention.attend_kernel, same | prefix, stages=2, pointers=_COLUMNS)
    wide = {
        "GROUP": 2,
        "ROWS": 128,
        "COLUMNS": 64,
        "NARROW": False,
        "MASKED": False,
        "CASCADE": False,
        "PREFIX": False,
    }
    yield Variant(triton_attention.attend_kernel, same | wide, warps=8, stages=2, pointers=_COLUMNS)
    merge = {
        "GROUP": 2,
        "DIM": 128,
        "DIMS": 128,
        "ROWS": 16,
        "COLUMNS": 64,
        "SHORTEST": 256,
        "MASKED": False,
    }
    for splits, parts in ((64, 64), (64, 128)):
        constants = merge | {"SPLITS": splits, "PARTS": parts}
        yield Variant(triton_attention.merge_kernel, constants, pointers=_COLUMNS)


def _work() -> Iterator[Variant]:
    same = {"DIM": 128, "DIMS": 128}
    for group in (2, 4):
        for rows in (64, 128):
            cut = {"GROUP": group, "PAGE": 16, "ROWS": rows, "COLUMNS": 64, "PRECISION": "tf32"}
            warps = 8 if rows > 64 else 4
            yield Variant(
                triton_work.attend_items_kernel, same | cut, warps=warps, stages=2, pointers=_COLUMNS
            )
    yield Variant(triton_work.merge_items_kernel, same | {"HEADS": 16})


def _decoding() -> Iterator[Variant]:
    listed = {
        "COUNTERS": decode_attention.COUNTERS,
        "HEADER": decode_attention.HEADER,
        "WORDS": 16,
        "PAGE": 16,
    }
    same = {"DIM": 128, "DIMS": 128, "ROWS": 16, "PRECISION": "tf32"}
    for tiling in (decode_attention.ALONE, decode_attention.FEW, decode_attention.MANY):
        cut = listed | {"PAGES": tiling.columns // 16, "COLUMNS": tiling.columns}
        tiles = cut | {"TILES": 16, "REQUESTS": 256}
        yield Variant(triton_decode.list_tiles_kernel, tiles, pointers=_COLUMNS)
        for group in (2, 4):
            heads = {"GROUP": group, "MEMBERS": group, "PARTS": 16 * tiling.warps // group}
            yield Variant(triton_decode.decode_kernel, cut | same | heads, tiling.warps, tiling.stages)


def _sampling() -> Iterator[Variant]:
    chunk, listable = fused_sampling.CHUNK, fused_sampling.LISTABLE
    share = {"CHUNK": chunk, "SHARES": 256}
    scouted = share | {"LISTABLE": listable, "STAGES": fused_sampling.SCOUT_STAGES}
    yield Variant(triton_sampling.scout_kernel, scouted | {"NOTHING_ALLOWED": 2, "NOT_A_NUMBER": 3})
    yield Variant(triton_sampling.draw_kernel, share | {"LISTABLE": listable})
    yield Variant(triton_sampling.contest_kernel, share)
    finished = {
        "SHARES": 256,
        "LISTABLE": listable,
        "BLOCK": fused_sampling.BLOCK,
        "STAGES": fused_sampling.FINISH_STAGES,
    }
    yield Variant(triton_sampling.finish_kernel, finished, warps=fused_sampling.FINISH_WARPS)


def _products() -> Iterator[Variant]:
    for gated, added in ((False, False), (False, True), (True, False)):
        around = {"BIASED": False, "GATED": gated, "ADDED": added}
        for cut in tuned_linear.ONE_ROW_CUTS:
            constants = {"OUTPUTS": cut.outputs, "INPUTS": cut.inputs, "NORMED": not added} | around
            yield Variant(triton_products.one_row_kernel, constants, warps=cut.warps)
        holding = tuple(
            tuned_linear.Cut(64, 256, 4, stages=2, held=held) for held in ((1,) if gated else (1, 2))
        )
        for rows, cut in product((16, 32, 64), tuned_linear.FEW_ROWS_CUTS + holding):
            constants = {"ROWS": rows, "OUTPUTS": cut.outputs, "INPUTS": cut.inputs, "SHARES": cut.shares}
            constants |= {"HELD": cut.held, "REST": cut.stages > 2}
            yield Variant(
                triton_products.few_rows_kernel, constants | around, warps=cut.warps, stages=cut.stages
            )
    for tiles in (invariant_linear.SMALL, invariant_linear.LARGE):
        sizes = {"ROWS": tiles.rows, "OUTPUTS": tiles.outputs, "INPUTS": tiles.inputs, "PRECISION": "tf32"}
        many = sizes | {"BIASED": False, "ADDED": True}
        yield Variant(triton_products.product_kernel, many, warps=tiles.warps, stages=tiles.stages)
    grouped = {"MATRICES": 128, "ROWS": 32, "OUTPUTS": 64, "INPUTS": 64, "PRECISION": "tf32"}
    yield Variant(triton_groups.grouped_kernel, grouped)


def needs(variant: Variant, capability: int) -> Needs:
    names = variant.kernel.arg_names
    constants = dict(variant.constants)
    if "OVERLAPS" in names:
        constants["OVERLAPS"] = True
    types = {name: "constexpr" if name in constants else _type(name, variant) for name in names}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in MULTIPLES]
    source = ASTSource(
        variant.kernel,
        types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "launch_pdl": "OVERLAPS" in names}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Needs(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)


def _type(name: str, variant: Variant) -> str:
    if name in SCALARS and name not in variant.pointers:
        return SCALARS[name]
    return (
        "*bf16"
        if name in HALVES
        else "*fp32"
        if name in FLOATS
        else "*fp64"
        if name in DOUBLES
        else "*i64"
        if name in LONGS
        else "*i32"
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90)
    capability = parser.parse_args().capability
    spilled = 0
    for variant in variants():
        found = needs(variant, capability)
        spilled += found.stack_bytes > LITTLE
        constants = " ".join(f"{name}={value}" for name, value in variant.constants.items())
        print(
            f"{variant.name:20} {found.registers:4} registers {found.stack_bytes:4} B stack"
            f" {found.shared_bytes:7} B shared  {variant.warps} warps  {constants}",
            flush=True,
        )
    sys.exit(1 if spilled else 0)


if __name__ == "__main__":
    main()
