"""Llama 1 to 3.3, and what follows it to the letter: TinyLlama, SmolLM, MiniMind.

Reference: `LlamaForCausalLM` of transformers. Unusual: GGUF files keep the rotary pairs of q and k side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.dense import DenseConfig, DenseDecoder, read_dense
from pie_plugins.models.layers.transformers_reference import causal_logits


class Llama(DenseDecoder):
    gguf_swaps_pairs = True

    def read(self, keys: ConfigKeys) -> DenseConfig:
        keys.only("partial_rotary_factor", 1.0)
        bias = keys.flag("attention_bias", False)
        return read_dense(
            keys, rope_theta=10000.0, qkv_bias=bias, output_bias=bias, mlp_bias=keys.flag("mlp_bias", False)
        )


DECLARATION = ArchitectureDeclaration(
    name="llama",
    summary="Llama 1 to 3.3 and equal models: TinyLlama, SmolLM, MiniMind",
    model_types=("llama",),
    gguf_architectures=("llama",),
    load=Llama,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
