"""Videos that could not be read: counted and named, never replaced by others."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal

from seqlong.batch import SequenceBatch

log = logging.getLogger("seqlong")

Policy = Literal["raise", "skip", "partial"]
#: Stands in a row's ``source`` before what went wrong; a row is all that a loader's process sends.
MARK = {"skip": " !skipped: ", "partial": " !in part: "}
_SHOWN = 5


class Faults:
    """What became of the rows of one part of the data; told at the end of each of its epochs.

    Args:
        part: train, validation, test or predict.
        epoch: rows of an epoch on this rank.
    """

    def __init__(self, part: str, epoch: int) -> None:
        self.part, self.epoch = part, max(epoch, 1)
        self.rows = self.total = 0
        self.epochs = 0
        self.found: dict[str, Counter[str]] = {kind: Counter() for kind in MARK}

    def see(self, batch: SequenceBatch) -> None:
        """Count the rows of a batch that has come; at the end of an epoch, tell."""
        for row, source in enumerate(batch.source or []):
            if batch.index is not None and int(batch.index[row]) < 0:
                continue
            self.rows += 1
            for kind, mark in MARK.items():
                name, found, why = source.partition(mark)
                if found:
                    self.found[kind][f"{name} ({why})"] += 1
                    self.total += 1
            if self.rows == self.epoch:
                self.epochs += 1
                self.tell(f"{self.part} epoch {self.epochs}")

    def tell(self, when: str = "") -> None:
        """Log what was found since the last time, and begin anew."""
        when = when or (f"{self.part} after epoch {self.epochs}" if self.epochs else self.part)
        for kind, words in (("skip", "counted for nothing"), ("partial", "were read in part")):
            names = self.found[kind]
            if names:
                shown = "; ".join(
                    f"{name}{f' x{count}' if count > 1 else ''}" for name, count in names.most_common(_SHOWN)
                )
                more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                log.warning("%s: %d of %d clips %s: %s%s", when, names.total(), self.rows, words, shown, more)
            names.clear()
        self.rows = 0
