"""Kimi Delta Attention: the gated delta rule whose decay is one number for each value of a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.delta_rule import DeltaRule
from pie_plugins.models.layers.delta_shape import DeltaShape
from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.short_conv import ShortConvolution, convolution
from pie_plugins.models.layers.step import CacheRef, Step

CONVOLUTION, MATRIX = 0, 1  # the parts of a layer's state
RULE = DeltaRule()


@dataclass(frozen=True, slots=True, eq=False)
class KimiDelta:
    projection: Linear  # queries, keys, values, low ranks of decay and of gate, beta
    decay: Linear
    gate: Linear
    output: Linear
    convolution: ShortConvolution
    rate: Tensor  # [H, 1], float32: minus how fast heads forget
    rate_bias: Tensor  # [H, D], float32
    norm: Tensor  # [D]
    norm_eps: float
    shape: DeltaShape
    cache: CacheRef

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        heads, dim = self.shape.num_value_heads, self.shape.value_dim
        widths = (self.shape.channels, dim, dim, heads)
        mixed, low_decay, low_gate, beta = self.projection(x, step).split(widths, -1)
        mixed = step.recur(self.cache, CONVOLUTION, self.convolution, [mixed])
        q, k, v = mixed.unflatten(-1, (3, heads, dim)).unbind(1)
        decay = self.decay(low_decay, step).to(torch.float32).unflatten(-1, (heads, dim))
        log_decay = self.rate * functional.softplus(decay + self.rate_bias)
        read = step.recur(self.cache, MATRIX, RULE, [q, k, v, log_decay, beta.sigmoid()])
        normed = step.rms_norm(read, self.norm, self.norm_eps)
        gated = normed.flatten(1) * self.gate(low_gate, step).to(torch.float32).sigmoid()
        return self.output(gated.to(x.dtype), step)


def build_kimi_delta(
    shape: DeltaShape, parameters: Parameters, name: str, norm_eps: float, cache: CacheRef
) -> KimiDelta:
    heads = shape.num_value_heads
    return KimiDelta(
        projection=parameters.linear(f"{name}.projection"),
        decay=parameters.linear(f"{name}.decay"),
        gate=parameters.linear(f"{name}.gate"),
        output=parameters.linear(f"{name}.output"),
        convolution=convolution(parameters.tensor(f"{name}.convolution")),
        rate=-parameters.tensor(f"{name}.rate").exp().view(heads, 1),
        rate_bias=parameters.tensor(f"{name}.rate_bias").view(heads, -1),
        norm=parameters.tensor(f"{name}.norm"),
        norm_eps=norm_eps,
        shape=shape,
        cache=cache,
    )
