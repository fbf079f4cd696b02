"""Mixture of experts: each token goes through the experts that a router chooses, and perhaps one that all share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pie_plugins.models.layers.decoder import Part
from pie_plugins.models.layers.experts import ExpertSettings, GroupRouting
from pie_plugins.models.layers.linear import Linear
from pie_plugins.models.layers.mlp import Activation, GatedMLP, silu_gated
from pie_plugins.models.layers.parameters import Parameters
from pie_plugins.models.layers.router import Choice, GroupRouter, Router, SoftmaxRouter
from pie_plugins.models.layers.step import Step


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    up: Tensor  # [E, I, hidden]; [E, 2 I, hidden], gate first, where the activation is gated
    down: Tensor  # [E, hidden, I]
    activation: Activation = silu_gated

    def __call__(self, x: Tensor, choice: Choice, step: Step) -> Tensor:
        """Copies of the rows lie sorted by their expert, so that all experts are two grouped products."""
        per_token = choice.experts.shape[1]
        experts, order = choice.experts.flatten().sort(stable=True)
        ends = _ends(experts, len(self.down))
        inner = self.activation(step.grouped(x.index_select(0, order // per_token), self.up, ends), step)
        outer = x.new_empty((len(order), x.shape[1]))
        outer.index_copy_(0, order, step.grouped(inner, self.down, ends))
        weighted = outer.view(-1, per_token, x.shape[1]) * choice.weights[..., None]
        return weighted.sum(1).to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class MixtureOfExperts:
    router: Router
    experts: Experts
    shared: Part | None
    enter: Linear | None = None  # to the smaller rows that routed experts work on, and back
    leave: Linear | None = None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        inner = x if self.enter is None else self.enter(x, step)
        mixed = self.experts(inner, self.router(x), step)
        mixed = mixed if self.leave is None else self.leave(mixed, step)
        return mixed if self.shared is None else mixed.add_(self.shared(x, step))


def _ends(experts: Tensor, count: int) -> Tensor:
    """[E]: where the rows of each expert end, of sorted expert numbers."""
    numbers = torch.arange(count, device=experts.device)
    return torch.searchsorted(experts, numbers, right=True, out_int32=True)


def build_experts(settings: ExpertSettings, parameters: Parameters, name: str) -> MixtureOfExperts:
    shared = build_gated_mlp(parameters, f"{name}.shared") if settings.shared_size else None
    return MixtureOfExperts(*build_routed(settings, parameters, name), shared)


def build_routed(
    settings: ExpertSettings, parameters: Parameters, name: str, activation: Activation = silu_gated
) -> tuple[Router, Experts]:
    down = parameters.tensor(f"{name}.experts.down")
    up = parameters.tensor(f"{name}.experts.gate_up").view(len(down), -1, down.shape[1])
    return _router(settings, parameters, name), Experts(up, down, activation)


def build_gated_mlp(parameters: Parameters, name: str, bias: bool = False) -> GatedMLP:
    return GatedMLP(parameters.linear(f"{name}.gate_up", bias), parameters.linear(f"{name}.down", bias))


def _router(settings: ExpertSettings, parameters: Parameters, name: str) -> Router:
    weight, routing = parameters.tensor(f"{name}.router"), settings.routing
    per_token = settings.experts_per_token
    if isinstance(routing, GroupRouting):
        return GroupRouter(weight, parameters.tensor(f"{name}.correction"), per_token, routing)
    return SoftmaxRouter(weight, per_token, routing)
