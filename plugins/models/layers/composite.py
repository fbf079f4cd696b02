"""Configurations that hold one for the language model beside those of towers."""

from __future__ import annotations

from dataclasses import dataclass

from pie_plugins.models.layers.config import ConfigKeys

# What the outer configuration says about tokens that stand for media: the front-ends' business.
TOKENS = (
    "audio_token_id",
    "boa_token_id",
    "boi_token_id",
    "eoa_token_index",
    "eoi_token_id",
    "image_token_id",
    "video_token_id",
    "vision_end_token_id",
    "vision_start_token_id",
)


@dataclass(frozen=True, slots=True)
class TextPart:
    """The keys of the language model, and what its tensors' names begin with."""

    keys: ConfigKeys
    prefix: str
    is_tied: bool  # the head shares the matrix of the embedding


def text_part(outer: ConfigKeys) -> TextPart:
    """From `text_config` where there is one; the configuration itself is the language model's otherwise."""
    text = outer.section("text_config")
    if text is None:
        return TextPart(outer, "model", outer.flag("tie_word_embeddings", False))
    is_tied = text.flag("tie_word_embeddings", False)
    is_tied = outer.flag("tie_word_embeddings", is_tied)  # decides where both are there
    outer.ignore("vision_config", "audio_config", *TOKENS)
    outer.finish()
    return TextPart(text, "model.language_model", is_tied)
