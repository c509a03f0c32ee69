"""What labels of bases can be told without a neural network: a logistic regression on the letters around each base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from seqlong.datamodules.dna.annotation_labels import BaseLabels
from seqlong.datamodules.dna.splits import Region
from seqlong.datamodules.dna.tracks_floor import _composition

#: Bases to fit on, and to score on, in each split.
MOST_TRAIN, MOST_HELD = 16_000, 60_000
_PENALTIES = (1e-2, 1e-3, 1e-4)


def base_label_floors(
    labels: BaseLabels, regions: Mapping[str, Sequence[Region]], prior: NDArray[np.float64]
) -> list[dict[str, object]]:
    """Scores to beat: the share of each label in training, and a multinomial regression.

    Its features are those of `track_floors`: how often each word of 1 to 3 bases is within 8, 64 and 512 bases, and
    which letter is at each place up to 12 bases away. Fitted on as many bases of each label, weighted back to their
    shares.

    Returns:
        For each: ``name``, ``bits`` of a base on validation, and for ``validation`` and ``test``, of up to 60,000 bases
        evenly spread: ``f1`` and ``auprc`` of each label, in lists, NaN where a label is not there.
    """
    with torch.inference_mode(False), torch.enable_grad():
        features, truth = _sampled(labels, regions["train"], MOST_TRAIN, True)
        mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
        train = (features - mean) / deviation / features.shape[1] ** 0.5
        drawn = torch.bincount(truth, minlength=len(prior)).clamp(min=1)
        weight = (torch.from_numpy(prior).float() / drawn)[truth]
        held = {}
        for name in ("validation", "test"):
            if regions[name]:
                rows, said = _sampled(labels, regions[name], MOST_HELD, False)
                held[name] = ((rows - mean) / deviation / features.shape[1] ** 0.5, said)
        share = torch.from_numpy(prior).float().clamp(min=1e-6).log()
        flat = {name: share.expand(len(rows), -1) for name, (rows, _) in held.items()}
        floors = [_scored("share of each label", flat, held)]
        best: dict[str, object] | None = None
        weights = torch.zeros(train.shape[1] + 1, len(prior))
        weights[-1] = share
        for penalty in _PENALTIES:
            weights = _fit(train, truth, weight, penalty, weights)
            said_by = {name: (rows @ weights[:-1] + weights[-1]).log_softmax(-1) for name, (rows, _) in held.items()}
            found = _scored("letters around", said_by, held) | {"penalty": penalty}
            if best is None or float(str(found["bits"])) < float(str(best["bits"])):
                best = found
    assert best is not None
    return [*floors, best]


def label_scores(said: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """``f1`` of the likeliest label and ``auprc`` of each, from ``(n k)`` log-probabilities and ``(n)`` labels."""
    answer, found = said.argmax(-1), dict[str, list[float]](f1=[], auprc=[])
    for label in range(said.shape[1]):
        here = truth == label
        both = (here & (answer == label)).sum()
        whole = here.sum() + (answer == label).sum()
        there = bool(here.any())
        found["f1"].append(float(2 * both / whole) if there else float("nan"))
        found["auprc"].append(
            float(binary_average_precision(said[:, label].exp(), here.long())) if there else float("nan")
        )
    return found


def _scored(name: str, said: Mapping[str, Tensor], held: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, object]:
    part = "validation" if "validation" in held else "test"
    bits = torch.nn.functional.nll_loss(said[part], held[part][1]) / np.log(2)
    return {
        "name": name,
        "bits": float(bits),
        **{part: label_scores(rows, held[part][1]) for part, rows in said.items()},
    }


def _fit(rows: Tensor, truth: Tensor, weight: Tensor, penalty: float, start: Tensor) -> Tensor:
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        said = rows @ weights[:-1] + weights[-1]
        nll = torch.nn.functional.cross_entropy(said, truth, reduction="none")
        loss = (nll * weight).sum() + penalty * (weights[:-1] ** 2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def _sampled(labels: BaseLabels, regions: Sequence[Region], most: int, even: bool) -> tuple[Tensor, Tensor]:
    """Features and labels of bases: evenly spread, or as many of each label."""
    random = np.random.default_rng(0)
    counts = labels.counts(regions)
    share = np.minimum(1, most / max(1, int((counts > 0).sum())) / np.maximum(counts, 1))
    step = max(1, -(-int(counts.sum()) // most))
    rows: list[NDArray[np.float32]] = []
    truths: list[NDArray[np.uint8]] = []
    for piece in labels.pieces(regions):
        here = labels.read(*piece)
        kept = np.flatnonzero(random.random(len(here)) < share[here]) if even else np.arange(0, len(here), step)
        if len(kept):
            rows.append(_composition(labels.genome, 1, piece, kept))
            truths.append(here[kept])
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(truths).astype(np.int64))
