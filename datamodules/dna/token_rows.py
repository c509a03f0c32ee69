"""Pieces of a genome to a batch of words, codons or learnt pieces; `assemble` is the same for single bases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.alphabet import is_soft_masked, reverse_complement
from seqlong.datamodules.dna.assemble import Targets, shown
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import Region
from seqlong.datamodules.dna.tokens import DnaTokenizer, Ids, lower_share
from seqlong.datamodules.dna.windows import Piece, Rows
from seqlong.datamodules.packing import pad_length, segment_ids

#: Rows whose tokens differ in bases are as wide as the longest of their batch, in steps of so many.
_STEP = 64

Filled = tuple[Ids, Ids, NDArray[np.float32]]


def assemble_tokens(
    genome: Genome,
    rows: Rows,
    length: int,
    tokenizer: DnaTokenizer,
    targets: Targets,
    soft_mask_weight: float,
    index: NDArray[np.int64],
) -> SequenceBatch:
    """Make the batch of ``rows``, whose pieces lie in them one after another.

    The loss weight of a position is that of the token it predicts: 0 where there is none or it is not known, else the
    mean of its bases' (``soft_mask_weight`` in lower case, else 1). The other strand is turned first, and then read.

    Args:
        genome: where the bases are.
        rows: pieces, by row and offset; ``rows.pieces`` are in bases.
        length: t, where all tokens have as many bases; else the batch is as wide as its longest row.
        tokenizer: what reads them.
        targets: "next", the token after each, read from beyond the window where the region goes on; or "same".
        soft_mask_weight: see above.
        index: ``(b)`` sample numbers; a row of number -1 gets no targets.
    """
    placed: list[tuple[int, int, Filled]] = []
    used = np.zeros(rows.count, dtype=np.int64)
    sources: list[list[str]] = [[] for _ in range(rows.count)]
    for piece in rows.pieces:
        filled = read_piece(genome, piece, tokenizer, targets, soft_mask_weight)
        sign = "-" if piece.reverse else "+"
        sources[piece.row].append(
            f"{genome.contigs[piece.contig].name}:{piece.start}-{piece.start + piece.length}:{sign}"
        )
        if filled[0].size:  # a region may be shorter than a word
            placed.append((piece.row, int(used[piece.row]), filled))
            used[piece.row] += filled[0].size
    width = length if tokenizer.span is not None else pad_length(max(1, int(used.max())), _STEP)
    tokens = np.full((rows.count, width), tokenizer.pad, dtype=np.int64)
    following = np.full((rows.count, width), -1, dtype=np.int64)
    weight = np.zeros((rows.count, width), dtype=np.float32)
    for row, at, (ids, after, weights) in placed:
        here = slice(at, at + ids.size)
        tokens[row, here], following[row, here], weight[row, here] = ids, after, weights
    following[index < 0], weight[index < 0] = -1, 0
    full = len(placed) == rows.count and bool((used == width).all())
    columns = [(row, at, filled[0].size) for row, at, filled in placed]
    in_row, begins, sizes = np.array(columns, dtype=np.int64).reshape(-1, 3).T
    return SequenceBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(following),
        loss_weight=torch.from_numpy(weight),
        segment_ids=None if full else torch.from_numpy(segment_ids(in_row, begins, sizes, rows.count, width)),
        continues=None if rows.continues is None else torch.from_numpy(rows.continues),
        index=torch.from_numpy(index),
        source=[shown(names) for names in sources],
    )


def read_piece(
    genome: Genome, piece: Piece, tokenizer: DnaTokenizer, targets: Targets, soft_mask_weight: float
) -> Filled:
    """Tokens of a piece, what each predicts (-1 for nothing) and its weight; ``(t)`` each."""
    beyond = piece.before if piece.reverse else piece.after
    span, stride = tokenizer.span, tokenizer.stride
    more = 0 if span is None else min(span - stride + (stride if targets == "next" else 0), beyond)
    low, high = piece.start, piece.start + piece.length
    if piece.reverse:
        bases = reverse_complement(genome.read(piece.contig, low - more, high))
    else:
        bases = genome.read(piece.contig, low, high + more)
    every = tokenizer.tokens(bases)
    count = every.size if span is None else min(every.size, piece.length // stride)
    after = every[:count] if targets == "same" else every[1 : count + 1]
    share = np.zeros(every.size, dtype=np.float32)
    if soft_mask_weight != 1.0:
        share = lower_share(tokenizer, every, is_soft_masked(bases))
    weights = np.zeros(count, dtype=np.float32)
    predicted = np.full(count, -1, dtype=np.int64)
    good = tokenizer.known(after)
    predicted[: after.size][good] = after[good]
    first = 0 if targets == "same" else 1
    weights[: after.size][good] = (1 + (soft_mask_weight - 1) * share[first : first + after.size])[good]
    return every[:count], predicted, weights


def in_frame(regions: list[Region], frame: int) -> list[Region]:
    """Regions from the first base on that is a multiple of ``frame`` from the beginning of the contig."""
    if frame == 1:
        return regions
    moved = [region._replace(start=pad_length(region.start, frame)) for region in regions]
    return [region for region in moved if region.length >= frame]


def token_notes(
    tokenizer: DnaTokenizer, genome: Genome, regions: Mapping[str, Sequence[Region]], targets: Targets
) -> list[str]:
    """What a reader should know of the tokens: sentences."""
    span = tokenizer.span
    unknown = sum(contig.unknown for contig in genome.contigs)
    notes = [f"Tokens are {tokenizer.name}: {tokenizer.size:,} ids. Lower case is read as upper case, U as T."]
    if span is None:
        notes.append(
            f"Each of the {unknown:,} unknown bases is a token of its own. Windows are cut into tokens by themselves, "
            "so the first token of each is not predicted; rows are padded to the longest of their batch."
        )
        return notes
    if unknown:
        most = unknown * (span if tokenizer.stride == 1 else 1)
        notes.append(
            f"{unknown:,} unknown bases make at most {most:,} words unknown: read as <unknown>, never predicted."
        )
    if tokenizer.stride > 1:
        notes.append(f"Up to {span - 1} bases at the end of each region make no whole word, and are left out.")
    elif targets == "same" and span > 1:
        notes.append(
            f"Words overlap, so a hidden one is told by its neighbours unless {span} or more in a row are hidden: set "
            f"task.span={2 * span}."
        )
    small = [region for parts in regions.values() for region in parts if region.length < span]
    if small:
        names = ", ".join(f"{genome.contigs[contig].name}:{start}-{stop}" for contig, start, stop in small[:5])
        notes.append(f"{len(small):,} regions are shorter than a word of {span} bases, and left out: {names}.")
    return notes
