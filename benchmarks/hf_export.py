"""Writes a checkpoint as a Hugging Face folder in bfloat16, without a tokenizer: the same weights for other engines.

    python -m benchmarks.hf_export MODEL.gguf FOLDER

The architecture's own weight table says what each tensor is called there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pie_core.errors import LoadError
from pie_core.plugins import load_plugins
from pie_plugins.models.layers.architecture import Architecture
from pie_plugins.models.layers.loading import load_weights, open_checkpoint
from pie_plugins.models.weight_table import WeightTable

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def export(model: Path, folder: Path) -> None:
    """Does nothing where the folder holds a whole export already."""
    if (folder / "config.json").exists():
        return
    checkpoint = open_checkpoint(model)
    try:
        config = dict(checkpoint.config)
        table = _hf_names(_architecture(checkpoint.kind), config)
        weights = load_weights(checkpoint, table, torch.bfloat16, "cpu", lambda _: None)
        kind = checkpoint.kind
    finally:
        checkpoint.close()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(kind, config), indent=2) + "\n", encoding="utf-8")


def _architecture(kind: str) -> Architecture[Any]:
    for declaration in load_plugins().architectures.values():
        if kind in declaration.gguf_architectures and declaration.name in CLASSES:
            architecture: Architecture[Any] = declaration.load()
            return architecture
    raise LoadError(f"no export of {kind!r}; known are {', '.join(CLASSES)}")


def _hf_names(architecture: Architecture[Any], config: dict[str, Any]) -> WeightTable:
    names = WeightTable()
    own = architecture.weights(architecture.config(config, "the checkpoint"))
    for source in own.sources():
        names.take(source.hf, source)
    names.left = own.left
    return names


def _config(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return config | {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hf_export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    export(arguments.model, arguments.folder)


if __name__ == "__main__":
    main()
