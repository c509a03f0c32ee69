"""Predicted tracks over whole contigs: exact, in parts, whatever the length, also where a model reads both strands."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlong import runs
from seqlong.datamodules.dna.tracks_values import Squash
from seqlong.inference.embed import _bins_table
from seqlong.inference.label_bed import write_bed
from seqlong.inference.model import Model
from seqlong.inference.passes import Piece, Plan, Values, _margins, clean, fill
from seqlong.inference.strands import Strand, tokens_of
from seqlong.state import BackboneState

log = logging.getLogger("seqlong")


class Predictor:
    """Predicts the bins of pieces of contigs, in order.

    A causal model that reads both strands needs, at each piece, the state that its other reading comes in with, from
    the far end. So the other strand is read once up to each piece, its states kept, and each piece is read again from
    there: three readings of a contig in all, in the memory of a part and of a state for each part. This is exactly what
    one pass over the whole contig gives. Where it cannot be done (a model that sees both sides by itself, or, with both
    strands, one with a state that grows) windows overlap by half a row of training on either side.

    Args:
        model: a TrackPrediction.
        plan: what is read, in bins of the model's.

    Attributes:
        exact: whether parts give what the whole gives.
    """

    def __init__(self, model: Model, plan: Plan) -> None:
        self.model, self.plan, self.task = model, plan, model.task
        self.exact = model.causal and (model.bounded or not self.task.both)
        settings = (model.config.get("data") or {}).get("init_args") or {}
        self.squash = Squash(float(settings.get("power") or 1.0), settings.get("clip"))
        self._other: dict[int, BackboneState] = {}
        self._contig = -1

    @property
    def names(self) -> list[str]:
        """Of the tracks, as their files called them."""
        listed = self.model.card.get("tracks")
        count = int(self.task.head.vocab_size)
        if isinstance(listed, list) and len(listed) == count and all(isinstance(one, dict) for one in listed):
            return [str(one.get("name", number)) for number, one in enumerate(listed)]
        return [str(number) for number in range(1, count + 1)]

    def __call__(self, model: Model, piece: Piece, state: BackboneState | None) -> tuple[Values, BackboneState | None]:
        """``(rows k)`` values of a piece, in the units of the data, and the state after it."""
        if self.exact:
            forth, back, state = self._carried(piece, state)
        else:
            forth, back = self._overlapping(piece)
        with torch.no_grad():
            pooled = self.task.pooled(forth), None if back is None else self.task.pooled(back)
            said = self.task.answers(*pooled)[0] * self.task.scale
        return self.squash.back(said.float().cpu().numpy()), state

    def _carried(self, piece: Piece, state: BackboneState | None) -> tuple[Tensor, Tensor | None, BackboneState | None]:
        model = self.model
        state = model.initial_state() if state is None else state
        forth, state = model.hidden(_tokens(piece.strand, piece.start, piece.stop), state)
        if not self.task.both:
            return forth, None, state
        if self._contig != piece.strand.contig:
            self._read_other(piece.strand)
        before = self._other[piece.start].map(lambda value: value.to(model.device))
        turned, _ = model.hidden(self._turned(piece.strand, piece.start, piece.stop), before)
        return forth, turned.flip(1), state

    def _read_other(self, strand: Strand) -> None:
        """Keep the state before each piece of the other strand, which is read from the contig's end."""
        self._contig, self._other = strand.contig, {}
        state = self.model.initial_state()
        for start in reversed(range(0, strand.length, self.plan.chunk)):
            self._other[start] = state.map(lambda value: value.detach().cpu().clone())
            stop = min(start + self.plan.chunk, strand.length)
            if start:
                _, after = self.model.hidden(self._turned(strand, start, stop), state)
                assert after is not None
                state = after

    def _turned(self, strand: Strand, start: int, stop: int) -> Tensor:
        other = Strand(strand.genome, strand.contig, not strand.reverse)
        return _tokens(other, strand.length - stop, strand.length - start)

    def _overlapping(self, piece: Piece) -> tuple[Tensor, Tensor | None]:
        before, after = _margins(self.model, piece)
        low, high = piece.start - before, piece.stop + after
        inside = slice(before, before + piece.stop - piece.start)
        hidden, _ = self.model.hidden(_tokens(piece.strand, low, high))
        if self.model.backbone.strands is not None:
            forth, back = hidden.chunk(2, dim=-1)
            return forth[:, inside], back[:, inside]
        if not self.task.both:
            return hidden[:, inside], None
        turned, _ = self.model.hidden(self._turned(piece.strand, low, high))
        return hidden[:, inside], turned.flip(1)[:, inside]


def _tokens(strand: Strand, start: int, stop: int) -> Tensor:
    return tokens_of(strand.read(start, stop))[None]


def predict_tracks(model: Model, plan: Plan, output: Path) -> list[Path]:
    """Write the predicted tracks of what ``plan`` reads: a bigWig each, one ``.npy`` of all, or the labels as BED.

    Returns:
        The files: ``output``, or with several tracks ``NAME.track.bw``.
    """
    predictor = Predictor(model, plan)
    if not predictor.exact:
        log.info("this model cannot carry what it needs from part to part: windows overlap, which is not exact")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.partial")
    names = predictor.names
    values = fill(model, plan, len(names), predictor, unfinished, {"verb": "track", "tracks": names}, "Reading")
    if output.suffix == ".npy":
        runs.atomic_write(output.with_name(output.name.removesuffix(".npy") + ".bins.tsv"), _bins_table(plan))
        os.replace(unfinished, output)
        written = [output]
    elif output.suffix == ".bed":
        write_bed(plan, values, names, output)
        written = [output]
    else:
        targets = [output] if len(names) == 1 else [_named(output, name) for name in names]
        for column, target in enumerate(targets):
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                _write_bigwig(plan, values[:, column], temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        written = targets
    clean(unfinished)
    for target in written:
        log.info("wrote %s", target)
    return written


def _named(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}.{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}{output.suffix}")


def _write_bigwig(plan: Plan, values: NDArray[Any], path: Path) -> None:
    """Bins of a track; contigs in the order of their names, as the format wants it."""
    import pyBigWig

    firsts, every = plan.firsts(), plan.every
    order = sorted(firsts, key=lambda number: plan.genome.contigs[number].name)
    file = pyBigWig.open(str(path), "w")
    try:
        file.addHeader([(plan.genome.contigs[number].name, plan.genome.contigs[number].length) for number in order])
        for number in order:
            contig, first = plan.genome.contigs[number], firsts[number]
            whole = contig.length // every
            for start in range(0, whole, 1 << 20):
                part = values[first + start : first + min(start + (1 << 20), whole)].astype(np.float64)
                file.addEntries(contig.name, start * every, values=part, span=every, step=every)
            if whole * every < contig.length:
                ends = ([whole * every], [contig.length], [float(values[first + whole])])
                file.addEntries([contig.name], ends[0], ends=ends[1], values=ends[2])
    finally:
        file.close()
