"""The verb ``seqlong seen``: whether a model was trained on a piece of sequence."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from seqlong.callbacks.checkpoints import DATA_KEY, read_checkpoint
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import CheckpointError
from seqlong.inference.arguments import Parser, integer
from seqlong.inference.model import find
from seqlong.inference.regions import Place, parse

log = logging.getLogger("seqlong")

HELP = """Says which bases of a region a model was trained, validated or tested on, by the data card in its checkpoint.

The card has the refget digest of every sequence of training (GA4GH, of the bases alone), so that a contig is known
under any name and in any file. A contig whose digest the card does not have may still share sequence with one that it
has: another assembly, a cut-out region, a relative. Then this says "unknown", never "no".

Exit status: 0, or 3 where it is unknown."""
EXAMPLES = """examples:
  seqlong seen chr7:1-2000 ref.fa --ckpt last
  seqlong seen NC_000913.3 ecoli.fa.gz --ckpt runs/my-run"""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Seen:
    """What a card says of a region.

    Attributes:
        known: whether the card has the contig's sequence.
        names: what training called it.
        bases: split -> bases of the region in it, each counted once.
        overlaps: split -> the parts of the region that are in it, from 0 on the contig, in order.
    """

    known: bool
    names: tuple[str, ...]
    bases: Mapping[str, int]
    overlaps: Mapping[str, list[tuple[int, int]]]


def command(words: Sequence[str]) -> int:
    """``seqlong seen``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("seen", HELP, EXAMPLES)
    parser.add_argument("region", help="CONTIG:START-STOP, from 1, or CONTIG")
    parser.add_argument("sequences", nargs="+", metavar="FASTA", help="where the region is: FASTA or GenBank")
    parser.add_argument("--ckpt", "--ckpt_path", required=True, metavar="C", help="as for seqlong score")
    parser.add_argument("--root", default="runs", metavar="FOLDER", help="where 'last' and 'best' look for runs")
    parser.add_argument("--shown", type=integer, default=5, help="parts to list of each split")
    given = parser.parse_args(list(words))
    path = find(given.ckpt, given.root)
    card = read_checkpoint(path, weights=False).get(DATA_KEY)
    if not card:
        from seqlong import runs

        card = runs.read_json(path.parent.parent / "data.json", None)
    if not isinstance(card, dict) or "sources" not in card:
        raise CheckpointError(f"{path} has no data card: its run did not tell what it was trained on")
    genome = Genome.open(given.sequences)
    place = parse(given.region, genome)
    found = look_up(card, genome, place)
    contig = genome.contigs[place.contig]
    screen = Console()
    if not found.known:
        screen.print(
            f"unknown: '{contig.name}' ({contig.digest}) is none of the {_count(card):,} sequences of training. "
            "Another assembly, a cut-out or a relative of it may have been",
            highlight=False,
        )
        return 3
    called = ", ".join(found.names)
    table = Table(title=f"{place.text}: {place.length:,} bases of '{called}' ({contig.digest})", title_justify="left")
    for heading in ("split", "bases", "share", "where"):
        table.add_column(heading, justify="right" if heading in ("bases", "share") else "left", overflow="fold")
    for split in SPLITS:
        parts = found.overlaps[split]
        shown = [f"{start + place.offset + 1:,}-{stop + place.offset:,}" for start, stop in parts[: given.shown]]
        more = f" and {len(parts) - given.shown:,} more" if len(parts) > given.shown else ""
        bases = found.bases[split]
        table.add_row(split, f"{bases:,}", f"{100 * bases / place.length:.1f} %", "; ".join(shown) + more)
    screen.print(table)
    verdict = {0: "none of it was trained on", place.length: "all of it was trained on"}
    screen.print(verdict.get(found.bases["train"], "some of it was trained on"), highlight=False)
    return 0


def look_up(card: Mapping[str, Any], genome: Genome, place: Place) -> Seen:
    """What ``card`` says of ``place``."""
    digest = genome.contigs[place.contig].digest
    names = _names(card, digest)
    overlaps: dict[str, list[tuple[int, int]]] = {}
    for split in SPLITS:
        parts = []
        for number, start, stop in regions_of(card, genome, (split,)):
            if number == place.contig:
                low, high = max(start, place.start), min(stop, place.stop)
                if low < high:
                    parts.append((low, high))
        overlaps[split] = _merged(parts)
    bases = {split: sum(stop - start for start, stop in parts) for split, parts in overlaps.items()}
    return Seen(bool(names), tuple(names), bases, overlaps)


def regions_of(card: Mapping[str, Any], genome: Genome, splits: Sequence[str]) -> list[tuple[int, int, int]]:
    """The regions of some splits as ``(contig of genome, start, stop)``, for the contigs that the card knows by digest.

    A region of a ring that passes its end comes as two.
    """
    regions = (card.get("split") or {}).get("regions") or {}
    found = []
    for number, contig in enumerate(genome.contigs):
        names = _names(card, contig.digest)
        for split in splits:
            for name, start, stop in regions.get(split) or []:
                if name in names:
                    found.append((number, int(start), min(int(stop), contig.length)))
                    if stop > contig.length:
                        found.append((number, 0, int(stop) - contig.length))
    return [(number, start, stop) for number, start, stop in found if start < stop]


def _names(card: Mapping[str, Any], digest: str) -> list[str]:
    """What training called the sequence of this digest."""
    sources = card.get("sources") or []
    return [record["name"] for source in sources for record in source.get("records", []) if record["digest"] == digest]


def _count(card: Mapping[str, Any]) -> int:
    return sum(len(source.get("records", [])) for source in card.get("sources") or [])


def _merged(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found
