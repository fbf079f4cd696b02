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


def frame_logits(path: Path, rows: Sequence[int | Sequence[int]]) -> Float32:
    """Of every column of a CSM checkpoint, at ids of text and frames of codes."""
    import torch

    model = _loaded(_transformers().CsmForConditionalGeneration, path)
    with torch.inference_mode():
        embedded = torch.cat([_embedded_row(model, row) for row in rows])[None]
        hidden = model.backbone_model(inputs_embeds=embedded).last_hidden_state[0]
        columns = [model.lm_head(hidden)]
        chosen = torch.zeros(
            len(rows), 1, dtype=torch.int64
        )  # in front of the columns stands a place for `hidden`
        for column in range(1, model.config.num_codebooks):
            codes = _followed(rows, column - 1, columns[-1].argmax(-1))
            chosen = torch.cat((chosen, codes[:, None]), 1)
            deep = model.depth_decoder(input_ids=chosen, backbone_last_hidden_state=hidden)
            columns.append(deep.logits[:, -1])
        logits: Float32 = torch.stack(columns, 1).numpy()
    return logits


def _embedded_row(model: Any, row: int | Sequence[int]) -> Any:
    import torch

    if isinstance(row, int):
        return model.embed_text_tokens(torch.tensor([row]))
    return model.backbone_model.embed_tokens(torch.tensor([[list(row)]]))[0]


def _followed(rows: Sequence[int | Sequence[int]], column: int, most_probable: Any) -> Any:
    """At each row, this column of the frame that follows it; where none does, the most probable code."""
    codes = most_probable.clone()
    for place, row in enumerate(rows[1:]):
        if not isinstance(row, int):
            codes[place] = row[column]
    return codes


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
