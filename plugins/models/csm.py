"""CSM: the backbone and the depth decoder. What makes sound of their codes, Mimi, is left aside.

Reference: `CsmForConditionalGeneration` of transformers. Unusual:

- a token is a frame of 32 codes; the backbone draws the first, a small decoder over the columns the others;
- text is fed through the first column, as ids from the codes' vocabulary on;
- both decoders are Llama's; the backbone looks codes up in the depth decoder's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pie_core.contracts.architecture import ArchitectureDeclaration
from pie_core.hookspecs import hookimpl
from pie_plugins.models.layers.architecture import PagedLayout
from pie_plugins.models.layers.config import ConfigKeys
from pie_plugins.models.layers.csm_config import CsmConfig
from pie_plugins.models.layers.dense import DenseConfig, read_dense
from pie_plugins.models.layers.experts import add_gated_mlp
from pie_plugins.models.layers.transformers_reference import frame_logits
from pie_plugins.models.weight_table import WeightTable, hf_source

if TYPE_CHECKING:
    from pie_plugins.models.layers.frame_decoder import FrameDecoder
    from pie_plugins.models.layers.parameters import Parameters


THETA = 500000.0  # where the configuration does not say


def read_csm(keys: ConfigKeys) -> CsmConfig:
    keys.only("tie_codebooks_embeddings", True)
    # The codec's business, and that of whoever writes prompts and stops.
    keys.ignore("codec_config", "audio_token_id", "audio_eos_token_id")
    keys.ignore("codebook_pad_token_id", "codebook_eos_token_id", "tie_word_embeddings")
    section = keys.section("depth_decoder_config")
    if section is None:
        raise keys.error("depth_decoder_config is missing; expected a mapping")
    backbone, depth = _read_llama(keys), _read_llama(section)
    streams = keys.integer("num_codebooks")
    section.only("num_codebooks", streams)
    section.only("backbone_hidden_size", backbone.hidden_size)
    if depth.vocab_size != backbone.vocab_size or depth.max_position_embeddings < streams + 1 or streams < 2:
        raise section.error(
            f"vocab_size is {depth.vocab_size} and max_position_embeddings {depth.max_position_embeddings}, expected"
            f" {backbone.vocab_size} as outside, and at least {max(streams, 2) + 1}, one more than num_codebooks"
        )
    config = CsmConfig(backbone, depth, streams, keys.integer("text_vocab_size"))
    section.finish()
    keys.finish()
    return config


def _read_llama(keys: ConfigKeys) -> DenseConfig:
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    return read_dense(keys, rope_theta=THETA)


class Csm:
    """An `Architecture`."""

    def config(self, values: Mapping[str, Any], origin: str) -> CsmConfig:
        return read_csm(ConfigKeys(values, origin))

    def cache_layouts(self, config: CsmConfig) -> tuple[PagedLayout, ...]:
        """The depth decoder's keys and values last for one frame only."""
        backbone = config.backbone
        layers, kv_heads = backbone.num_hidden_layers, backbone.num_key_value_heads
        return (PagedLayout("kv", layers, kv_heads, backbone.head_dim),)

    def weights(self, config: CsmConfig) -> WeightTable:
        table, backbone, depth = WeightTable(), config.backbone, config.depth
        text = hf_source("embed_text_tokens.weight", config.text_vocab_size, backbone.hidden_size)
        table.take("embedding", text)
        _add_llama(table, backbone, "", "backbone_model")
        table.take("head.weight", hf_source("lm_head.weight", backbone.vocab_size, backbone.hidden_size))
        codes, hf = config.streams * config.vocab_size, "depth_decoder.model"
        table.take("depth.table", hf_source(f"{hf}.embed_tokens.weight", codes, backbone.hidden_size))
        projection = hf_source(
            f"{hf}.inputs_embeds_projector.weight", depth.hidden_size, backbone.hidden_size
        )
        table.take("depth.projection.weight", projection)
        _add_llama(table, depth, "depth.", hf)
        heads = (
            config.streams - 1,
            depth.hidden_size,
            config.vocab_size,
        )  # rows are multiplied from the left
        table.take("depth.heads", hf_source("depth_decoder.codebooks_head.weight", *heads))
        table.leave("codec_model.*", "backbone_model.embed_tokens.embed_audio_tokens.weight")
        return table

    def build(self, config: CsmConfig, parameters: Parameters) -> FrameDecoder:
        from pie_plugins.models.layers.csm_build import build_csm  # torch: not before a model is built

        return build_csm(config, parameters)


def _add_llama(table: WeightTable, config: DenseConfig, ours: str, hf: str) -> None:
    hidden, dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * dim, config.num_key_value_heads * dim
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
    for layer in range(config.num_hidden_layers):
        name, stored = f"{ours}layers.{layer}", f"{hf}.layers.{layer}"
        attention = f"{stored}.self_attn"
        sources = [
            hf_source(f"{attention}.{part}_proj.weight", count, hidden) for part, count in rows.items()
        ]
        table.fuse(f"{name}.qkv.weight", sources)
        table.take(f"{name}.output.weight", hf_source(f"{attention}.o_proj.weight", hidden, q_rows))
        add_gated_mlp(table, config.intermediate_size, hidden, name, f"{stored}.mlp")
        table.take(f"{name}.input_norm", hf_source(f"{stored}.input_layernorm.weight", hidden))
        table.take(f"{name}.mlp_norm", hf_source(f"{stored}.post_attention_layernorm.weight", hidden))
    table.take(f"{ours}norm", hf_source(f"{hf}.norm.weight", hidden))


DECLARATION = ArchitectureDeclaration(
    name="csm",
    summary="CSM 1B: speech as frames of codes",
    model_types=("csm",),
    load=Csm,
    reference=frame_logits,
)


@hookimpl
def pie_architectures() -> Sequence[ArchitectureDeclaration]:
    return [DECLARATION]
