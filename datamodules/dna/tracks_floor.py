"""What tracks can be told without a neural network: a Poisson regression on the composition around each bin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlong.datamodules.dna.alphabet import BASE_TABLE, translate
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import Region
from seqlong.datamodules.dna.tracks_values import Tracks
from seqlong.tracks import correlations, deviance

#: Bases on either side of a bin in which words are counted.
REACHES = (8, 64, 512)
#: Words of up to so many bases.
LONGEST = 3
#: Around the middle of bins of one base, letters by place so far on either side.
PLACES = 12
#: Bins to fit on, and bases to look through for them and for scores.
MOST_BINS, MOST_BASES = 20_000, 8_000_000
_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)


def track_floors(
    tracks: Tracks, regions: Mapping[str, Sequence[Region]], scale: Sequence[float]
) -> list[dict[str, object]]:
    """Scores to beat: the mean of each track in training, and ``exp(w · features + b)``.

    Features: how often each word of 1 to 3 bases is within 8, 64 and 512 bases of a bin, and for bins of one base which
    letter is at each place up to 12 bases away. Weights by maximum likelihood less a penalty on their squares, as large
    as is best on validation.

    Returns:
        For each: ``name``, ``bits`` of a bin on validation (half the Poisson deviance of values over the mean), and for
        ``validation`` and ``test`` ``pearson`` and ``spearman`` of each track, in lists.
    """
    with torch.inference_mode(False), torch.enable_grad():  # the test asks for it where there are no gradients
        return _floors(tracks, regions, torch.tensor(scale))


def _floors(tracks: Tracks, regions: Mapping[str, Sequence[Region]], unit: Tensor) -> list[dict[str, object]]:
    given = {name: _features(tracks, parts, unit) for name, parts in regions.items() if parts}
    features, target = given["train"]
    if len(features) > MOST_BINS:
        chosen = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(features))[:MOST_BINS]))
        features, target = features[chosen], target[chosen]
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)

    def scaled(rows: Tensor) -> Tensor:
        return (rows - mean) / deviation / features.shape[1] ** 0.5

    train = scaled(features)
    held = {name: (scaled(rows), truth) for name, (rows, truth) in given.items() if name != "train"}
    flat = {name: torch.ones_like(truth) for name, (_, truth) in held.items()}
    floors = [_scored("mean", flat, held)]
    weights = torch.zeros(train.shape[1] + 1, target.shape[1])
    best: dict[str, object] | None = None
    for penalty in _PENALTIES:  # from smooth to rough, each from the last one's weights
        weights = _fit(train, target, penalty, weights)
        said = {name: _rate(rows, weights) for name, (rows, _) in held.items()}
        found = _scored("local composition", said, held) | {"penalty": penalty}
        if best is None or float(str(found["bits"])) < float(str(best["bits"])):
            best = found
    assert best is not None
    return [*floors, best]


def _scored(name: str, said: Mapping[str, Tensor], held: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, object]:
    truth = held["validation"][1]
    bits = deviance(truth, said["validation"]).sum(dtype=torch.float64) / (~truth.isnan()).sum() / np.log(2)
    scores = {part: correlations(held[part][1], rows) for part, rows in said.items()}
    return {"name": name, "bits": float(bits), **scores}


def _rate(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows @ weights[:-1] + weights[-1]).clamp(max=15).exp()


def _fit(rows: Tensor, target: Tensor, penalty: float, start: Tensor) -> Tensor:
    weights = start.clone().requires_grad_()
    count = (~target.isnan()).sum(0).clamp(min=1)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (deviance(target, _rate(rows, weights)).sum(0) / count).sum() + penalty * (weights[:-1] ** 2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def _features(tracks: Tracks, regions: Sequence[Region], unit: Tensor) -> tuple[Tensor, Tensor]:
    """``(n f)`` and ``(n k)`` of the bins that have a value, those of a part of the regions if they are large."""
    rows, truths = [], []
    for piece in tracks.pieces(regions, MOST_BASES):
        values = tracks.bins(*piece)
        kept = np.flatnonzero(~np.isnan(values).all(axis=1))
        if len(kept):
            rows.append(_composition(tracks.genome, tracks.size, piece, kept))
            truths.append(values[kept])
    if not rows:
        width = _width(tracks.size)
        return torch.zeros(0, width), torch.zeros(0, len(tracks.names))
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(truths)) / unit


def _width(size: int) -> int:
    words = sum(4**k for k in range(1, LONGEST + 1)) * len(REACHES)
    return words + (4 * (2 * PLACES + 1) if size == 1 else 0)


def _composition(genome: Genome, size: int, piece: Region, kept: NDArray[np.int64]) -> NDArray[np.float32]:
    """``(n f)`` features of bins ``kept`` of a piece."""
    contig = genome.contigs[piece.contig]
    margin = REACHES[-1]
    low, high = piece.start - margin, piece.stop + margin
    if not contig.circular:
        low, high = max(low, 0), min(high, contig.length)
    letters = translate(genome.read(piece.contig, low, high), BASE_TABLE).astype(np.int64)
    begin = piece.start - low + kept * size
    parts = []
    for k in range(1, LONGEST + 1):
        count = max(0, len(letters) - k + 1)
        code, good = np.zeros(count, dtype=np.int64), np.ones(count, dtype=bool)
        for step in range(k):
            here = letters[step : step + count]
            code, good = code * 4 + np.minimum(here, 3), good & (here < 4)
        marks = np.zeros((count + 1, 4**k), dtype=np.int32)
        marks[1:][np.arange(count)[good], code[good]] = 1
        sums = np.cumsum(marks, axis=0, dtype=np.int32)
        for reach in REACHES:
            first, last = np.clip(begin - reach, 0, count), np.clip(begin + size + reach - k + 1, 0, count)
            parts.append((sums[last] - sums[first]) / np.maximum(last - first, 1)[:, None])
    if size == 1:
        offsets = begin[:, None] + np.arange(-PLACES, PLACES + 1)
        inside = (offsets >= 0) & (offsets < len(letters))
        found = np.where(inside, letters[np.clip(offsets, 0, len(letters) - 1)], 4)
        parts.append((found[..., None] == np.arange(4)).reshape(len(kept), -1))
    return np.concatenate(parts, axis=1).astype(np.float32)
