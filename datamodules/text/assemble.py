"""Pieces of documents to a SequenceBatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from seqlong.batch import SequenceBatch
from seqlong.datamodules.packing import segment_ids
from seqlong.datamodules.text.corpus import Corpus
from seqlong.datamodules.text.rows import Piece, Rows
from seqlong.datamodules.text.vocabulary import Vocabulary

Targets = Literal["next", "same"]
_SOURCES_SHOWN = 3


def assemble(
    corpora: Sequence[Corpus],
    pieces: Sequence[Rows],
    vocabulary: Vocabulary,
    length: int,
    targets: Targets,
    measured: bool,
    index: NDArray[np.int64],
) -> SequenceBatch:
    """Make a batch.

    A position predicts the next token of its document, from beyond the row where the split goes on there. In training
    the token that ends a document counts as any other. Where bits are measured it has weight 0: they are those of the
    text alone.

    Args:
        corpora: where tokens are.
        pieces: for each corpus its pieces, with no two on the same positions of a row, and the continuations.
        vocabulary: for padding and special tokens.
        length: t.
        targets: "next", or "same" for masked models.
        measured: see above.
        index: ``(b)`` sample numbers; a row of number -1, or without pieces, gets no targets.

    Returns:
        A batch of b rows and t positions.
    """
    count = len(index)
    tokens = np.full((count, length), vocabulary.pad, dtype=np.int64)
    following = np.full((count, length), -1, dtype=np.int64)
    placed: list[tuple[Corpus, Piece]] = [
        (corpus, piece) for corpus, rows in zip(corpora, pieces, strict=True) for piece in rows.pieces
    ]
    sources: list[list[str]] = [[] for _ in range(count)]
    for corpus, (row, offset, document, start, size, more) in placed:
        beyond = int(more and targets == "next")
        found = corpus.read(document, start, start + size + beyond)
        tokens[row, offset : offset + size] = found[:size]
        if targets == "next":
            following[row, offset : offset + len(found) - 1] = found[1:]
        if len(sources[row]) <= _SOURCES_SHOWN:
            sources[row].append(f"{corpus.name(document)}:{start}-{start + size}")
        else:
            sources[row].append("")
    if targets == "same":
        special = np.array([one for one in (vocabulary.bos, vocabulary.eos) if one is not None], dtype=np.int64)
        following = np.where(np.isin(tokens, special) | (tokens == vocabulary.pad), -1, tokens)
    following[index < 0] = -1
    weight = (following >= 0).astype(np.float32)
    if measured and vocabulary.eos is not None:
        weight[following == vocabulary.eos] = 0.0
    continues = [rows.continues for rows in pieces if rows.continues is not None]
    follows = np.logical_or.reduce(continues) if continues else None
    return SequenceBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(following),
        loss_weight=torch.from_numpy(weight),
        segment_ids=_segments([piece for _, piece in placed], count, length),
        continues=None if follows is None else torch.from_numpy(follows),
        index=torch.from_numpy(index.copy()),
        source=[_shown(names) for names in sources],
    )


def _segments(pieces: list[Piece], count: int, length: int) -> torch.Tensor | None:
    if len(pieces) == count and all(piece.length == length for piece in pieces):
        return None
    kept = sorted(pieces, key=lambda piece: (piece.row, piece.offset))
    row, offset, size = (np.array([piece[at] for piece in kept], dtype=np.int64) for at in (0, 1, 4))
    ids = segment_ids(row, offset, size, count, length)
    ids[(ids == 0).all(axis=1)] = 1  # a row without pieces is padding alone: one segment that counts for nothing
    return torch.from_numpy(ids)


def _shown(names: list[str]) -> str:
    more = len(names) - _SOURCES_SHOWN
    return "; ".join(names[:_SOURCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
