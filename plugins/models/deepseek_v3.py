"""DeepSeek V3, V3.1 and R1, and what follows them to the letter, such as Moonlight.

Reference: `DeepseekV3ForCausalLM` of transformers. Unusual: latent attention with rotary pairs side by side; YaRN
changes the softmax scale; experts are chosen within groups. The layer behind the last one, which predicts a second
token, is left aside.
"""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.latent_decoder import LatentDecoder
from pie_plugins.models.layers.transformers_reference import causal_logits

DECLARATION = ArchitectureDeclaration(
    name="deepseek_v3",
    summary="DeepSeek V3, V3.1 and R1, Moonlight",
    model_types=("deepseek_v3",),
    load=LatentDecoder,
    reference=causal_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
