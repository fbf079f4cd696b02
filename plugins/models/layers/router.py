"""Routers: which experts each token goes through, and how much each counts. In float32 whatever the model runs in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.models.layers.experts import GroupRouting, SoftmaxRouting

SMALLEST_SUM = 1e-20  # added before weights are divided by their sum


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    experts: Tensor  # [T, k], int64
    weights: Tensor  # [T, k], float32


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxRouter:
    weight: Tensor  # [E, hidden], float32
    experts_per_token: int
    routing: SoftmaxRouting

    def __call__(self, x: Tensor) -> Choice:
        probabilities = functional.linear(x.to(torch.float32), self.weight).softmax(-1)
        weights, experts = probabilities.topk(self.experts_per_token, dim=-1)
        if self.routing.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Choice(experts, weights)


@dataclass(frozen=True, slots=True, eq=False)
class GroupRouter:
    weight: Tensor  # [E, hidden], float32
    correction: Tensor  # [E], float32
    experts_per_token: int
    routing: GroupRouting

    def __call__(self, x: Tensor) -> Choice:
        scores = functional.linear(x.to(torch.float32), self.weight).sigmoid()
        ranked = scores + self.correction
        if self.routing.num_groups > 1:
            ranked = self._within_best_groups(ranked)
        experts = ranked.topk(self.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.routing.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
        return Choice(experts, weights * self.routing.scale)

    def _within_best_groups(self, ranked: Tensor) -> Tensor:
        groups = ranked.unflatten(-1, (self.routing.num_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(self.routing.kept_groups, dim=-1).indices
        dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        kept: Tensor = groups.masked_fill(dropped[..., None], float("-inf"))
        return kept.flatten(-2)


@dataclass(frozen=True, slots=True, eq=False)
class ScaledRouter:
    """Normed rows times a scale; weights of the chosen experts add up to one, then each expert has its own scale."""

    weight: Tensor  # [E, hidden], float32
    scale: Tensor  # [hidden], float32
    expert_scale: Tensor  # [E], float32
    eps: float
    experts_per_token: int

    def __call__(self, x: Tensor) -> Choice:
        normed = functional.rms_norm(x.to(torch.float32), self.scale.shape, self.scale, self.eps)
        probabilities = functional.linear(normed, self.weight).softmax(-1)
        weights, experts = probabilities.topk(self.experts_per_token, dim=-1)
        return Choice(experts, weights / weights.sum(-1, keepdim=True) * self.expert_scale[experts])


Router = SoftmaxRouter | GroupRouter
