"""The architecture seed_oss: Seed-OSS of ByteDance, 36B.

Reference: `SeedOssForCausalLM` of transformers. Unusual: query, key and value have biases, and the output of attention
has one only where its own key says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.dense import DenseConfig, DenseDecoder, read_dense


class SeedOss(DenseDecoder):
    def read(self, keys: ConfigKeys) -> DenseConfig:
        keys.ignore("residual_dropout")  # of training
        return read_dense(
            keys,
            head_dim=128,
            rope_theta=10000.0,
            qkv_bias=keys.flag("attention_bias", True),
            output_bias=keys.flag("attention_out_bias", False),
            mlp_bias=keys.flag("mlp_bias", False),
        )


DECLARATION = ArchitectureDeclaration(
    name="seed_oss",
    summary="Seed-OSS of ByteDance",
    model_types=("seed_oss",),
    load=SeedOss,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
