"""Kimi K2, and the language model of Kimi K2.5 to K2.7.

Reference: `DeepseekV3ForCausalLM` of transformers, of which both are instances. Unusual: K2.5 wraps it, configuration
and tensors, into a model with a vision tower, which is left aside here.
"""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.latent_decoder import LatentConfig, LatentDecoder, read_latent
from pie_plugins.models.layers.transformers_reference import deepseek_logits, multimodal_logits
from pie_plugins.models.weight_table import WeightTable

MEDIA_KEYS = (
    "ignore_index",
    "image_token_id",
    "media_placeholder_token_id",
    "projection_hidden_size",
    "projection_layer_norm_eps",
    "use_unified_vision_chunk",
    "video_placeholder",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
)


class KimiK25(LatentDecoder):
    prefix = "language_model."

    def read(self, keys: ConfigKeys) -> LatentConfig:
        keys.ignore(*MEDIA_KEYS)
        text = keys.section("text_config")
        if text is None:
            raise keys.error("text_config is missing, expected the configuration of the language model")
        keys.only("tie_word_embeddings", False)
        text.only("tie_word_embeddings", False)
        config = read_latent(text)
        text.finish()
        return config

    def weights(self, config: LatentConfig) -> WeightTable:
        table = super().weights(config)
        table.leave("vision_tower.*", "mm_projector.*", "model.mm_projector.*")
        table.also_called("language_model.model.blocks.", "language_model.model.layers.")  # by transformers
        return table


K2 = ArchitectureDeclaration(
    name="kimi_k2",
    summary="Kimi K2",
    model_types=("kimi_k2",),
    load=LatentDecoder,
    reference=deepseek_logits,
)
K25 = ArchitectureDeclaration(
    name="kimi_k25",
    summary="Kimi K2.5 to K2.7, language model",
    model_types=("kimi_k25",),
    load=KimiK25,
    reference=multimodal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [K2, K25]
