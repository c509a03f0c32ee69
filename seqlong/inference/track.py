"""The verb ``seqlong track``: how likely a model finds every base, or the tracks it predicts, for a genome browser."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqlong import runs
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError
from seqlong.inference.arguments import Parser, integer, open_model, require_bases
from seqlong.inference.embed import _bins_table
from seqlong.inference.model import Model
from seqlong.inference.passes import Plan, chosen, chunk_of, clean, fill, likelihoods
from seqlong.inference.predict_tracks import predict_tracks

log = logging.getLogger("seqlong")

HELP = """Writes ln p of every base (nats, at most 0; -1.386 is guessing): of causal models given all bases before it,
the mean of both strands; of masked models given those around it. Of a model that was trained on tracks
(experiment=dna/tracks) it writes what it predicts, in their units and bins: a file for each track. Of one of labels of
bases (experiment=dna/genes) the probability of each, or with .bed the stretches of likeliest labels.

Contigs are read whole, in parts, with the state carried: exactly what one pass gives, in the memory of one part. There
is no value where a base is not known (N). A command that was stopped goes on where it was when it is given again."""
EXAMPLES = """examples:
  seqlong track ref.fa --ckpt last --output ref.bw
  seqlong track ref.fa --ckpt last --contigs chr20 --strands forward --output chr20.npy"""


def command(words: Sequence[str]) -> int:
    """``seqlong track``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("track", HELP, EXAMPLES)
    parser.add_argument("sequences", nargs="+", metavar="FASTA", help="FASTA or GenBank, plain, gzip or bgzip")
    parser.add_model()
    parser.add_argument("--output", required=True, metavar="FILE", help=".bw, .npy (NaN: no value), .bed of labels")
    parser.add_argument("--strands", choices=("forward", "both"), default="both", help="which to read")
    parser.add_argument("--contigs", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--chunk", type=integer, help="bases to read at once; 32,768, on a GPU 262,144")
    given = parser.parse_args(list(words))
    output = Path(given.output)
    if output.suffix not in (".bw", ".bigwig", ".bigWig", ".npy", ".bed"):
        raise ConfigError(f"--output is '{output}'; expected a name that ends in .bw or .npy, or .bed for labels")
    if output.suffix not in (".npy", ".bed"):
        _bigwig()
    model = open_model(given)
    require_bases(model, "track")
    if output.suffix == ".bed" and model.kind != "BaseLabelling":
        raise ConfigError(f"--output is '{output}', but only labels of bases are written as .bed; take .bw or .npy")
    genome = Genome.open(given.sequences)
    if model.kind in ("TrackPrediction", "BaseLabelling"):
        every = int(model.task.bin)
        chunk = chunk_of(model, given.chunk, every)
        predict_tracks(model, Plan(genome, chosen(genome, given.contigs), every, chunk), output)
        return 0
    model.require("causal", "masked", why="track")
    reverse = (False, True) if given.strands == "both" else (False,)
    plan = Plan(genome, chosen(genome, given.contigs), 1, chunk_of(model, given.chunk, 1), reverse)
    mean = track(model, plan, output)
    log.info("mean ln p %.4f nats, %.4f bits a base", mean, -mean / np.log(2))
    return 0


def track(model: Model, plan: Plan, output: Path) -> float:
    """Write the track of what ``plan`` reads; returns its mean. See ``HELP``."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.partial")
    strands = fill(model, plan, 1, likelihoods, unfinished, {"verb": "track"}, "Reading")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        mean = _write_npy(plan, strands, temporary) if output.suffix == ".npy" else _write_bw(plan, strands, temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    if output.suffix == ".npy":
        runs.atomic_write(output.with_name(output.name.removesuffix(".npy") + ".bins.tsv"), _bins_table(plan))
    clean(unfinished)
    log.info("wrote %s", output)
    return mean


def joined(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(t strands)`` -> ``(t)``: the mean of the strands that have a value, NaN where none has."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0).sum(axis=1, dtype=np.float32)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _write_npy(plan: Plan, strands: NDArray[np.float32], path: Path) -> float:
    whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(plan.rows,))
    total, count = 0.0, 0
    for start in range(0, plan.rows, 1 << 20):
        part = joined(strands[start : start + (1 << 20)])
        whole[start : start + len(part)] = part
        known = part[~np.isnan(part)]
        total, count = total + float(known.sum(dtype=np.float64)), count + len(known)
    whole.flush()
    return total / max(1, count)


def _write_bw(plan: Plan, strands: NDArray[np.float32], path: Path) -> float:
    """A bigWig; its contigs in the order of their names, as the format wants it."""
    firsts = plan.firsts()
    order = sorted(firsts, key=lambda number: plan.genome.contigs[number].name)
    file = _bigwig().open(str(path), "w")
    total, count = 0.0, 0
    try:
        file.addHeader([(plan.genome.contigs[number].name, plan.genome.contigs[number].length) for number in order])
        for number in order:
            contig, first = plan.genome.contigs[number], firsts[number]
            for start in range(0, contig.length, 1 << 20):
                stop = min(start + (1 << 20), contig.length)
                values = joined(strands[first + start : first + stop])
                known = ~np.isnan(values)
                edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(np.int8)))
                for a, z in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                    file.addEntries(contig.name, start + a, values=values[a:z].astype(np.float64), span=1, step=1)
                total, count = total + float(values[known].sum(dtype=np.float64)), count + int(known.sum())
    finally:
        file.close()
    return total / max(1, count)


def _bigwig():  # type: ignore[no-untyped-def]
    try:
        import pyBigWig
    except ImportError as error:
        raise ConfigError("bigWig needs pyBigWig: pip install pyBigWig, or write .npy") from error
    return pyBigWig
