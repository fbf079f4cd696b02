"""Mamba 2: a short convolution, a matrix for each head that forgets and takes in rows, and a gated norm of groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.chunks import in_chunks, pair_decay
from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.mamba_shape import MambaShape
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.short_conv import ShortConvolution, convolution
from pie_plugins.models.layers.step import CacheRef, Step

CONVOLUTION, MATRIX = 0, 1  # the parts of a layer's state
CHUNK = 64


@dataclass(frozen=True, slots=True)
class StateSpaceRule:
    """A `Recurrence`: S = decay * S + k v, output = q S.

    q and k are [R, n, G, N], v [R, n, H, P], log decay [R, n, H]; the state [R, H, N, P] is float32.
    """

    def __call__(self, inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (each.to(torch.float32).transpose(1, 2) for each in inputs[:3])
        log_decay = inputs[3].transpose(1, 2)[..., None]
        repeats = v.shape[1] // k.shape[1]
        q, k = q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1)
        step = _one_row if q.shape[2] == 1 else _chunked
        out, after = step(q, k, v, log_decay, state)
        return out.transpose(1, 2), after


def _one_row(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    after = state * log_decay.exp() + k.transpose(-1, -2) * v
    return q @ after, after


def _chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    count = q.shape[2]
    q, k, v, log_decay = (in_chunks(each, min(CHUNK, count)) for each in (q, k, v, log_decay))
    total = log_decay.cumsum(-2)  # (R, H, chunks, size, 1): decay from the chunk's beginning
    own = ((q @ k.transpose(-1, -2)) * pair_decay(total)) @ v
    written = (k * (total[..., -1:, :] - total).exp()).transpose(-1, -2) @ v
    outer_q, chunk_decay = q * total.exp(), total[..., -1:, :].exp()
    outs = []
    for chunk in range(q.shape[2]):
        outs.append(own[:, :, chunk] + outer_q[:, :, chunk] @ state)
        state = state * chunk_decay[:, :, chunk] + written[:, :, chunk]
    return torch.cat(outs, 2)[:, :, :count], state


RULE = StateSpaceRule()


@dataclass(frozen=True, slots=True, eq=False)
class Mamba2:
    projection: Linear  # gate, rows for the convolution, time steps
    output: Linear
    convolution: ShortConvolution
    rate: Tensor  # [H], float32: minus how fast heads forget
    time_bias: Tensor  # [H], float32
    skip: Tensor  # [H, 1]: how much of a row goes past the matrix
    norm: Tensor  # [G, width / G]
    norm_eps: float
    shape: MambaShape
    cache: CacheRef

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        shape, group_width = self.shape, self.shape.num_groups * self.shape.state_size
        widths = (shape.width, shape.channels, shape.num_heads)
        gate, mixed, time = self.projection(x, step).split(widths, -1)
        mixed = step.recur(self.cache, CONVOLUTION, self.convolution, [mixed])
        rows, k, q = mixed.split((shape.width, group_width, group_width), -1)
        rows = rows.unflatten(-1, (shape.num_heads, -1))
        times = functional.softplus(time.to(torch.float32) + self.time_bias)
        inputs = [
            q.unflatten(-1, (shape.num_groups, -1)),
            k.unflatten(-1, (shape.num_groups, -1)),
            rows * times[..., None],
            times * self.rate,
        ]
        read = step.recur(self.cache, MATRIX, RULE, inputs)  # (tokens, heads, head_dim)
        gated = (read + rows * self.skip).flatten(1) * functional.silu(gate)
        normed = step.rms_norm(gated.view(-1, *self.norm.shape), self.norm, self.norm_eps)
        return self.output(normed.flatten(1).to(x.dtype), step)


def build_mamba(
    shape: MambaShape, parameters: Parameters, name: str, norm_eps: float, cache: CacheRef
) -> Mamba2:
    bias = parameters.tensor(f"{name}.convolution_bias") if shape.has_bias else None
    return Mamba2(
        projection=parameters.linear(f"{name}.projection"),
        output=parameters.linear(f"{name}.output"),
        convolution=convolution(parameters.tensor(f"{name}.convolution"), bias),
        rate=-parameters.tensor(f"{name}.rate").exp(),
        time_bias=parameters.tensor(f"{name}.time_bias"),
        skip=parameters.tensor(f"{name}.skip")[:, None],
        norm=parameters.tensor(f"{name}.norm").view(shape.num_groups, -1),
        norm_eps=norm_eps,
        shape=shape,
        cache=cache,
    )
