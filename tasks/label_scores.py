"""Scores of labelled records: over all, and over those that training has not seen."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import classification as of_classes
from torchmetrics.functional import regression as of_values


class LabelScores(Metric):
    """Keeps the outputs of all records, over all ranks, and scores them at the end.

    Args:
        kind: ``class``, ``multilabel`` or ``value``.
        outputs: classes, labels or values.
    """

    full_state_update = False
    outputs: list[Tensor]
    labels: list[Tensor]
    seen: list[Tensor]

    def __init__(self, kind: str, outputs: int) -> None:
        super().__init__()
        self.kind, self.width = kind, outputs
        for name in ("outputs", "labels", "seen"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, outputs: Float[Tensor, "s y"], labels: Tensor, seen: Bool[Tensor, "s"] | None = None) -> None:
        """Add records.

        Args:
            outputs: logits of classes or labels, or standardised values.
            labels: ``(s 1)`` classes, or ``(s y)`` labels or standardised values; -1 or NaN where unknown.
            seen: which of them are in training.
        """
        self.outputs.append(outputs.float())
        self.labels.append(labels.float())
        self.seen.append(torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device) if seen is None else seen)

    def compute(self) -> dict[str, Tensor]:
        """By name; ``unseen/...`` where some records, and not all, were seen."""
        if isinstance(self.outputs, Tensor):
            outputs, labels, seen = self.outputs, self.labels, self.seen
        elif not self.outputs:
            return {}
        else:
            outputs, labels, seen = torch.cat(self.outputs), torch.cat(self.labels), torch.cat(self.seen)
        found = scores(self.kind, outputs, labels)
        kept = ~seen  # type: ignore[operator]
        if 0 < int(kept.sum()) < kept.numel():
            found |= {f"unseen/{name}": value for name, value in scores(self.kind, outputs[kept], labels[kept]).items()}
        return found


def scores(kind: str, outputs: Float[Tensor, "s y"], labels: Float[Tensor, "s z"]) -> dict[str, Tensor]:
    """Scores of records, from torchmetrics.

    Classes: ``mcc``, ``accuracy``, ``f1`` (the mean over classes), ``auroc`` (one against the rest). Several labels:
    ``mcc`` and ``accuracy`` of label by label, ``f1``, ``auroc`` and ``auprc`` as means over labels. Values: ``r2``,
    ``pearson``, ``spearman``, ``mse``, means over values. All with ``bits``: of a label, or of a standardised value
    under a normal distribution of deviation 1.
    """
    with warnings.catch_warnings():  # about classes that a part of the data lacks
        warnings.simplefilter("ignore")
        if kind == "class":
            return _classes(outputs, labels[:, 0].long())
        if kind == "multilabel":
            return _several(outputs, labels)
        return _values(outputs, labels)


def _classes(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    known = labels >= 0
    outputs, labels = outputs[known], labels[known]
    width = outputs.shape[1]
    nats = torch.nn.functional.cross_entropy(outputs.double(), labels)
    shares = outputs.softmax(1)
    return {
        "bits": (nats / math.log(2)).float(),
        "mcc": of_classes.multiclass_matthews_corrcoef(shares, labels, width).float(),
        "accuracy": of_classes.multiclass_accuracy(shares, labels, width, average="micro"),
        "f1": of_classes.multiclass_f1_score(shares, labels, width, average="macro"),
        "auroc": of_classes.multiclass_auroc(shares, labels, width, average="macro"),  # type: ignore[dict-item]
    }


def _several(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    known = labels.isfinite()
    truth = torch.where(known, labels, 0)
    nats = torch.nn.functional.binary_cross_entropy_with_logits(outputs.double()[known], truth.double()[known])
    target = torch.where(known, labels, -1).long()
    shares, width = outputs.sigmoid(), outputs.shape[1]
    flat = (shares[known], target[known])
    return {
        "bits": (nats / math.log(2)).float(),
        "mcc": of_classes.binary_matthews_corrcoef(*flat).float(),
        "accuracy": of_classes.binary_accuracy(*flat),
        "f1": of_classes.multilabel_f1_score(shares, target, width, average="macro", ignore_index=-1),
        "auroc": of_classes.multilabel_auroc(shares, target, width, average="macro", ignore_index=-1),  # type: ignore[dict-item]
        "auprc": of_classes.multilabel_average_precision(shares, target, width, average="macro", ignore_index=-1),  # type: ignore[dict-item]
    }


def _values(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    columns = []
    for said, right in zip(outputs.double().unbind(1), labels.double().unbind(1), strict=True):
        known = right.isfinite()
        said, right = said[known], right[known]
        square = ((said - right) ** 2).mean()
        whole = ((right - right.mean()) ** 2).mean()
        nothing = torch.full_like(square, float("nan"))
        several = said.numel() > 1
        columns.append(
            torch.stack(
                [
                    (square / 2 + math.log(2 * math.pi) / 2) / math.log(2),
                    1 - square / whole if several and whole > 0 else nothing,
                    of_values.pearson_corrcoef(said, right) if several else nothing,
                    of_values.spearman_corrcoef(said, right) if several else nothing,
                    square,
                ]
            )
        )
    means = torch.stack(columns).mean(0).float()
    return dict(zip(("bits", "r2", "pearson", "spearman", "mse"), means.unbind(), strict=True))
