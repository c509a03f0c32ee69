"""How well scores tell damaging variants from others, beside whatever else the VCF says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from seqlong.errors import ConfigError, DataError


@dataclass
class Truth:
    """INFO field ``name`` has the value ``value`` where a variant is damaging; where it has none, nobody knows.

    Attributes:
        name: INFO field.
        value: what it says of damaging variants.
        scores: ours, lower is more damaging; a row for each variant.
        damaging: of the same variants.
        others: numbers that the VCF holds of them, by field.
    """

    name: str
    value: str
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    damaging: list[bool] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Truth:
        """``CLASS=LOF``."""
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"--truth is '{text}'; expected an INFO field and its value, such as CLASS=LOF")
        return Truth(name, value)

    def add(self, record: Any, scores: NDArray[np.float64]) -> None:
        """The alleles of a record, ``(n w)`` scores."""
        if self.name not in record.header.info:
            known = ", ".join(record.header.info) or "none"
            raise DataError(f"--truth {self.name}: the VCF's header has no such INFO field; it has {known}")
        said = record.info.get(self.name)
        if said is None:
            return
        each = said if isinstance(said, tuple) and len(said) == len(scores) else (said,) * len(scores)
        for number, row in enumerate(scores):
            if np.isnan(row).any():
                continue
            self.scores.append(row)
            one = each[number]
            self.damaging.append(self.value in (one if isinstance(one, tuple) else (one,)) or str(one) == self.value)
            for name, value in numbers(record, number).items():
                column = self.others.setdefault(name, [float("nan")] * (len(self.damaging) - 1))
                column.append(value)

    def table(self, windows: list[int]) -> Table:
        """AUROC of each window, and of every number that the VCF holds."""
        positive = np.array(self.damaging, dtype=bool)
        count = int(positive.sum())
        table = Table(
            title=f"{self.name}={self.value}: {count:,} of {len(positive):,}",
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("score", "damaging when", "AUROC", "variants"):
            table.add_column(heading, justify="left" if heading in ("score", "damaging when") else "right")
        if not count or count == len(positive):
            table.caption = "no AUROC: all are of one class"
            return table
        ours = np.stack(self.scores)
        for place, window in enumerate(windows):
            table.add_row(f"SL_LLR_{window}", "low", f"{auroc(positive, -ours[:, place]):.3f}", f"{len(positive):,}")
        for name, values in self.others.items():
            column = np.array(values + [float("nan")] * (len(positive) - len(values)))
            known = ~np.isnan(column)
            if known.sum() and 0 < positive[known].sum() < known.sum():
                value = auroc(positive[known], column[known])
                side = "high" if value >= 0.5 else "low"
                table.add_row(name, f"{side} (in the VCF)", f"{max(value, 1 - value):.3f}", f"{known.sum():,}")
        return table


def numbers(record: Any, allele: int) -> dict[str, float]:
    """What INFO says of an allele in numbers, except for scores of ours; NaN where it says nothing."""
    found = {}
    for name, kind in record.header.info.items():
        if kind.type in ("Float", "Integer") and kind.number in (1, "A") and not name.startswith("SL_"):
            value = record.info.get(name)
            value = value[allele] if isinstance(value, tuple) and allele < len(value) else value
            found[name] = float("nan") if value is None or isinstance(value, tuple) else float(value)
    return found


def auroc(positive: ArrayLike, score: ArrayLike) -> float:
    """The chance that a positive has a higher score than a negative; ties count half."""
    positive, values = np.asarray(positive, dtype=bool), np.asarray(score, dtype=np.float64)
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count - 1) / 2)[place]
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))
