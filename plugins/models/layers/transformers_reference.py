"""Logits of transformers in float32: what architectures are compared with, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pie_core.contracts.forward import Float32
from pie_core.errors import Unsupported


def causal_logits(path: Path, tokens: Sequence[int]) -> Float32:
    """Of a checkpoint that AutoModelForCausalLM loads."""
    return _logits(_loaded(_transformers().AutoModelForCausalLM, path), input_ids=_rows(tokens))


def multimodal_logits(path: Path, tokens: Sequence[int]) -> Float32:
    """Of a checkpoint whose language model stands beside towers. Tokens that stand for media are tokens like others."""
    import torch

    model = _loaded(_transformers().AutoModelForImageTextToText, path)
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(_rows(tokens))
    return _logits(model, inputs_embeds=embedded)


def deepseek_logits(path: Path, tokens: Sequence[int]) -> Float32:
    """Of a checkpoint that is DeepSeek-V3's in all but the name."""
    config = _transformers().DeepseekV3Config.from_json_file(path / "config.json")
    return _logits(
        _loaded(_transformers().DeepseekV3ForCausalLM, path, config=config), input_ids=_rows(tokens)
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise Unsupported("there is nothing to compare with: install transformers") from error
    return transformers


def _loaded(kind: Any, path: Path, **more: Any) -> Any:
    import torch

    with _quiet():
        return kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **more)


def _rows(tokens: Sequence[int]) -> Any:
    import torch

    return torch.tensor([list(tokens)])


def _logits(model: Any, **inputs: Any) -> Float32:
    import torch

    with torch.inference_mode():
        logits: Float32 = model(**inputs).logits[0].numpy()
    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress and the remarks of loading: tensors that are left aside are no news."""
    logging = _transformers().utils.logging
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
