"""The verb ``seqlong reach``: how much of its context a model makes use of."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from seqlong import runs
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError, DataError
from seqlong.inference.arguments import Parser, integer, integers, open_model, progress, require_bases
from seqlong.inference.logo import curve
from seqlong.inference.model import Model
from seqlong.inference.seen import regions_of
from seqlong.inference.strands import Strand, targets_of, tokens_of

log = logging.getLogger("seqlong")

HELP = """Measures the bits a base of the same bases again and again, while the model may see 256, 512, ... bases before
them. Where the curve goes flat, more context tells it nothing. Each sample is a stretch of --scored bases; differences
are between the same stretches, so that small ones show.

Stretches are of the held-out regions if the reference is what the model was trained on, else of all of it."""
EXAMPLES = """examples:
  seqlong reach ref.fa --ckpt last
  seqlong reach ref.fa --ckpt last --contexts 256,4096,65536 --samples 64 --output reach.png --json reach.json"""


@dataclass
class Reach:
    """What was measured.

    Attributes:
        contexts: bases that the model might see, ascending.
        bits: ``(n c)`` bits a base of each sample with each context.
    """

    contexts: list[int]
    bits: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """``(c)`` over the samples."""
        return self.bits.mean(axis=0)

    @property
    def gain(self) -> NDArray[np.float64]:
        """``(c)`` bits that each context saves beside the shortest."""
        return self.bits[:, :1].mean() - self.mean

    @property
    def gain_error(self) -> NDArray[np.float64]:
        """``(c)`` its standard error, over samples, which see the same bases with every context."""
        difference = self.bits[:, :1] - self.bits
        return difference.std(axis=0, ddof=1) / math.sqrt(len(self.bits))

    @property
    def useful(self) -> int:
        """The shortest context beyond which no longer one is better by more than two standard errors."""
        for place, context in enumerate(self.contexts):
            difference = self.bits[:, place : place + 1] - self.bits[:, place + 1 :]
            error = difference.std(axis=0, ddof=1) / math.sqrt(len(self.bits))
            if not (difference.mean(axis=0) > 2 * error).any():
                return context
        return self.contexts[-1]


def command(words: Sequence[str]) -> int:
    """``seqlong reach``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("reach", HELP, EXAMPLES)
    parser.add_argument("sequences", nargs="+", metavar="FASTA", help="FASTA or GenBank, plain, gzip or bgzip")
    parser.add_model()
    parser.add_argument("--contexts", type=integers, help="bases; 256 and its doubles up to 16,384, 1M on a GPU")
    parser.add_argument("--samples", type=integer, default=32, help="stretches; 32 if left out")
    parser.add_argument("--scored", type=integer, default=128, help="bases of a stretch; 128 if left out")
    parser.add_argument("--seed", type=int, default=0, help="names the stretches")
    parser.add_argument("--output", default="reach.png", metavar="FILE", help="PNG; reach.png if left out")
    parser.add_argument("--json", metavar="FILE", help="the numbers too")
    given = parser.parse_args(list(words))
    if given.samples < 2:
        raise ConfigError("--samples is 1; expected at least 2, to know how sure the curve is")
    model = open_model(given)
    model.require("causal", why="reach")
    require_bases(model, "reach")
    genome = Genome.open(given.sequences)
    contexts = given.contexts
    if contexts is None:
        longest = max(contig.length for contig in genome.contigs) - given.scored
        limit = min(longest, 1 << 20 if model.device.type == "cuda" else 1 << 14)
        contexts = [256 << power for power in range(13) if 256 << power <= limit]
    if len(contexts) < 2:
        raise ConfigError("reach needs at least two --contexts, and a contig longer than both")
    found = measure(model, genome, sorted(set(contexts)), given.samples, given.scored, given.seed)
    table = Table(title=f"{given.samples} stretches of {given.scored} bases", title_justify="left")
    for column in ("context", "bits a base", "saved", "±"):
        table.add_column(column, justify="right")
    for context, bits, gain, error in zip(found.contexts, found.mean, found.gain, found.gain_error, strict=True):
        table.add_row(f"{context:,}", f"{bits:.4f}", f"{gain:.4f}", f"{error:.4f}")
    Console().print(table)
    log.info("no context longer than %s saves more than twice its error", f"{found.useful:,}")
    output = Path(given.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    name = model.path.parent.parent.name or model.path.name
    curve(output, f"Reach of {name}", found.contexts, found.mean, found.gain_error)
    log.info("wrote %s", output)
    if given.json:
        runs.write_json(
            given.json,
            {
                "checkpoint": str(model.path),
                "contexts": found.contexts,
                "bits": found.mean.tolist(),
                "saved": found.gain.tolist(),
                "saved_error": found.gain_error.tolist(),
                "useful": found.useful,
                "samples": given.samples,
                "scored": given.scored,
                "trained_length": model.length,
            },
        )
        log.info("wrote %s", given.json)
    return 0


def measure(model: Model, genome: Genome, contexts: list[int], samples: int, scored: int, seed: int) -> Reach:
    """Bits a base of the same stretches with each context.

    Args:
        model: a causal language model.
        genome: where the stretches are.
        contexts: bases before a stretch that the model may see, ascending.
        samples: stretches.
        scored: bases of each.
        seed: names them.

    Raises:
        DataError: no contig has room for the longest context and a stretch.
    """
    places = _places(model, genome, contexts[-1], samples, scored, seed)
    bits = np.zeros((samples, len(contexts)))
    total = sum(context + scored for context in contexts) * samples
    with progress("Reading", total, "bases") as advance:
        for column, context in enumerate(contexts):
            rows = max(1, (1 << 18 if model.device.type == "cuda" else 1 << 15) // (context + scored))
            for first in range(0, samples, rows):
                part = places[first : first + rows]
                letters = np.stack([strand.read(at - context, at + scored) for strand, at in part])
                bits[first : first + rows, column] = _bits(model, letters, scored)
                advance(letters.size)
    return Reach(contexts, bits)


def _bits(model: Model, letters: NDArray[np.uint8], scored: int) -> NDArray[np.float64]:
    """``(n)`` bits a base of the last ``scored`` of each row, read in parts with the state carried."""
    tokens, targets = tokens_of(letters)[:, :-1], targets_of(letters)[:, -scored:]
    part = max(1, (1 << 18) // len(letters))
    edge = tokens.shape[1] - scored
    state = model.initial_state(len(letters))
    for start in range(0, edge, part):
        _, after = model.hidden(tokens[:, start : min(start + part, edge)], state)
        assert after is not None
        state = after
    values, _ = model.log_likelihood(tokens[:, edge:], targets, state)
    known = (targets >= 0).sum(dim=1).clamp(min=1)
    found: torch.Tensor = -values.double().cpu().sum(dim=1) / known / math.log(2)
    return found.numpy()


def _places(
    model: Model, genome: Genome, context: int, samples: int, scored: int, seed: int
) -> list[tuple[Strand, int]]:
    """Where the stretches begin, on both strands alike, all with room for the longest context before them."""
    held_out = regions_of(model.card, genome, ("validation", "test"))
    if held_out:
        log.info("stretches are of the regions held out in training")
    ranges = held_out or [(number, 0, contig.length) for number, contig in enumerate(genome.contigs)]
    rng = np.random.default_rng(seed)
    weights, fits = [], []
    for number, start, stop in ranges:
        contig = genome.contigs[number]
        for reverse in (False, True):
            strand = Strand(genome, number, reverse)
            low = strand.place(start, stop - start)
            high = low + stop - start - scored
            if not contig.circular:
                low = max(low, context)
                high = min(high, contig.length - scored)
            if high > low:
                weights.append(high - low)
                fits.append((strand, low, high))
    if not fits:
        raise DataError(
            f"no contig has room for {context:,} bases and a stretch of {scored:,} after them; give shorter --contexts"
        )
    chosen = rng.choice(len(fits), samples, p=np.array(weights) / sum(weights))
    found = []
    for number in chosen.tolist():
        strand, low, high = fits[number]
        for _ in range(100):
            at = int(rng.integers(low, high))
            if (targets_of(strand.read(at, at + scored)) >= 0).float().mean() > 0.5:  # not in the middle of N
                break
        found.append((strand, at))
    return found
