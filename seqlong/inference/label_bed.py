"""Predicted labels of bases as BED: a line for each stretch of one label."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqlong.inference.passes import Plan

_PART = 1 << 20
_STRANDS = {"_plus": "+", "_minus": "-"}


def write_bed(plan: Plan, values: NDArray[np.float32], names: Sequence[str], output: Path) -> None:
    """Write where each label is the likeliest: contig, start, stop, label, 1000 · its mean probability, strand.

    Args:
        plan: what was read, base by base.
        values: ``(rows k)`` probabilities.
        names: of the labels; the first, that of bases without a feature, is not written.
        output: the file.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    said = [_said(name) for name in names]
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for number, first in plan.firsts().items():
                contig = plan.genome.contigs[number]
                last, begin, total = 0, 0, 0.0  # the stretch that the part before ended in

                for low in range(0, contig.length, _PART):
                    high = min(low + _PART, contig.length)
                    part = np.asarray(values[first + low : first + high])
                    best = part.argmax(axis=1)
                    sums = np.concatenate([[0.0], np.cumsum(part.max(axis=1), dtype=np.float64)])
                    cuts = np.flatnonzero(np.diff(best, prepend=last))
                    at = 0
                    for cut in cuts.tolist():
                        total += float(sums[cut] - sums[at])
                        _line(file, contig.name, begin, low + cut, total, said[last], last)
                        last, begin, total, at = int(best[cut]), low + cut, 0.0, cut
                    total += float(sums[-1] - sums[at])
                _line(file, contig.name, begin, contig.length, total, said[last], last)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _said(name: str) -> tuple[str, str]:
    for end, strand in _STRANDS.items():
        if name.endswith(end):
            return name.removesuffix(end), strand
    return name, "."


def _line(file, contig: str, start: int, stop: int, total: float, said: tuple[str, str], label: int) -> None:  # type: ignore[no-untyped-def]
    if label and stop > start:
        name, strand = said
        file.write(f"{contig}\t{start}\t{stop}\t{name}\t{round(1000 * total / (stop - start))}\t{strand}\n")
