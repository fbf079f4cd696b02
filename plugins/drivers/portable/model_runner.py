"""Tensors -> architecture -> hidden states and logits: the layers' operations in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pie_plugins.drivers.portable.batch_tensors import BatchTensors, Cache
from pie_plugins.drivers.portable.kv_cache import KvCache
from pie_plugins.drivers.portable.latent_attention import attend_latent, choose_rows
from pie_plugins.drivers.portable.linear import LinearProduct
from pie_plugins.drivers.portable.state_cache import StateCache
from pie_plugins.models.layers.architecture import Columns, Model, StreamModel
from pie_plugins.models.layers.linear import one_by_one
from pie_plugins.models.layers.norm import rms_norm
from pie_plugins.models.layers.rope import Rope
from pie_plugins.models.layers.step import (
    Around,
    AttentionHeads,
    CacheRef,
    IndexHeads,
    LatentHeads,
    Recurrence,
)


class PortableStep:
    """A `Step` of the layers. Made for one pass: what all layers share (angles, plans) is computed once."""

    def __init__(
        self,
        batch: BatchTensors,
        caches: Mapping[int, KvCache],
        states: Mapping[int, StateCache],
        linear: LinearProduct,
    ) -> None:
        self._batch, self._caches, self._states = batch, caches, states
        self.linear = linear.__call__
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._chosen: dict[CacheRef, Tensor] = {}  # the last choice: no layer reads an earlier one

    @property
    def token_ids(self) -> Tensor:
        return self._batch.token_ids

    def embed(self, table: Tensor) -> Tensor:
        return table.index_select(0, self._batch.token_ids)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(x.add_(delta), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def grouped(self, x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        return functional.grouped_mm(x, matrices.transpose(1, 2), offs=ends)

    def linear_around(self, x: Tensor, weight: Any, around: Around) -> Tensor:
        return one_by_one(self, x, weight, around)

    def attend(self, cache: CacheRef, qkv: Tensor, heads: AttentionHeads) -> Tensor:
        split = qkv.view(qkv.shape[0], -1, heads.head_dim)  # (tokens, H + 2 K, head_dim)
        rotated = heads.num_heads + (0 if heads.reads_only else heads.num_kv_heads)
        qk, v = split[:, :rotated], split[:, rotated:]
        if heads.norm is not None:
            qk = self.rms_norm(qk, heads.norm, heads.norm_eps)
        if heads.rope is not None:
            self.rotate(qk, heads.rope)
        if heads.reads_only:
            return self._batch.plans[cache.group].read(self._rows(cache), qk, heads.scale)
        return self.attention(cache, qk[:, : heads.num_heads], qk[:, heads.num_heads :], v, heads.scale)

    def rotate(self, heads: Tensor, rope: Rope) -> None:
        """The first dimensions of each head, as many as there are angles."""
        cos, sin = self._cos_sin(rope, heads.dtype)
        heads = heads[..., : cos.shape[-1]]
        swapped = heads.roll(heads.shape[-1] // 2, -1)
        heads.mul_(cos).addcmul_(swapped, sin)

    def attention(self, cache: CacheRef, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self._batch.plans[cache.group].run(self._rows(cache), q, k, v, scale)

    def recur(self, cache: CacheRef, part: int, rule: Recurrence, inputs: Sequence[Tensor]) -> Tensor:
        states = self._states[cache.group].part(cache.layer, part)
        return self._batch.state_plans[cache.group].run(states, rule, inputs)

    def _rows(self, cache: CacheRef) -> Tensor:
        return self._caches[cache.group].layer(cache.layer)

    def attend_latent(
        self, cache: CacheRef, q: Tensor, latent: Tensor, heads: LatentHeads, chosen: CacheRef | None
    ) -> Tensor:
        plain = heads.plain_dim
        q = q.view(len(q), heads.num_heads, -1)
        q = torch.cat((q[..., :plain], self._rotated(q[..., plain:], heads.rope)), -1)
        turned = self._rotated(latent[:, None, heads.latent_dim :], heads.rope)[:, 0]
        rows, plan = self._caches[cache.group].layer(cache.layer), self._batch.plans[cache.group]
        rows.index_copy_(0, plan.write_slots, torch.cat((latent[:, : heads.latent_dim], turned), -1))
        return attend_latent(plan, rows, q, heads, None if chosen is None else self._chosen[chosen])

    def choose_rows(
        self, cache: CacheRef, q: Tensor, k: Tensor, head_weights: Tensor, heads: IndexHeads
    ) -> None:
        both = torch.cat((q.view(len(q), heads.num_heads, -1), k[:, None]), 1)
        turned = self._rotated(both[..., : heads.rope_dim], heads.rope)
        both = torch.cat((turned, both[..., heads.rope_dim :]), -1)
        rows, plan = self._caches[cache.group].layer(cache.layer), self._batch.plans[cache.group]
        rows.index_copy_(0, plan.write_slots, both[:, -1])
        self._chosen = {cache: choose_rows(plan, rows, both[:, :-1], head_weights, heads)}

    def _rotated(self, heads: Tensor, rope: Rope | None) -> Tensor:
        """[T, heads, rotary dimensions]; interleaved pairs come out in halves."""
        if rope is None:
            return heads
        if rope.interleaved:
            heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        cos, sin = self._cos_sin(rope, heads.dtype)
        return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin

    def _cos_sin(self, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if id(rope) not in self._angles:
            self._angles[id(rope)] = rope.cos_sin(self._batch.positions, dtype)
        return self._angles[id(rope)]


class ModelRunner:
    """One model and its caches."""

    def __init__(self, model: Model, caches: Sequence[Cache], linear: LinearProduct) -> None:
        self._model, self._linear = model, linear
        self._caches = {group: cache for group, cache in enumerate(caches) if isinstance(cache, KvCache)}
        self._states = {group: cache for group, cache in enumerate(caches) if isinstance(cache, StateCache)}

    def step(self, batch: BatchTensors) -> PortableStep:
        return PortableStep(batch, self._caches, self._states, self._linear)

    def normalized(self, step: PortableStep, rows: Tensor) -> Tensor:
        """Runs the layers; the final norm of the rows that somebody asks about."""
        return self._model.normalized(self._model.hidden(step).index_select(0, rows), step)

    @property
    def has_streams(self) -> bool:
        return isinstance(self._model, StreamModel)

    def columns(self, normalized: Tensor) -> Columns:
        assert isinstance(self._model, StreamModel)
        return self._model.columns(normalized)

    def logits(self, step: PortableStep, normalized: Tensor) -> Tensor:
        """[rows, vocab] in float32."""
        return self._model.logits(normalized, step).to(torch.float32)
