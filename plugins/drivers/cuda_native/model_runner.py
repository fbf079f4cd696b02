"""Tensors -> architecture -> hidden states and logits: the layers' operations in this driver's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from pie_plugins.drivers.cuda_native.attention import AttentionPlan
from pie_plugins.drivers.cuda_native.kernels import Angles, Kernels
from pie_plugins.drivers.cuda_native.kv_cache import KvCache
from pie_plugins.drivers.cuda_native.linear import Linear
from pie_plugins.drivers.cuda_native.step_tensors import StepTensors
from pie_plugins.models.layers.architecture import Model
from pie_plugins.models.layers.linear import one_by_one
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import Around, AttentionHeads, CacheRef, Step


class AngleTables:
    """Cosines and sines of every position, computed once for each rotary embedding of a model."""

    def __init__(self, max_positions: int, device: torch.device) -> None:
        self._positions = torch.arange(max_positions, dtype=torch.float32, device=device)
        self._tables: dict[int, tuple[Rope, Angles]] = {}

    def find(self, rope: Rope) -> Angles:
        known = self._tables.get(id(rope))
        if known is None:
            known = self._tables[id(rope)] = rope, self._computed(rope)
        return known[1]

    def _computed(self, rope: Rope) -> Angles:
        angles = self._positions[:, None] * rope.frequencies.to(self._positions.device)
        return Angles(angles.cos() * rope.magnitude, angles.sin() * rope.magnitude)


class CudaStep:
    """A `Step` of the layers."""

    def __init__(self, runner: ModelRunner, tensors: StepTensors, attention: AttentionPlan) -> None:
        self._runner, self._tensors, self._attention = runner, tensors, attention
        kernels = runner.kernels
        self.linear: Any = runner.linear
        self.rms_norm, self.add_rms_norm = kernels.rms_norm, kernels.add_rms_norm
        self.silu_mul, self.grouped = kernels.silu_mul, kernels.grouped

    def embed(self, table: Tensor) -> Tensor:
        return self._runner.kernels.embed(table, self._tensors.tokens)

    def linear_around(self, x: Tensor, weight: Any, around: Around) -> Tensor:
        """As much of it at once as there is an operation for."""
        whole: Tensor | None = self._runner.linear.around(x, weight, around)
        if whole is not None:
            return whole
        if around.norm is not None:
            normed = self.rms_norm(x, around.norm, around.norm_eps)
            return self.linear_around(normed, weight, replace(around, norm=None))
        return one_by_one(cast(Step, self), x, weight, around)

    def attend(self, cache: CacheRef, qkv: Tensor, heads: AttentionHeads) -> Tensor:
        runner, tensors = self._runner, self._tensors
        runner.most_shared = max(runner.most_shared, heads.num_heads // heads.num_kv_heads)
        pages = runner.caches[cache.group].layer(cache.layer)
        slots = tensors.groups[cache.group].slots
        angles = None if heads.rope is None else runner.angles.find(heads.rope)
        q = runner.kernels.place_heads(qkv, heads, angles, tensors.positions, slots, pages)
        return self._attention.run(cache.group, q, pages, heads.scale)


class ModelRunner:
    """One model, its kernels and its caches."""

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        caches: Sequence[KvCache],
        kernels: Kernels,
        linear: Linear,
        angles: AngleTables,
    ) -> None:
        self.vocab_size, self.caches, self.kernels = vocab_size, caches, kernels
        self.linear, self.angles = linear, angles
        self.most_shared = 1  # query heads that share a key head, in the layers that ran so far
        self._model = model

    def answer(
        self, tensors: StepTensors, attention: AttentionPlan, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Normalized hidden states and logits of these rows, of every row where None."""
        hidden = self.hidden(tensors, attention)
        return self.read(tensors, attention, hidden if rows is None else hidden.index_select(0, rows))

    def hidden(self, tensors: StepTensors, attention: AttentionPlan) -> Tensor:
        """[T, hidden]: every row behind the last layer."""
        return self._model.hidden(self._step(tensors, attention))

    def read(self, tensors: StepTensors, attention: AttentionPlan, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows of `hidden`, normalized, and their logits."""
        step = self._step(tensors, attention)
        normalized = self._model.normalized(asked, step)
        return normalized, self._model.logits(normalized, step)

    def _step(self, tensors: StepTensors, attention: AttentionPlan) -> Step:
        # A model that needs more of a step than CudaStep offers is refused when it loads, by what `weights` checks.
        return cast(Step, CudaStep(self, tensors, attention))
