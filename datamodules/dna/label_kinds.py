"""What labels mean: a class, several labels at once, or values; from cells of a file to an array, with clear errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.dna.records import Records
from seqlong.errors import DataError, nearest

Kind = Literal["class", "multilabel", "value"]


@dataclass(frozen=True)
class Labels:
    """How the labels of a data set are read, fixed by its training records.

    Attributes:
        kind: ``class``: one of ``names``; ``multilabel``: any of ``names``; ``value``: numbers.
        names: classes or labels, or the columns of values.
        mean: of each value in training, for ``value``.
        deviation: of each value in training.
        separator: between the labels of a cell, for ``multilabel``.
    """

    kind: Kind
    names: list[str]
    mean: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    separator: str = ";"

    def encode(self, records: Records) -> NDArray[np.int64] | NDArray[np.float32]:
        """``(n y)``: int64 with y = 1 for classes; float32 of 0 and 1, or of values as they are.

        Raises:
            DataError: a class that training does not have, or no number; with file and line.
        """
        if self.kind == "value":
            return np.array([self._values(records, number) for number in range(len(records))], dtype=np.float32)
        index = {name: number for number, name in enumerate(self.names)}
        if self.kind == "class":
            found = np.array([index.get(cells[0], -1) for cells in records.labels], dtype=np.int64)
            for number in np.flatnonzero(found < 0)[:1]:
                cell = records.labels[number][0]
                raise records.located(
                    int(number),
                    f"class '{cell}' is not in the training data, which has {_listed(self.names)}"
                    f"{nearest(cell, self.names)}; take the record out, or add such ones to training",
                )
            return found[:, None]
        made = np.zeros((len(records), len(self.names)), dtype=np.float32)
        for number, cells in enumerate(records.labels):
            for name in _several(cells, self.separator, self.names):
                if name not in index:
                    raise records.located(
                        number,
                        f"label '{name}' is not in the training data, which has {_listed(self.names)}"
                        f"{nearest(name, self.names)}",
                    )
                made[number, index[name]] = 1
        return made

    def _values(self, records: Records, number: int) -> list[float]:
        made = []
        for cell in records.labels[number]:
            try:
                value = float(cell)
            except ValueError as error:
                raise records.located(number, f"'{cell}' is no number, but data.labels=value needs one") from error
            if not math.isfinite(value):
                raise records.located(number, f"the value is {cell}; expected a finite number")
            made.append(value)
        if len(made) != len(self.names):
            raise records.located(number, f"found {len(made)} values; expected {len(self.names)}")
        return made

    def describe(self) -> dict[str, object]:
        """For JSON."""
        said: dict[str, object] = {"kind": self.kind, "names": self.names}
        return said | ({"mean": self.mean, "deviation": self.deviation} if self.kind == "value" else {})


def _several(cells: tuple[str, ...], separator: str, columns: list[str]) -> list[str]:
    if len(cells) == 1:
        return [name.strip() for name in cells[0].split(separator) if name.strip()]
    return [columns[number] for number, cell in enumerate(cells) if cell not in ("0", "0.0", "")]


def learn_labels(records: Records, kind: Kind, separator: str = ";", columns: list[str] | None = None) -> Labels:
    """What the labels of training records are.

    Args:
        records: those of training.
        kind: see ``Labels``.
        separator: between the labels of a cell.
        columns: names of the label columns, where there are several.

    Raises:
        DataError: there is one class only.
    """
    width = len(records.labels[0])
    if kind == "value":
        names = columns or [f"value {number + 1}" for number in range(width)]
        values = Labels("value", names[:width] if len(names) >= width else [str(n) for n in range(width)]).encode(
            records
        )
        wide = values.astype(np.float64)
        deviation = wide.std(axis=0)
        flat = np.flatnonzero(deviation <= 0)
        if flat.size:
            raise DataError(
                f"{records.paths[0]}: every training record has the same value, {wide[0, flat[0]]:g}: nothing can be "
                "learnt from it; choose another column with data.label=NAME"
            )
        return Labels("value", names, wide.mean(axis=0).tolist(), deviation.tolist())
    if kind == "class":
        found = {cells[0] for cells in records.labels}
    elif width > 1:
        found = set(columns or [f"label {number + 1}" for number in range(width)])
        return Labels(kind, columns or sorted(found), separator=separator)
    else:
        found = {name for cells in records.labels for name in _several(cells, separator, [])}
    if len(found) < (2 if kind == "class" else 1):
        one = next(iter(found), "none")
        raise DataError(
            f"{records.paths[0]}: all {len(records):,} training records are of one class, '{one}'; expected two or "
            "more classes. If this is not the label, choose another column with data.label=NAME"
        )
    numeric = all(name.lstrip("-").isdigit() for name in found)
    names = sorted(found, key=int) if numeric else sorted(found)
    if kind == "class" and len(names) > 1000 and len(names) > len(records) / 2:
        raise DataError(
            f"{records.paths[0]}: {len(names):,} classes in {len(records):,} records: these look like names or values, "
            "not classes; choose another column with data.label=NAME, or task=regression for values"
        )
    return Labels(kind, names, separator=separator)


def counts(labels: Labels, encoded: NDArray[np.int64] | NDArray[np.float32]) -> dict[str, int]:
    """Records of each class or label; empty for values."""
    if labels.kind == "value":
        return {}
    if labels.kind == "class":
        many = np.bincount(encoded[:, 0].astype(np.int64), minlength=len(labels.names))
    else:
        many = encoded.sum(axis=0).astype(np.int64)
    return {name: int(number) for name, number in zip(labels.names, many, strict=True)}


def _listed(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(f"'{name}'" for name in names[:shown]) + more
