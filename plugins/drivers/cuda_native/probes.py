"""Logits and hidden states -> the values that probes ask for, computed on the device and fetched behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import Float32, Int32, Int64, ProbeKind, Probes
from pie_core.contracts.probe_values import ProbeValues, joined_probes
from pie_plugins.drivers.cuda_native.timeline import Download, Timeline


@dataclass(frozen=True, slots=True)
class _Part:
    """One probe's piece of a fetched table."""

    probe: int
    values: Tensor
    tokens: Tensor | None


class ProbeReader:
    """Queues what the probes of one step need; `finish` once the step's mark is reached."""

    def __init__(self, probes: Probes, timeline: Timeline) -> None:
        self._probes, self._timeline = probes, timeline
        self._parts: list[_Part] = []
        self._downloads: list[Download] = []

    def read(self, places: Int64, logits: Tensor, normalized: Tensor) -> None:
        """`places[p]` is the row of `logits` and `normalized` that probe p looks at."""
        readers: dict[ProbeKind, Callable[[NDArray[np.intp], Tensor], None]] = {
            ProbeKind.LOGITS: self._rows,
            ProbeKind.HIDDEN: self._rows,
            ProbeKind.ENTROPY: self._entropy,
            ProbeKind.LOGPROBS: self._logprobs,
            ProbeKind.DISTRIBUTION: self._distribution,
        }
        for kind in np.unique(self._probes.kinds).tolist():
            at = np.flatnonzero(self._probes.kinds == kind)
            source = normalized if kind == ProbeKind.HIDDEN else logits
            rows = source.index_select(0, self._timeline.upload(places[at])).to(torch.float32)
            readers[ProbeKind(kind)](at, rows)

    def finish(self) -> ProbeValues:
        count = len(self._probes.rows)
        values: list[Float32] = [np.empty(0, np.float32)] * count
        tokens: list[Int32] = [np.empty(0, np.int32)] * count
        for part in self._parts:
            values[part.probe] = part.values.numpy()
            if part.tokens is not None:
                tokens[part.probe] = part.tokens.numpy()
        found = joined_probes(values, tokens)
        self.release()  # the joined arrays are copies
        return found

    def release(self) -> None:
        """Nobody reads what was fetched any more."""
        self._parts.clear()
        while self._downloads:
            self._downloads.pop().release()

    def _fetched(self, values: Tensor) -> Tensor:
        download = self._timeline.download(values)
        self._downloads.append(download)
        return download.values

    def _keep(self, at: NDArray[np.intp], values: Sequence[Tensor], tokens: Sequence[Tensor | None]) -> None:
        self._parts += [_Part(*each) for each in zip(at.tolist(), values, tokens, strict=True)]

    def _rows(self, at: NDArray[np.intp], rows: Tensor) -> None:
        self._keep(at, self._fetched(rows).unbind(0), [None] * len(at))

    def _entropy(self, at: NDArray[np.intp], logits: Tensor) -> None:
        logs = logits.to(torch.float64).log_softmax(-1)
        weighted = torch.where(logs == float("-inf"), 0.0, logs.exp() * logs)
        found = (-weighted.sum(-1)).to(torch.float32)
        self._keep(at, self._fetched(found).split(1), [None] * len(at))

    def _logprobs(self, at: NDArray[np.intp], logits: Tensor) -> None:
        probes, up = self._probes, self._timeline.upload
        counts = np.diff(probes.token_indptr)[at]
        named = [probes.tokens[probes.token_indptr[probe] : probes.token_indptr[probe + 1]] for probe in at]
        rows = up(np.repeat(np.arange(len(at)), counts))
        columns = up(np.concatenate(named).astype(np.int64).clip(0, logits.shape[1] - 1))
        norms = logits.to(torch.float64).logsumexp(-1)
        found = (logits[rows, columns].to(torch.float64) - norms[rows]).to(torch.float32)
        self._keep(at, self._fetched(found).split(counts.tolist()), [None] * len(at))

    def _distribution(self, at: NDArray[np.intp], logits: Tensor) -> None:
        temperature = self._timeline.upload(self._probes.temperature[at])[:, None]
        is_cold = temperature == 0
        weights = (logits / torch.where(is_cold, 1.0, temperature)).to(torch.float64).softmax(-1)
        counts = np.where(self._probes.k[at] > 0, self._probes.k[at], logits.shape[1]).clip(
            max=logits.shape[1]
        )
        order = logits.sort(dim=-1, descending=True, stable=True).indices[:, : int(counts.max())]
        ordered = weights.gather(1, order)
        first = torch.zeros_like(ordered)
        first[:, 0] = 1.0
        ordered = torch.where(is_cold, first, ordered).to(torch.float32)
        values, tokens = self._fetched(ordered), self._fetched(order.to(torch.int32))
        self._keep(
            at,
            [values[row, :count] for row, count in enumerate(counts.tolist())],
            [tokens[row, :count] for row, count in enumerate(counts.tolist())],
        )
