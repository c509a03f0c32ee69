"""The verb ``seqlong check-rc``: what a model makes of a sequence and of its reverse complement."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from seqlong import runs
from seqlong.datamodules.dna.alphabet import reverse_complement
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import DataError
from seqlong.inference.arguments import Parser, integer, open_model, require_bases
from seqlong.inference.model import Model
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.inference.variants import Variant, Window, score

log = logging.getLogger("seqlong")

HELP = """Compares a model on windows and on their reverse complements, in float64 or whatever --precision says:

  equivariance   the logits of a base and of its partner on the other strand (masked models: can be exact)
  likelihood     ln p of a whole window and of its reverse complement, a base (causal models: the same if it had learnt
                 that both strands are one)
  variants       the mean of both strands, as seqlong score writes it, on a genome and on its reverse complement: exact

It proves what it says exact, to rounding, and measures the rest. Exit status 1 if what must be exact is not."""
EXAMPLES = """examples:
  seqlong check-rc --ckpt last
  seqlong check-rc --ckpt runs/my-run --sequences ref.fa --windows 32 --length 4096 --json rc.json"""
#: Complements of the sixteen tokens: A and T, C and G change places.
_PARTNERS = [0, 1, 2, 3, 7, 6, 5, 4, *range(8, 16)]


@dataclass
class Check:
    """Figures of ``windows`` windows of ``length`` bases.

    Attributes:
        equivariance: the largest difference of logits, of those of the first strand's largest; NaN for causal models,
            which see other sides of a base on either strand.
        likelihood: mean absolute difference of ``ln p`` a base, nats; NaN for masked models.
        correlation: of the windows' ``ln p`` on both strands; NaN for masked models.
        variants: the largest difference of a variant's score, nats.
        scale: the mean absolute score of a variant, nats.
    """

    windows: int
    length: int
    equivariance: float = math.nan
    likelihood: float = math.nan
    correlation: float = math.nan
    variants: float = math.nan
    scale: float = math.nan


def command(words: Sequence[str]) -> int:
    """``seqlong check-rc``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("check-rc", HELP, EXAMPLES)
    parser.add_model()
    parser.add_argument("--sequences", nargs="+", default=["ecoli"], metavar="FASTA", help="E. coli K-12 if left out")
    parser.add_argument("--windows", type=integer, default=16, help="windows to compare; 16 if left out")
    parser.add_argument("--length", type=integer, default=1024, help="bases of a window; 1024 if left out")
    parser.add_argument("--seed", type=int, default=0, help="names the windows")
    parser.add_argument("--json", metavar="FILE", help="the numbers too")
    given = parser.parse_args(list(words))
    if given.precision == "auto" and given.device in ("auto", "cpu") and not torch.cuda.is_available():
        given.precision = "float64"
    model = open_model(given)
    model.require("causal", "masked", why="check-rc")
    require_bases(model, "check-rc")
    found = check(model, Genome.open(given.sequences), given.windows, given.length, given.seed)
    limit = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.3}[model.precision]
    table = Table(title=f"{found.windows} windows of {found.length:,} bases", title_justify="left")
    for heading in ("what", "found", "means"):
        table.add_column(heading, overflow="fold")
    if model.kind == "masked":
        exact = found.equivariance < max(limit, 1e-6)
        table.add_row(
            "equivariance", f"{found.equivariance:.2e} of the largest logit",
            "equivariant, to rounding" if exact else "not equivariant: average both strands",
        )  # fmt: skip
    else:
        table.add_row(
            "likelihood", f"{found.likelihood:.4f} nats a base apart, correlation {found.correlation:.3f}",
            "two estimates of one likelihood: average both strands",
        )  # fmt: skip
    good = found.variants <= limit * max(1.0, found.scale)
    table.add_row(
        "variants", f"{found.variants:.2e} nats apart, of {found.scale:.3f}",
        "invariant, to rounding" if good else "NOT invariant: this is a bug of ours",
    )  # fmt: skip
    Console().print(table)
    if given.json:
        runs.write_json(given.json, {"checkpoint": str(model.path), "precision": model.precision, **vars(found)})
        log.info("wrote %s", given.json)
    return 0 if good else 1


def check(model: Model, genome: Genome, windows: int, length: int, seed: int = 0) -> Check:
    """Compare; see ``HELP``.

    Raises:
        DataError: no contig is as long as a window.
    """
    fits = [number for number, contig in enumerate(genome.contigs) if contig.length >= length]
    if not fits:
        raise DataError(f"no contig has {length:,} bases; give a shorter --length, or other --sequences")
    rng = np.random.default_rng(seed)
    found = Check(windows, length)
    differences, both, worst = [], [], 0.0
    for _ in range(windows):
        number = int(rng.choice(fits))
        start = int(rng.integers(0, genome.contigs[number].length - length + 1))
        strand, other = Strand(genome, number), Strand(genome, number, True)
        forward = strand.read(start, start + length)
        back = other.place(start, length)
        reverse = other.read(back, back + length)
        if model.kind == "masked":
            worst = max(worst, _equivariance(model, tokens_of(forward), tokens_of(reverse)))
        else:
            pair = [_likelihood(model, tokens_of(each), targets_of(each)) for each in (forward, reverse)]
            both.append(pair)
            differences.append(abs(pair[0] - pair[1]))
    if model.kind == "masked":
        found.equivariance = worst
    else:
        found.likelihood = float(np.mean(differences))
        if windows > 1:
            found.correlation = float(np.corrcoef(np.array(both).T)[0, 1])
    found.variants, found.scale = _variants(model, genome, fits[0], length, rng)
    return found


def _equivariance(model: Model, forward: Tensor, reverse: Tensor) -> float:
    """Largest difference of logits, turned round and with bases exchanged, over the largest logit."""
    one, _ = model.logits(forward[None])
    two, _ = model.logits(reverse[None])
    size = one.shape[-1]
    partners = torch.tensor(_PARTNERS[:size] + list(range(len(_PARTNERS), size)), device=two.device)
    turned = two.flip(1)[..., partners]
    bases = slice(4, 8)
    return float((one - turned)[..., bases].abs().max() / one[..., bases].abs().max())


def _likelihood(model: Model, tokens: Tensor, targets: Tensor) -> float:
    """``ln p`` a base of all but the first."""
    values, _ = model.log_likelihood(tokens[None, :-1], targets[None, 1:])
    return float(values.double().sum()) / max(1, int((targets[1:] >= 0).sum()))


class _Turned(Genome):
    """A genome whose contigs are the reverse complements of another's."""

    def __init__(self, genome: Genome) -> None:
        super().__init__(genome.stores)

    def read(self, number: int, start: int, stop: int) -> NDArray[np.uint8]:
        length = self.contigs[number].length
        return reverse_complement(super().read(number, length - stop, length - start))


def _variants(model: Model, genome: Genome, contig: int, length: int, rng: np.random.Generator) -> tuple[float, float]:
    """The largest difference between the scores of eight variants and of the same in the reverse complement of the
    genome; and the mean size of a score."""
    strand = Strand(genome, contig)
    variants = []
    for start in rng.integers(0, strand.length, 8).tolist():
        ref = strand.read(start, start + 1).tobytes().upper()
        if ref in (b"A", b"C", b"G", b"T"):
            variants.append(Variant(start, ref, [b for b in (b"A", b"C", b"G", b"T") if b != ref][start % 3]))
    if not variants:
        return 0.0, 0.0
    window, turned = Window(max(16, length)), _Turned(genome)
    there = [variant.on(Strand(genome, contig, True)) for variant in variants]
    means = []
    for owner, asked in ((genome, variants), (turned, there)):
        strands = [Strand(owner, contig, reverse) for reverse in (False, True)]
        means.append(np.mean([score(model, one, [each.on(one) for each in asked], window) for one in strands], axis=0))
    return float(np.abs(means[0] - means[1]).max()), float(np.abs(means[0]).mean())
