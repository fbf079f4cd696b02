"""Gated DeltaNet: a short convolution, the gated delta rule, and a norm that is gated."""

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
class GatedDeltaNet:
    projection: Linear  # queries, keys, values, gate, beta, decay
    output: Linear
    convolution: ShortConvolution
    rate: Tensor  # [H], float32: minus how fast heads forget
    rate_bias: Tensor  # [H], float32
    norm: Tensor  # [value_dim]
    norm_eps: float
    shape: DeltaShape
    cache: CacheRef

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        shape, heads = self.shape, self.shape.num_value_heads
        widths = (shape.channels, heads * shape.value_dim, heads, heads)
        mixed, gate, beta, decay = self.projection(x, step).split(widths, -1)
        mixed = step.recur(self.cache, CONVOLUTION, self.convolution, [mixed])
        key_width = shape.num_key_heads * shape.key_dim
        q, k, v = mixed.split((key_width, key_width, heads * shape.value_dim), -1)
        log_decay = self.rate * functional.softplus(decay.to(torch.float32) + self.rate_bias)
        inputs = [
            q.unflatten(-1, (-1, shape.key_dim)),
            k.unflatten(-1, (-1, shape.key_dim)),
            v.unflatten(-1, (-1, shape.value_dim)),
            log_decay[..., None],
            beta.sigmoid(),
        ]
        read = step.recur(self.cache, MATRIX, RULE, inputs)  # (tokens, heads, value_dim)
        normed = step.rms_norm(read, self.norm, self.norm_eps)
        gated = normed.flatten(1) * functional.silu(gate.to(torch.float32))
        return self.output(gated.to(x.dtype), step)


def build_gated_delta(
    shape: DeltaShape, parameters: Parameters, name: str, norm_eps: float, cache: CacheRef
) -> GatedDeltaNet:
    return GatedDeltaNet(
        projection=parameters.linear(f"{name}.projection"),
        output=parameters.linear(f"{name}.output"),
        convolution=convolution(parameters.tensor(f"{name}.convolution")),
        rate=-parameters.tensor(f"{name}.rate").exp(),
        rate_bias=parameters.tensor(f"{name}.rate_bias"),
        norm=parameters.tensor(f"{name}.norm"),
        norm_eps=norm_eps,
        shape=shape,
        cache=cache,
    )
