"""The verb ``seqlong attribute``: which bases matter, as a logo."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqlong import runs
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError
from seqlong.inference.arguments import Parser, integer, open_model, progress, require_bases
from seqlong.inference.attribution import gradients, mutagenesis
from seqlong.inference.logo import draw
from seqlong.inference.regions import parse
from seqlong.inference.strands import Strand
from seqlong.inference.variants import Window

log = logging.getLogger("seqlong")

HELP = """Shows which bases of a region a model's opinion hangs on, as a logo above a map of all changes.

ism: every base is changed to each other one and scored as a variant (see seqlong score): the logo has, for each base,
the mean loss of likelihood in nats if it is changed. gradient: the same to first order, from one backward pass on each
strand, without the likelihood of the base itself."""
EXAMPLES = """examples:
  seqlong attribute chr7:5530000-5530120 ref.fa --ckpt last --output promoter.png
  seqlong attribute NC_001416.1:35000-35400 lambda.fa.gz --ckpt last --method gradient --window 16384 --tsv g.tsv"""


def command(words: Sequence[str]) -> int:
    """``seqlong attribute``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("attribute", HELP, EXAMPLES)
    parser.add_argument("region", help="CONTIG:START-STOP, from 1")
    parser.add_argument("sequences", nargs="+", metavar="FASTA", help="FASTA or GenBank, plain, gzip or bgzip")
    parser.add_model()
    parser.add_argument("--method", choices=("ism", "gradient"), default="ism", help="change bases, or differentiate")
    parser.add_argument("--window", type=integer, default=2048, help="bases that are scored around each; 2048")
    parser.add_argument("--output", default="attribution.png", metavar="FILE", help="PNG; attribution.png if left out")
    parser.add_argument("--tsv", metavar="FILE", help="the numbers too")
    given = parser.parse_args(list(words))
    if not given.output.endswith(".png"):
        raise ConfigError(f"--output is '{given.output}'; expected a name that ends in .png")
    window = Window(given.window)
    model = open_model(given)
    model.require("causal", "masked", why="attribute")
    require_bases(model, "attribute")
    genome = Genome.open(given.sequences)
    place = parse(given.region, genome)
    strand = Strand(genome, place.contig)
    if given.method == "gradient" and getattr(model.backbone, "strands", None) is not None:
        raise ConfigError("gradients are of one strand, but this model reads both at once; use --method ism")
    if given.method == "gradient" and place.length > window.length:
        raise ConfigError(
            f"the region has {place.length:,} bases, the window {window.length:,}; give a --window as long"
        )
    if given.method == "ism":
        with progress("Changing bases", place.length, "bases") as advance:
            effects = mutagenesis(model, strand, place.start, place.stop, window, advance=advance)
    else:
        effects = gradients(model, strand, place.start, place.stop, window)
    letters = strand.read(place.start, place.stop).tobytes().decode().upper().replace("U", "T")
    heights = importance(letters, effects)
    first = place.start + place.offset + 1
    output = Path(given.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    method = "in-silico mutagenesis" if given.method == "ism" else "gradients"
    effect = "ln p(change) - ln p" if given.method == "ism" else "gradient · change"
    draw(output, f"{given.region}, {method}, {model.path.parent.parent.name or model.path.name}", letters, heights,
         effects, first, "loss if changed (nats)", effect)  # fmt: skip
    log.info("wrote %s", output)
    if given.tsv:
        lines = ["position\tbase\timportance\tA\tC\tG\tT"]
        for number, (letter, height, row) in enumerate(zip(letters, heights, effects, strict=True)):
            lines.append("\t".join([str(first + number), letter, *(f"{value:.6g}" for value in (height, *row))]))
        runs.atomic_write(given.tsv, "\n".join(lines) + "\n")
        log.info("wrote %s", given.tsv)
    return 0


def importance(letters: str, effects: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(t 4)`` effects -> ``(t)``: minus the mean of the three changes of each base; 0 where it is not known."""
    found = np.zeros(len(letters))
    for place, letter in enumerate(letters):
        if letter in "ACGT":
            others = [base for base in range(4) if "ACGT"[base] != letter]
            found[place] = -effects[place, others].mean()
    return np.nan_to_num(found)
