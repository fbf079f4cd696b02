"""GLM-5, 5.1 and 5.2.

Reference: `GlmMoeDsaForCausalLM` of transformers. Unusual: DeepSeek V3.2's layers, but the indexer rotates pairs too,
and from 5.2 on most layers read the rows that the last layer with an indexer chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.latent_decoder import LatentConfig, LatentDecoder, read_index, read_latent
from pie_plugins.models.layers.transformers_reference import causal_logits

LETTERS = {"F": "full", "S": "shared"}


class Glm5(LatentDecoder):
    def read(self, keys: ConfigKeys) -> LatentConfig:
        keys.only("indexer_rope_interleave", True)
        keys.ignore("index_share_for_mtp_iteration")  # of the layer that predicts a second token
        config = read_latent(keys)
        layers = _choosing_layers(keys, config.num_hidden_layers)
        return replace(config, index=read_index(keys, config, layers, interleaved_rope=True))


def _choosing_layers(keys: ConfigKeys, count: int) -> tuple[int, ...]:
    """Written out by layer, as a pattern of letters, or as every n-th layer behind the first few."""
    offset, every = keys.integer("index_skip_topk_offset", 2), max(keys.integer("index_topk_freq", 1), 1)
    pattern = keys.text("index_topk_pattern", "")
    kinds = keys.texts("indexer_types") or tuple(LETTERS.get(letter, letter) for letter in pattern)
    if not kinds:
        kinds = tuple("shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(count))
    if len(kinds) < count or set(kinds) - {"full", "shared"} or kinds[0] != "full":
        raise keys.error(
            f"indexer_types is {kinds}, expected full or shared for each of {count} layers, full first"
        )
    return tuple(layer for layer in range(count) if kinds[layer] == "full")


DECLARATION = ArchitectureDeclaration(
    name="glm5",
    summary="GLM-5, 5.1 and 5.2",
    model_types=("glm_moe_dsa",),
    load=Glm5,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
