"""Whole chromosomes through a model, part by part with the state carried, into an array on disk; goes on if stopped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError, DataError, nearest
from seqlong.inference.arguments import progress
from seqlong.inference.journal import identity
from seqlong.inference.model import Model
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.state import BackboneState

log = logging.getLogger("seqlong")

Values = NDArray[np.float32]
#: Bases between two times that progress is put on disk.
SAVE_EVERY = 8_000_000
#: Of a masked model's bases, one in so many is hidden at a time.
HIDE_EVERY = 8


@dataclass(frozen=True)
class Piece:
    """Bases ``start`` to ``stop`` of the forward strand of a contig, whose results are rows ``row`` to ``row + rows``.

    Attributes:
        first: whether it is the first that its strand reads of the contig, so that no state is carried into it.
    """

    strand: Strand
    start: int
    stop: int
    row: int
    rows: int
    first: bool

    @property
    def begin(self) -> int:
        """Where it begins on its own strand."""
        return self.strand.place(self.start, self.stop - self.start)

    @property
    def end(self) -> int:
        """Where it ends there."""
        return self.begin + self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Which bases are read in which order, and which row of the array each bin has.

    Attributes:
        genome: where they are.
        contigs: numbers of the contigs.
        every: bases of a bin; the last of a contig may be shorter.
        chunk: bases that are read at once, a multiple of ``every``.
        reverse: which strands are read: False, then True.
    """

    genome: Genome
    contigs: tuple[int, ...]
    every: int
    chunk: int
    reverse: tuple[bool, ...] = (False,)

    @property
    def rows(self) -> int:
        """Bins in all."""
        return sum(-(-self.genome.contigs[number].length // self.every) for number in self.contigs)

    @property
    def bases(self) -> int:
        """Bases to be read, of all strands."""
        return sum(self.genome.contigs[number].length for number in self.contigs) * len(self.reverse)

    def firsts(self) -> dict[int, int]:
        """The first row of each contig."""
        found, row = {}, 0
        for number in self.contigs:
            found[number] = row
            row += -(-self.genome.contigs[number].length // self.every)
        return found

    def pieces(self) -> list[Piece]:
        """Everything, in the order of reading."""
        firsts, found = self.firsts(), []
        for reverse in self.reverse:
            for number in self.contigs:
                length = self.genome.contigs[number].length
                cuts = list(range(0, length, self.chunk))
                for place, start in enumerate(reversed(cuts) if reverse else cuts):
                    stop = min(start + self.chunk, length)
                    found.append(
                        Piece(
                            Strand(self.genome, number, reverse),
                            start,
                            stop,
                            firsts[number] + start // self.every,
                            -(-(stop - start) // self.every),
                            place == 0,
                        )
                    )
        return found


def chosen(genome: Genome, names: Sequence[str] | None) -> tuple[int, ...]:
    """Numbers of the contigs called ``names``; all if there are none.

    Raises:
        DataError: no such contig.
    """
    known = {contig.name: number for number, contig in enumerate(genome.contigs)}
    for name in names or ():
        if name not in known:
            raise DataError(f"--contigs {name}: the reference has no such contig{nearest(name, known)}")
    return tuple(known[name] for name in names) if names else tuple(range(len(genome.contigs)))


def fill(
    model: Model,
    plan: Plan,
    width: int,
    compute: Callable[[Model, Piece, BackboneState | None], tuple[Values, BackboneState | None]],
    partial: Path,
    asked: Mapping[str, Any],
    what: str,
) -> NDArray[np.float32]:
    """Compute the ``(rows, strands · width)`` array of a plan on disk, from wherever an earlier call was stopped.

    Args:
        model: what computes.
        plan: what is read.
        width: columns of each strand.
        compute: a piece and the state before it to its ``(rows, width)`` values in the order of the forward strand, and
            the state after it.
        partial: file of the array; its name with ``.state`` behind it tells how far it is.
        asked: what the command was asked; an array of another command is not gone on with.
        what: to say what is going on.

    Returns:
        The array, memory-mapped.

    Raises:
        DataError: the beginning of another command's results is there.
    """
    saved_file = partial.with_name(f"{partial.name}.state")
    everything = json.dumps({**asked, **_facts(model, plan)}, sort_keys=True)
    done, state = 0, None
    if saved_file.is_file() and partial.is_file():
        saved = torch.load(saved_file, map_location=model.device, weights_only=True)
        if saved["asked"] != everything:
            one, two = json.loads(saved["asked"]), json.loads(everything)
            keys = [key for key in two if one.get(key) != two[key]]
            raise DataError(
                f"{saved_file} holds the beginning of another command's results ({', '.join(keys[:4])} differ). Give "
                "the same flags to go on with it, remove it to start afresh, or choose another output"
            )
        done, state = saved["done"], _state(model, saved["tensors"])
        array = np.lib.format.open_memmap(partial, mode="r+")
        log.info("going on after %s of %s parts", f"{done:,}", f"{len(plan.pieces()):,}")
    else:
        shape = (plan.rows, width * len(plan.reverse))
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    pieces = plan.pieces()
    read = sum(piece.stop - piece.start for piece in pieces[:done])
    since = 0
    with progress(what, plan.bases, "bases", read) as advance:
        for number, piece in enumerate(pieces[done:], done):
            values, state = compute(model, piece, None if piece.first else state)
            column = width * plan.reverse.index(piece.strand.reverse)
            array[piece.row : piece.row + piece.rows, column : column + width] = values
            size = piece.stop - piece.start
            since += size
            advance(size)
            if since >= SAVE_EVERY or number + 1 == len(pieces):
                since = 0
                array.flush()  # before what says that it is there
                _save(saved_file, {"asked": everything, "done": number + 1, "tensors": _tensors(state)})
    return array


def clean(partial: Path) -> None:
    """Remove what an array leaves behind once its output is whole."""
    for end in ("", ".state"):
        partial.with_name(partial.name + end).unlink(missing_ok=True)


def _facts(model: Model, plan: Plan) -> dict[str, Any]:
    return {
        "checkpoint": identity(model.path),
        "precision": model.precision,
        "reference": [store.digest[:16] for store in plan.genome.stores],
        "contigs": list(plan.contigs),
        "every": plan.every,
        "chunk": plan.chunk,
        "strands": [bool(reverse) for reverse in plan.reverse],
    }


def _tensors(state: BackboneState | None) -> list[Tensor]:
    found: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        found.append(value.cpu())
        return value

    if state is not None:
        state.map(note)
    return found


def _state(model: Model, tensors: list[Tensor]) -> BackboneState | None:
    """The state that ``_tensors`` took apart."""
    if not tensors:
        return None
    source = iter(tensors)
    return model.initial_state().map(lambda _: next(source))


def _save(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


# --- what is computed of a piece -------------------------------------------------------------------------------------


def embeddings(
    model: Model, piece: Piece, state: BackboneState | None, every: int
) -> tuple[Values, BackboneState | None]:
    """The mean of the last hidden states of each bin of ``every`` bases, ``(rows d)``."""
    if model.causal:
        state = model.initial_state() if state is None else state
        hidden, state = model.hidden(tokens_of(piece.strand.read(piece.begin, piece.end))[None], state)
    else:
        before, after = _margins(model, piece)
        tokens = tokens_of(piece.strand.read(piece.begin - before, piece.end + after))[None]
        hidden = model.hidden(tokens)[0][:, before : before + piece.end - piece.begin]
    rows = hidden[0].flip(0) if piece.strand.reverse else hidden[0]
    return _pooled(rows, every), state


def likelihoods(model: Model, piece: Piece, state: BackboneState | None) -> tuple[Values, BackboneState | None]:
    """``(t 1)`` ``ln p`` of each base: given those before it for causal models, those around it for masked ones.

    NaN where a base is not known, or has nothing before it.
    """
    strand = piece.strand
    targets = targets_of(strand.read(piece.begin, piece.end))
    if model.causal:
        state = model.initial_state() if state is None else state
        before = tokens_of(strand.read(max(0, piece.begin - 1), piece.end - 1))
        own = targets[len(targets) - len(before) :]
        found = torch.full((len(targets),), torch.nan, dtype=torch.float64)
        if len(before):
            values, state = model.log_likelihood(before[None], own[None], state)
            found[len(targets) - len(before) :] = values[0].double().cpu()
    else:
        found = _hidden_likelihoods(model, piece)
    found[targets < 0] = torch.nan
    values = found.flip(0) if strand.reverse else found
    return values.float().numpy()[:, None], state


def _hidden_likelihoods(model: Model, piece: Piece) -> Tensor:
    """Each base hidden once, one in ``HIDE_EVERY`` at a time."""
    before, after = _margins(model, piece)
    letters = piece.strand.read(piece.begin - before, piece.end + after)
    tokens, targets = tokens_of(letters), targets_of(letters)
    found = torch.zeros(len(tokens), dtype=torch.float64)
    for shift in range(HIDE_EVERY):
        hidden_here = torch.zeros(len(tokens), dtype=torch.bool)
        hidden_here[shift::HIDE_EVERY] = True
        values, _ = model.log_likelihood(
            tokens.masked_fill(hidden_here, model.mask_token)[None], targets.where(hidden_here, -1)[None]
        )
        found += values[0].double().cpu()
    return found[before : before + piece.end - piece.begin]


def _margins(model: Model, piece: Piece) -> tuple[int, int]:
    """Bases that are read beyond a piece on either side, for a model that sees both: half a window of training."""
    margin = max(64, model.length // 2)
    return min(margin, piece.begin), min(margin, piece.strand.length - piece.end)


def _pooled(rows: Tensor, every: int) -> Values:
    """``(t d)`` -> ``(n d)``, means of ``every`` positions; the last of those that are left."""
    whole = len(rows) // every * every
    parts = [rows[:whole].unflatten(0, (-1, every)).float().mean(dim=1)] if whole else []
    if whole < len(rows):
        parts.append(rows[whole:].float().mean(dim=0, keepdim=True))
    return torch.cat(parts).cpu().numpy()


def chunk_of(model: Model, asked: int | None, every: int) -> int:
    """Bases to read at once: a multiple of ``every``.

    Raises:
        ConfigError: less than a bin was asked for.
    """
    size = asked or (min(1 << 18, max(8192, (1 << 28) // model.width)) if model.device.type == "cuda" else 1 << 15)
    size = max(size, every) if asked is None else size
    if size < every:
        raise ConfigError(f"--chunk {size:,} is less than a bin of {every:,} bases; give at least that")
    return size // every * every
