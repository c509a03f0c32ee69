"""TrackBatch: rows of a genome, and the signals that were measured along it, in bins; how predictions are scored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from seqlong.batch import SequenceBatch


@dataclass
class TrackBatch(SequenceBatch):
    """A batch whose rows have k signals in n bins of ``t / n`` positions.

    Attributes:
        tracks: ``(b n k)`` float32, NaN where nothing was measured.
    """

    tracks: Float[Tensor, "b n k"] | None = None

    def _map(self, function) -> TrackBatch:  # type: ignore[no-untyped-def]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return TrackBatch(
            **{name: function(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        )


def deviance(truth: Float[Tensor, "*n k"], said: Float[Tensor, "*n k"]) -> Float[Tensor, "*n k"]:
    """Half the Poisson deviance, nats: ``y ln(y / ŷ) - (y - ŷ)``, at least 0; 0 where y is not known."""
    known = ~truth.isnan()
    y = torch.where(known, truth, 1)
    return torch.where(known, torch.xlogy(y, y) - torch.xlogy(y, said) - (y - said), 0)


def correlations(truth: Float[Tensor, "n k"], said: Float[Tensor, "n k"]) -> dict[str, list[float]]:
    """Pearson's and Spearman's correlation of each column ``(n k)`` over the bins that have a value."""
    found: dict[str, list[float]] = {"pearson": [], "spearman": []}
    for y, x in zip(truth.double().numpy().T, said.double().numpy().T, strict=True):
        known = ~np.isnan(y)
        found["pearson"].append(_correlation(y[known], x[known]))
        found["spearman"].append(_correlation(_ranks(y[known]), _ranks(x[known])))
    return found


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks, those of equal values their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (count.cumsum() - (count - 1) / 2)[place]
    return ranks


def _correlation(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    if len(one) < 2:
        return float("nan")
    a, b = one - one.mean(), two - two.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size > 1e-12 * len(a) else float("nan")
