"""Logits and hidden states -> the values that probes ask for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pie_core.contracts.forward import Float32, Int32, ProbeKind, Probes
from pie_core.contracts.probe_values import ProbeValues, joined_probes


def read_probes(
    probes: Probes, logits: Tensor | None, hidden: Tensor | None, columns: Tensor | None
) -> ProbeValues:
    """`logits` and `hidden` have one row for each probe, `columns` for each of its kind; None where no probe reads."""
    values: list[Float32] = [np.empty(0, np.float32)] * len(probes.rows)
    tokens: list[Int32] = [np.empty(0, np.int32)] * len(probes.rows)
    for kind in np.unique(probes.kinds).tolist():
        at = np.flatnonzero(probes.kinds == kind)
        source = hidden if kind == ProbeKind.HIDDEN else logits
        rows = columns if kind == ProbeKind.COLUMNS else _chosen(source, at)
        assert rows is not None
        _READERS[ProbeKind(kind)](rows, probes, at, values, tokens)
    return joined_probes(values, tokens)


def _chosen(source: Tensor | None, at: NDArray[np.intp]) -> Tensor | None:
    return None if source is None else source[torch.from_numpy(at)]


def given_columns(probes: Probes, at: NDArray[np.intp], streams: int) -> NDArray[np.int64]:
    """[len(at), streams]: the columns that these probes name; -1 where they name none."""
    given = np.full((len(at), streams), -1, np.int64)
    for row, probe in zip(given, at.tolist(), strict=True):
        named = probes.tokens[probes.token_indptr[probe] : probes.token_indptr[probe + 1]]
        row[: len(named)] = named
    return given


def _rows(source: Tensor, _: Probes, at: NDArray[np.intp], values: list[Float32], __: list[Int32]) -> None:
    for probe, row in zip(at.tolist(), source.to(torch.float32).cpu().numpy(), strict=True):
        values[probe] = row


def _entropy(logits: Tensor, _: Probes, at: NDArray[np.intp], values: list[Float32], __: list[Int32]) -> None:
    logs = logits.to(torch.float64).log_softmax(-1)
    weighted = torch.where(logs == float("-inf"), 0.0, logs.exp() * logs)
    for probe, value in zip(at.tolist(), (-weighted.sum(-1)).cpu().numpy(), strict=True):
        values[probe] = np.array([value], np.float32)


def _logprobs(
    logits: Tensor, probes: Probes, at: NDArray[np.intp], values: list[Float32], _: list[Int32]
) -> None:
    norms = logits.to(torch.float64).logsumexp(-1)
    starts, counts = probes.token_indptr[at], np.diff(probes.token_indptr)[at]
    places = np.concatenate(
        [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    )
    rows = torch.from_numpy(np.repeat(np.arange(len(at)), counts))
    named = torch.from_numpy(probes.tokens[places.astype(np.int64)].astype(np.int64))
    found = (logits[rows, named].to(torch.float64) - norms[rows]).to(torch.float32).cpu().numpy()
    for probe, part in zip(at.tolist(), np.split(found, np.cumsum(counts)[:-1]), strict=True):
        values[probe] = part


def _distribution(
    logits: Tensor, probes: Probes, at: NDArray[np.intp], values: list[Float32], tokens: list[Int32]
) -> None:
    temperature = torch.from_numpy(probes.temperature[at])[:, None].to(logits.device)
    is_cold = temperature == 0
    scaled = logits / torch.where(is_cold, 1.0, temperature)
    weights = scaled.to(torch.float64).softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(1, order)
    first = torch.zeros_like(ordered)
    first[:, 0] = 1.0
    chances = torch.where(is_cold, first, ordered).to(torch.float32).cpu().numpy()
    ids = order.to(torch.int32).cpu().numpy()
    for row, probe in enumerate(at.tolist()):
        count = int(probes.k[probe]) or ids.shape[1]
        values[probe], tokens[probe] = chances[row, :count], ids[row, :count]


_READERS = {
    ProbeKind.LOGITS: _rows,
    ProbeKind.HIDDEN: _rows,
    ProbeKind.COLUMNS: _rows,
    ProbeKind.ENTROPY: _entropy,
    ProbeKind.LOGPROBS: _logprobs,
    ProbeKind.DISTRIBUTION: _distribution,
}
