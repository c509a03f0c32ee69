"""Heads on frozen states of variants: penalised logistic regression, cross-validated, beside what needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from seqlong.errors import ConfigError, DataError
from seqlong.inference.truth import auroc

Group = Literal["position", "block", "contig"]
Matrix = NDArray[np.float32]
_PENALTIES = (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
_KNOTS = 64
_BLOCKS_A_FOLD = 4
_RESAMPLES = 500


@dataclass(frozen=True)
class Head:
    """``p = sigmoid(w · (x - mean) / deviation + b)``.

    Attributes:
        mean: ``(f)`` of features in training.
        deviation: ``(f)``, times ``√f``, so that one penalty means the same for any number of features.
        weights: ``(f)``.
        bias: b.
        penalty: of squared weights, that the held-out fifth of training liked best.
    """

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    weights: NDArray[np.float64]
    bias: float
    penalty: float

    def logits(self, features: Matrix) -> NDArray[np.float64]:
        """``(n)`` of ``(n f)``."""
        found: NDArray[np.float64] = ((features - self.mean) / self.deviation) @ self.weights + self.bias
        return found


def fit_head(features: Matrix, positive: NDArray[np.bool_], groups: NDArray[np.int64], seed: int = 0) -> Head:
    """Fit on all rows, with the penalty that does best on a fifth of the groups when the others are fitted."""
    held = folds_of(groups, 5, seed + 1) == 0
    held = held if 0 < positive[held].sum() < held.sum() and 0 < positive[~held].sum() < (~held).sum() else ~held & held
    best = _PENALTIES[2]
    if held.any():
        losses = []
        for head in _path(features[~held], positive[~held], _PENALTIES):
            logits, truth = head.logits(features[held]), positive[held]
            losses.append(float(np.logaddexp(0, np.where(truth, -logits, logits)).mean()))
        best = _PENALTIES[int(np.argmin(losses))]
    return _path(features, positive, [penalty for penalty in _PENALTIES if penalty >= best])[-1]


def _path(features: Matrix, positive: NDArray[np.bool_], penalties: Sequence[float]) -> list[Head]:
    """A head for each penalty, from the largest, each from the weights of the one before."""
    mean = features.mean(axis=0, dtype=np.float64)
    deviation = features.std(axis=0, dtype=np.float64)
    deviation = np.where(deviation > 1e-8, deviation, 1.0) * np.sqrt(features.shape[1])
    rows = torch.from_numpy(((features - mean) / deviation).astype(np.float32))
    target = torch.from_numpy(positive.astype(np.float32))
    share = float(np.clip(positive.mean(), 1e-3, 1 - 1e-3))
    weights = torch.zeros(features.shape[1] + 1)
    weights[-1] = float(np.log(share / (1 - share)))
    found = []
    for penalty in penalties:
        weights = weights.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=50, history_size=10, line_search_fn="strong_wolfe")

        def closure(weights: torch.Tensor = weights, penalty: float = penalty) -> torch.Tensor:
            weights.grad = None
            logits = rows @ weights[:-1] + weights[-1]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
            loss = loss + penalty * (weights[:-1] ** 2).sum() / features.shape[1]
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        weights = weights.detach()
        values = weights.double().numpy()
        found.append(Head(mean, deviation, values[:-1].copy(), float(values[-1]), penalty))
    return found


def groups_of(contig: NDArray[np.int64], start: NDArray[np.int64], by: Group, folds: int) -> NDArray[np.int64]:
    """Which variants must not be parted: those of a position, of a block of neighbours, or of a contig."""
    if by == "contig":
        return np.unique(contig, return_inverse=True)[1].astype(np.int64)
    place = np.unique(np.stack([contig, start], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    if by == "position":
        return place.astype(np.int64)
    count = int(place.max()) + 1
    return (place * min(count, folds * _BLOCKS_A_FOLD) // count).astype(np.int64)


def folds_of(groups: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row: groups in a random order, dealt out so that all folds have about as many rows."""
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order] / 2
    dealt = np.empty(len(sizes), dtype=np.int64)
    dealt[order] = np.minimum((before * folds / max(1, sizes.sum())).astype(np.int64), folds - 1)
    return dealt[groups]


def check_folds(positive: NDArray[np.bool_], fold: NDArray[np.int64], folds: int, by: Group) -> None:
    """Raise a DataError unless every fold has both classes."""
    count = int(positive.sum())
    if not 0 < count < len(positive):
        what = "damaging" if count else "not damaging"
        raise DataError(f"all {len(positive):,} labelled alleles are {what}; expected some of both")
    for number in range(folds):
        here = positive[fold == number]
        if not 0 < here.sum() < len(here):
            raise DataError(
                f"fold {number + 1} of {folds} has {int(here.sum()):,} damaging of {len(here):,} alleles, grouped by "
                f"{by}; expected some of both: give fewer --folds or another --group"
            )


def held_out(
    features: Matrix, positive: NDArray[np.bool_], groups: NDArray[np.int64], fold: NDArray[np.int64], seed: int = 0
) -> NDArray[np.float64]:
    """``(n)`` logits of each row by the head that was fitted without its fold."""
    found = np.zeros(len(features))
    for number in range(int(fold.max()) + 1):
        inside = fold != number
        head = fit_head(features[inside], positive[inside], _renumbered(groups[inside]), seed)
        found[~inside] = head.logits(features[~inside])
    return found


def _renumbered(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def interval(
    positive: NDArray[np.bool_], scores: NDArray[np.float64], groups: NDArray[np.int64], seed: int = 0
) -> tuple[float, float, float]:
    """AUROC, and the bounds that 95 % of bootstrap samples of groups are within."""
    random = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups))
    members = np.split(order, ends[:-1])
    found = []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([members[number] for number in random.integers(0, len(members), len(members))])
        truth = positive[chosen]
        if 0 < truth.sum() < len(truth):
            found.append(auroc(truth, scores[chosen]))
    low, high = np.percentile(found, [2.5, 97.5]) if found else (np.nan, np.nan)
    return auroc(positive, scores), float(low), float(high)


def plain_features(
    contig: NDArray[np.int64], start: NDArray[np.int64], changes: Sequence[tuple[bytes, bytes]]
) -> Matrix:
    """What is known without a model: which base becomes which, how much longer or shorter, and where it is.

    Where: hat functions between quantiles of the positions, 64 in all, and 8 wider ones, contigs one after another.
    """
    kinds = {one + two: n for n, (one, two) in enumerate((a, b) for a in _LETTERS for b in _LETTERS if a != b)}
    table = np.zeros((len(changes), len(kinds) + 3), dtype=np.float32)
    for row, (ref, alt) in enumerate(changes):
        longer = len(alt) - len(ref)
        if ref + alt in kinds and len(ref) == 1:
            table[row, kinds[ref + alt]] = 1
        table[row, -3:] = longer > 0, longer < 0, np.log1p(abs(longer))
    along = (contig - contig.min()).astype(np.float64) * 4e9 + start
    hats = [table]
    for count in (8, _KNOTS):
        knots = np.unique(np.quantile(along, np.linspace(0, 1, count)))
        place = np.interp(along, knots, np.arange(len(knots)))
        hats.append(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(len(knots)))).astype(np.float32))
    return np.concatenate(hats, axis=1)


_LETTERS = (b"A", b"C", b"G", b"T")


def save_head(path: str, head: Head, facts: str) -> None:
    """Write a head, and what it needs to be used, as ``.npz``."""
    if not path.endswith(".npz"):
        raise ConfigError(f"--save is '{path}'; expected a name that ends in .npz")
    bias, penalty = np.array(head.bias), np.array(head.penalty)
    np.savez(
        path, mean=head.mean, deviation=head.deviation, weights=head.weights, bias=bias, penalty=penalty,
        facts=np.array(facts),
    )  # fmt: skip


def load_head(path: str) -> tuple[Head, str]:
    """A head and its facts.

    Raises:
        DataError: no such file, or another one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, NDArray[np.float64]] = file
            head = Head(
                arrays["mean"], arrays["deviation"], arrays["weights"], float(arrays["bias"]), float(arrays["penalty"])
            )
            return head, str(file["facts"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no head that 'seqlong variants --save' wrote: {error}") from error
