"""CSM's two decoders, built from their configurations and parameters."""

from __future__ import annotations

from pie_plugins.models.layers.csm_config import CsmConfig
from pie_plugins.models.layers.decoder import Decoder
from pie_plugins.models.layers.dense import DenseConfig
from pie_plugins.models.layers.dense_build import dense_layer, dense_rope
from pie_plugins.models.layers.depth_decoder import DepthDecoder, DepthLayer
from pie_plugins.models.layers.frame_decoder import FrameDecoder
from pie_plugins.models.layers.moe import build_gated_mlp
from pie_plugins.models.layers.norm import RMSNorm
from pie_plugins.models.layers.parameters import Parameters


def build_csm(config: CsmConfig, parameters: Parameters) -> FrameDecoder:
    return FrameDecoder(_backbone(config.backbone, parameters), _depth(config.depth, parameters))


def _backbone(config: DenseConfig, parameters: Parameters) -> Decoder:
    rope, layers = dense_rope(config), range(config.num_hidden_layers)
    return Decoder(
        embedding=parameters.tensor("embedding"),
        layers=tuple(dense_layer(config, parameters, rope, layer) for layer in layers),
        norm=RMSNorm(parameters.tensor("norm"), config.rms_norm_eps),
        head=parameters.linear("head"),
    )


def _depth(config: DenseConfig, parameters: Parameters) -> DepthDecoder:
    heads = parameters.tensor("depth.heads").transpose(1, 2)
    return DepthDecoder(
        table=parameters.tensor("depth.table"),
        projection=parameters.linear("depth.projection"),
        layers=tuple(_layer(config, parameters, layer) for layer in range(config.num_hidden_layers)),
        norm=RMSNorm(parameters.tensor("depth.norm"), config.rms_norm_eps),
        heads=tuple(parameters.tied_linear(head.contiguous()) for head in heads),
        rope=dense_rope(config),
        vocab_size=config.vocab_size,
    )


def _layer(config: DenseConfig, parameters: Parameters, layer: int) -> DepthLayer:
    name, eps = f"depth.layers.{layer}", config.rms_norm_eps
    return DepthLayer(
        input_norm=RMSNorm(parameters.tensor(f"{name}.input_norm"), eps),
        qkv=parameters.linear(f"{name}.qkv"),
        output=parameters.linear(f"{name}.output"),
        mlp_norm=RMSNorm(parameters.tensor(f"{name}.mlp_norm"), eps),
        mlp=build_gated_mlp(parameters, name),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )
