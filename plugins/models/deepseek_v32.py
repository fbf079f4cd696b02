"""DeepSeek V3.2: V3 with sparse attention.

Reference: `DeepseekV32ForCausalLM` of transformers. Unusual: in every layer an indexer chooses which rows the latent
attention reads; it rotates halves where attention rotates pairs. Its keys are neither turned by a Hadamard matrix nor
kept in FP8, as elsewhere: that changes products by rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.latent_decoder import LatentConfig, LatentDecoder, read_index, read_latent
from pie_plugins.models.layers.transformers_reference import causal_logits


class DeepseekV32(LatentDecoder):
    def read(self, keys: ConfigKeys) -> LatentConfig:
        config = read_latent(keys)
        layers = tuple(range(config.num_hidden_layers))
        return replace(config, index=read_index(keys, config, layers, interleaved_rope=False))


DECLARATION = ArchitectureDeclaration(
    name="deepseek_v32",
    summary="DeepSeek V3.2",
    model_types=("deepseek_v32",),
    load=DeepseekV32,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
