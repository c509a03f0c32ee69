"""What labels can be told without a neural network: logistic regression on short words, and on letters by position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlong.datamodules.dna.alphabet import BASE_TABLE, translate
from seqlong.datamodules.dna.kmers import count_matrix
from seqlong.datamodules.dna.label_kinds import Labels
from seqlong.datamodules.dna.records import Records

#: Lengths of the words; the longest first to go where features would take more than ``_BUDGET`` numbers.
WORDS = (4, 5, 6)
_BUDGET = 60_000_000
#: Most records that a floor is fitted to.
MOST_RECORDS = 20_000
_PENALTIES = (1e-5, 1e-4, 1e-3)
Scores = dict[str, float]


@dataclass
class Part:
    """Records of a split and their labels ``(n y)``, and which of them training has seen."""

    records: Records
    labels: NDArray[np.int64] | NDArray[np.float32]
    seen: NDArray[np.bool_] | None = None


def label_floors(labels: Labels, training: Part, validation: Part, test: Part | None) -> list[dict[str, object]]:
    """Scores to beat: the commonest answer, words of 4 to 6 bases, and letters by position where all are of one length.

    Each is a linear model with the squared weights penalised, as much as is best on the validation records.

    Returns:
        For each: ``name``, ``bits`` of a label on validation, and ``validation``, ``test``, ``test_unseen``: accuracy
        and MCC, or R² for values.
    """
    parts = {"validation": validation} | ({"test": test} if test is not None else {})
    chosen = np.arange(len(training.records))
    if chosen.size > MOST_RECORDS:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen.size)[:MOST_RECORDS])
    fitted = Part(training.records.take(chosen), training.labels[chosen])
    truth = {name: _target(labels, part.labels) for name, part in parts.items()}
    target = _target(labels, fitted.labels)
    floors = [
        _scored(
            "commonest label" if labels.kind != "value" else "mean", labels, parts, truth, _prior(labels, target, truth)
        )
    ]
    sizes: tuple[int, ...] = WORDS
    while len(sizes) > 1 and sum(4**k for k in sizes) // 2 * chosen.size > _BUDGET:
        sizes = sizes[:-1]
    floors.append(_linear(f"words of {sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"words of {sizes[0]}", labels,
                          fitted, target, parts, truth, lambda records: _words(records, sizes)))  # fmt: skip
    lengths = np.concatenate([fitted.records.lengths, *(part.records.lengths for part in parts.values())])
    if lengths.min() == lengths.max() <= 1000 and 4 * int(lengths[0]) * chosen.size <= _BUDGET:
        floors.append(_linear("letters by position", labels, fitted, target, parts, truth, _letters))
    return floors


def _words(records: Records, sizes: tuple[int, ...]) -> NDArray[np.float32]:
    return count_matrix(records.bases, records.starts, records.ends, sizes)


def _letters(records: Records) -> NDArray[np.float32]:
    length = int(records.lengths[0])
    letters = np.stack([translate(records.sequence(number), BASE_TABLE) for number in range(len(records))])
    made = (letters[..., None] == np.arange(4, dtype=np.uint8)).reshape(len(records), 4 * length).astype(np.float32)
    return made / math.sqrt(length)  # of length one, as words are


def _target(labels: Labels, encoded: NDArray[np.int64] | NDArray[np.float32]) -> Tensor:
    if labels.kind == "value":
        scaled = (encoded - np.array(labels.mean)) / np.array(labels.deviation)
        return torch.from_numpy(scaled.astype(np.float32))
    found = torch.from_numpy(np.ascontiguousarray(encoded))
    return found[:, 0] if labels.kind == "class" else found


def _loss(labels: Labels, outputs: Tensor, target: Tensor) -> Tensor:
    """Nats of a label, the mean."""
    if labels.kind == "class":
        return torch.nn.functional.cross_entropy(outputs, target)
    if labels.kind == "multilabel":
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, target)
    return ((outputs - target) ** 2).mean() / 2 + math.log(2 * math.pi) / 2


def _prior(labels: Labels, target: Tensor, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    if labels.kind == "class":
        share = torch.bincount(target, minlength=len(labels.names)) + 0.5
        line = (share / share.sum()).log()
    elif labels.kind == "multilabel":
        line = torch.logit(target.mean(0).clamp(1e-4, 1 - 1e-4))
    else:
        line = torch.zeros(target.shape[1])
    return {name: line.expand(len(rows), -1) for name, rows in truth.items()}


def _linear(name, labels, fitted, target, parts, truth, features) -> dict[str, object]:  # type: ignore[no-untyped-def]
    train = torch.from_numpy(features(fitted.records))
    mean = train.mean(0)
    train -= mean
    scale = train.pow(2).sum(1).mean().sqrt().clamp(min=1e-8)
    train /= scale
    given = {part: (torch.from_numpy(features(held.records)) - mean) / scale for part, held in parts.items()}
    best: tuple[float, dict[str, Tensor]] | None = None
    start = None
    for penalty in sorted(_PENALTIES, reverse=True):  # from smooth to rough, each from the last one's weights
        start = _fit(labels, train, target, penalty, start)
        outputs = {part: rows @ start[:-1] + start[-1] for part, rows in given.items()}
        bits = float(_loss(labels, outputs["validation"], truth["validation"]))
        if best is None or bits < best[0]:
            best = bits, outputs
    assert best is not None
    return _scored(name, labels, parts, truth, best[1])


def _fit(labels: Labels, rows: Tensor, target: Tensor, penalty: float, start: Tensor | None) -> Tensor:
    width = len(labels.names)
    with torch.enable_grad():
        weight = torch.zeros(rows.shape[1] + 1, width) if start is None else start.clone()
        weight.requires_grad_(True)
        optimizer = torch.optim.LBFGS([weight], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _loss(labels, rows @ weight[:-1] + weight[-1], target) + penalty * weight[:-1].pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach()


def _scored(name, labels, parts, truth, outputs) -> dict[str, object]:  # type: ignore[no-untyped-def]
    floor: dict[str, object] = {
        "name": name,
        "bits": float(_loss(labels, outputs["validation"], truth["validation"])) / math.log(2),
    }
    for part, held in parts.items():
        floor[part] = scores(labels, outputs[part], truth[part])
        if held.seen is not None and held.seen.any() and not held.seen.all():
            kept = torch.from_numpy(~held.seen)
            floor[f"{part}_unseen"] = scores(labels, outputs[part][kept], truth[part][kept])
    return floor


def scores(labels: Labels, outputs: Tensor, target: Tensor) -> Scores:
    """Accuracy and Matthews' correlation of classes, of labels one by one; R² of values."""
    if labels.kind == "value":
        left = ((outputs - target) ** 2).sum(0)
        whole = ((target - target.mean(0)) ** 2).sum(0).clamp(min=1e-12)
        return {"r2": float((1 - left / whole).mean())}
    if labels.kind == "class":
        said, right, classes = outputs.argmax(1), target, len(labels.names)
    else:
        said, right, classes = (outputs > 0).long().flatten(), target.long().flatten(), 2
    return {"accuracy": float((said == right).double().mean()), "mcc": matthews(said, right, classes)}


def matthews(said: Tensor, right: Tensor, classes: int) -> float:
    """Matthews' correlation of many classes (Gorodkin 2004); 0 where either side is constant."""
    table = torch.bincount(right * classes + said, minlength=classes**2).view(classes, classes).double()
    total, hits = table.sum(), table.diagonal().sum()
    rows, columns = table.sum(1), table.sum(0)
    bottom = (total**2 - (rows**2).sum()) * (total**2 - (columns**2).sum())
    return float((hits * total - (rows * columns).sum()) / bottom.sqrt()) if bottom > 0 else 0.0
