"""Pieces of a genome to a SequenceBatch: bytes are copied, turned round and translated by table, never one by one."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.alphabet import encode, encode_targets, is_soft_masked, reverse_complement
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.windows import Rows
from seqlong.datamodules.packing import segment_ids

Targets = Literal["next", "same"]
_SOURCES_SHOWN = 3


def assemble(
    genome: Genome,
    rows: Rows,
    length: int,
    targets: Targets,
    soft_mask_weight: float,
    index: NDArray[np.int64],
) -> SequenceBatch:
    """Make the batch of ``rows``.

    The loss weight of a position is that of the base it predicts: 0 where there is none or it is not known (N),
    ``soft_mask_weight`` where it is in lower case, else 1.

    Args:
        genome: where the bases are.
        rows: pieces, with no two on the same positions.
        length: t.
        targets: "next", the base after each position, taken from beyond the window where the region goes on; or "same".
        soft_mask_weight: see above.
        index: ``(b)`` sample numbers; a row of number -1 gets no targets.

    Returns:
        A batch of b rows and t positions.
    """
    here = np.zeros((rows.count, length), dtype=np.uint8)
    following = here if targets == "same" else np.zeros_like(here)
    sources: list[list[str]] = [[] for _ in range(rows.count)]
    for row, offset, contig, start, size, reverse, before, after in rows.pieces:
        low, high = start, start + size
        beyond = targets == "next" and (before if reverse else after)
        if beyond and reverse:
            low -= 1
        elif beyond:
            high += 1
        bases = genome.read(contig, low, high)
        if reverse:
            bases = reverse_complement(bases)
        here[row, offset : offset + size] = bases[:size]
        if targets == "next":
            following[row, offset : offset + len(bases) - 1] = bases[1:]
        sources[row].append(f"{genome.contigs[contig].name}:{start}-{start + size}:{'-' if reverse else '+'}")
    following_tokens = encode_targets(following).astype(np.int64)
    following_tokens[index < 0] = -1
    weight = (following_tokens >= 0).astype(np.float32)
    if soft_mask_weight != 1.0:
        weight[is_soft_masked(following)] *= soft_mask_weight
    return SequenceBatch(
        tokens=torch.from_numpy(encode(here).astype(np.int64)),
        targets=torch.from_numpy(following_tokens),
        loss_weight=torch.from_numpy(weight),
        segment_ids=_segments(rows, length),
        continues=None if rows.continues is None else torch.from_numpy(rows.continues),
        index=torch.from_numpy(index),
        source=[shown(names) for names in sources],
    )


def _segments(rows: Rows, length: int) -> torch.Tensor | None:
    if all(piece.length == length for piece in rows.pieces):
        return None
    row, offset, _, _, size, *_ = (np.array(column, dtype=np.int64) for column in zip(*rows.pieces, strict=True))
    return torch.from_numpy(segment_ids(row, offset, size, rows.count, length))


def shown(names: list[str]) -> str:
    """The pieces of a row, the first few by name."""
    more = len(names) - _SOURCES_SHOWN
    return "; ".join(names[:_SOURCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
