"""The verb ``seqlong score``: variants of a VCF, annotated with how likely a model finds them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError, DataError
from seqlong.inference.arguments import Parser, integer, integers, open_model, progress, require_bases
from seqlong.inference.contigs import Contigs
from seqlong.inference.haplotypes import Person, chosen, on_haplotype, open_person
from seqlong.inference.journal import Journal, identity
from seqlong.inference.model import Model
from seqlong.inference.strands import Strand
from seqlong.inference.truth import Truth
from seqlong.inference.variants import Indels, Window, score
from seqlong.inference.vcf import Allele, alleles, annotate, records, survey

log = logging.getLogger("seqlong")

HELP = """Scores the variants of a VCF without any training: ln p(window with ALT) - ln p(window with REF), in nats, the
mean of both strands. Below 0: less likely than the reference. Causal models count every base of the window, of which
those before the variants are read once for all alleles; masked models the bases of the allele, hidden.

Every record is written again, in its order. An allele that has no score says why in SL_STATUS. REF is checked against
the reference first, for the whole file. A command that was stopped goes on where it was when it is given again."""
EXAMPLES = """examples:
  seqlong score variants.vcf.gz --ref ref.fa --ckpt last
  seqlong score variants.vcf.gz --ref ref.fa --ckpt runs/my-run --window 8192,65536 --output out.vcf.gz --tsv out.tsv
  seqlong score clinvar.vcf.gz --ref hg38.fa.gz --ckpt best --ref-mismatch skip --truth CLNSIG=Pathogenic"""


@dataclass(frozen=True)
class Settings:
    """How variants are scored.

    Attributes:
        windows: what is scored around each, one column for each.
        indels: see ``seqlong.inference.variants.score``.
        batch_tokens: positions to run at once.
        batch: records to score, and to save, together.
        renamed: contigs of the VCF -> those of the reference.
    """

    windows: tuple[Window, ...]
    indels: Indels = "calibrated"
    batch_tokens: int = 65536
    batch: int = 256
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Bases of the longest allele that every window has room for."""
        return min(window.longest for window in self.windows)


def command(words: Sequence[str]) -> int:
    """``seqlong score``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("score", HELP, EXAMPLES)
    parser.add_argument("variants", metavar="VCF", help="VCF or BCF, plain or bgzip")
    parser.add_argument("--ref", required=True, nargs="+", metavar="FASTA", help="the reference: FASTA or GenBank")
    parser.add_model()
    parser.add_argument(
        "--window", type=integers, default=[8192], help="bases of a window; several with commas: 8192,65536"
    )
    parser.add_argument("--after", type=integer, default=0, help="of them from the variant on; half if left out")
    parser.add_argument("--output", metavar="FILE", help=".vcf.gz or .vcf; VCF's name.scored.vcf.gz if left out")
    parser.add_argument("--tsv", metavar="FILE", help="a table too: a row for each allele, each strand by itself")
    parser.add_argument("--ref-mismatch", choices=("raise", "skip"), default="raise", help="what to do with such REFs")
    parser.add_argument(
        "--indels",
        choices=("calibrated", "window"),
        default="calibrated",
        help="set bases that an allele has more or less against the mean base, or against those at the window's end",
    )
    parser.add_argument(
        "--sample", metavar="NAME", help="score on the phased haplotypes of a sample of the VCF, with all they carry"
    )
    parser.add_argument("--circular", nargs="*", default=(), metavar="CONTIG", help="contigs that are rings")
    parser.add_argument("--rename", nargs="+", default=(), metavar="A=B", help="VCF's contig A is the reference's B")
    parser.add_argument("--truth", metavar="FIELD=VALUE", help="INFO that says which are damaging: prints the AUROC")
    parser.add_argument("--batch-tokens", type=integer, help="positions to run at once; by itself: up to 524,288")
    given = parser.parse_args(list(words))
    windows = tuple(Window(length, given.after) for length in given.window)
    renamed = dict(text.partition("=")[::2] for text in given.rename)
    if not all(renamed) or not all(renamed.values()):
        raise ConfigError(f"--rename is '{' '.join(given.rename)}'; expected VCF's name=reference's name, as MT=rCRS")
    truth = Truth.parse(given.truth) if given.truth else None
    model = open_model(given)
    model.require("causal", "masked", why="score")
    require_bases(model, "score")
    gpu = model.device.type == "cuda"
    settings = Settings(
        windows,
        given.indels,
        given.batch_tokens or default_batch(model),
        batch=2048 if gpu else 256,
        renamed=renamed,
    )
    genome = Genome.open(given.ref, circular=list(given.circular))
    name = Path(given.variants).name.removesuffix(".gz").removesuffix(".vcf").removesuffix(".bcf")
    if given.output and not given.output.endswith((".vcf", ".vcf.gz")):
        raise ConfigError(f"--output is '{given.output}'; expected a name that ends in .vcf.gz or .vcf")
    output = Path(given.output or f"{name}.scored.vcf.gz") if given.output or not given.tsv else None
    score_file(
        model, genome, Path(given.variants), settings, output, given.tsv, given.ref_mismatch, truth, given.sample
    )
    return 0


def default_batch(model: Model) -> int:
    """Positions to run at once: as many as tens of GiB hold on a GPU, as many as caches like on a CPU."""
    if model.device.type != "cuda":
        return 16384
    return min(524288, max(8192, (1 << 29) // model.width))


def score_file(
    model: Model,
    genome: Genome,
    source: Path,
    settings: Settings,
    output: Path | None,
    tsv: str | Path | None = None,
    ref_mismatch: Literal["raise", "skip"] = "raise",
    truth: Truth | None = None,
    sample: str | None = None,
) -> None:
    """Score a VCF; see ``HELP``.

    Args:
        model: a causal or masked language model.
        genome: the reference.
        source: VCF or BCF.
        settings: how.
        output: annotated VCF or BCF; None for none.
        tsv: table; None for none.
        ref_mismatch: what to do with records whose REF is not the reference's: an error, or no score for them.
        truth: which variants are damaging, to say how well the scores tell; None where nobody knows.
        sample: whose haplotypes the windows are of; None for the reference.

    Raises:
        DataError: the VCF cannot be read or used with this reference.
    """
    tally, contigs = survey(source, genome, settings.longest, settings.renamed)
    for line in tally.lines(contigs):
        log.info("%s", line)
    if tally.counts["ref_mismatch"] and ref_mismatch == "raise":
        raise DataError(
            f"{source}: {tally.counts['ref_mismatch']:,} of {tally.alleles:,} alleles have a REF that is not in the "
            f"reference: {'; '.join(tally.examples['ref_mismatch'])}. Is it the same assembly? Give the right --ref, "
            "or --ref-mismatch skip to leave them without a score"
        )
    if not tally.counts["ok"]:
        raise DataError(f"{source}: none of its {tally.alleles:,} alleles can be scored; see the lines above")
    person = open_person(source, sample, contigs, settings.longest) if sample else None
    for line in person.lines() if person else ():
        log.info("%s", line)
    for window in settings.windows:
        if model.length and window.length > model.length:
            log.info(
                "windows of %s are longer than the rows of training, %s", f"{window.length:,}", f"{model.length:,}"
            )
    targets = [Path(path) for path in (output, tsv) if path]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    partial = targets[0].with_name(f".{targets[0].name}.partial")
    with Journal(partial, _asked(model, genome, source, settings, ref_mismatch, sample)) as journal:
        if journal.done:
            log.info("going on after %s of %s records", f"{journal.done:,}", f"{tally.records:,}")
        _score_all(model, source, contigs, settings, journal, tally.records, person)
        if output:
            note = f"score --ckpt {model.path.name} ({type(model.task).__name__}), reference {_names(genome)}"
            note += f", haplotypes of {sample}" if sample else ""
            if annotate(source, output, _described(settings), [note], _values(journal, settings)):
                log.info("wrote %s and its index", output)
            else:
                log.info("wrote %s", output)
        if tsv:
            _write_table(Path(tsv), source, settings, journal)
            log.info("wrote %s", tsv)
        _summarise(source, settings, journal, tally, truth)
        journal.remove()


def score_alleles(model: Model, genome: Genome, found: Sequence[Allele], settings: Settings) -> NDArray[np.float64]:
    """``(n w 2)`` scores of alleles in each window and on each strand, forward first; NaN for those without one."""
    result = np.full((len(found), len(settings.windows), 2), np.nan)
    by_contig: dict[int, list[int]] = {}
    for number, allele in enumerate(found):
        if allele.variant is not None:
            by_contig.setdefault(allele.contig, []).append(number)
    for contig, numbers in by_contig.items():
        for place, reverse in enumerate((False, True)):
            strand = Strand(genome, contig, reverse)
            variants = [variant.on(strand) for n in numbers if (variant := found[n].variant) is not None]
            for column, window in enumerate(settings.windows):
                result[numbers, column, place] = score(
                    model, strand, variants, window, settings.indels, settings.batch_tokens
                )
    return result


def score_on_haplotypes(
    model: Model, person: Person, contigs: Contigs, several: Sequence[Any], found: Sequence[Allele], settings: Settings
) -> tuple[list[Allele], NDArray[np.float64]]:
    """The same as ``score_alleles`` in windows of a person's chromosomes, which hold their other variants too.

    An allele is scored on the chromosomes that carry it, else on all; the mean if there are two.

    Returns:
        The alleles, those without a place on any chromosome with another status; and their scores.
    """
    asked: list[list[Allele]] = [[] for _ in person.haplotypes]
    parts: list[list[tuple[int, int, int]]] = []  # of each allele: chromosome, and the rows to add and to take away
    result = list(found)
    rows = iter(range(len(found)))
    for record in several:
        for alt in record.alts or (".",):
            number, terms = next(rows), []
            place = contigs.find(record.chrom, record.pos - 1)
            if found[number].variant is not None and place is not None:
                start = record.pos - 1 - place.offset
                ref, text = record.ref.upper().encode(), alt.upper().encode()
                ways = [on_haplotype(one, place.contig, start, ref, text) for one in person.haplotypes]
                for side in chosen([None if way is None else way[2] for way in ways]):
                    way, pair = ways[side], []
                    assert way is not None
                    for variant in way[:2]:
                        pair.append(-1 if variant is None else len(asked[side]))
                        if variant is not None:
                            asked[side].append(Allele("ok", place.contig, variant))
                    terms.append((side, pair[0], pair[1]))
                if not terms:
                    result[number] = Allele("on_deleted")
            parts.append(terms)
    values = [
        score_alleles(model, one, several_, settings) for one, several_ in zip(person.haplotypes, asked, strict=True)
    ]
    scores = np.full((len(found), len(settings.windows), 2), np.nan)
    for number, terms in enumerate(parts):
        if terms:
            scores[number] = sum(
                (values[side][a] if a >= 0 else 0.0) - (values[side][z] if z >= 0 else 0.0) for side, a, z in terms
            ) / len(terms)
    return result, scores


def _score_all(
    model: Model,
    source: Path,
    contigs: Contigs,
    settings: Settings,
    journal: Journal,
    total: int,
    person: Person | None = None,
) -> None:
    with progress("Scoring", total, "records", journal.done) as advance:
        done = journal.done
        for several in _batched(islice(records(source), done, None), settings.batch):
            found = [alleles(record, contigs, settings.longest) for record in several]
            flat = [one for line in found for one in line]
            try:
                if person is None:
                    values = score_alleles(model, contigs.genome, flat, settings)
                else:
                    flat, values = score_on_haplotypes(model, person, contigs, several, flat, settings)
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"the GPU has too little memory for batches of {settings.batch_tokens:,} positions; give "
                    f"--batch-tokens {max(1024, settings.batch_tokens // 4)}. What is done already is kept"
                ) from error
            rows, scored = iter(values.reshape(len(values), -1)), iter(flat)
            lines = []
            for number, line in enumerate(found):
                for allele in islice(scored, len(line)):
                    numbers = "\t".join(f"{value:.9g}" for value in next(rows))
                    lines.append(f"{done + number}\t{allele.status}\t{numbers}")
            done += len(several)
            journal.add(lines, done)
            advance(len(several))


def _batched(source: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(source, size)):
        yield part


def _asked(
    model: Model, genome: Genome, source: Path, settings: Settings, ref_mismatch: str, sample: str | None
) -> dict[str, Any]:
    """What makes the scores what they are."""
    return {
        "vcf": identity(source),
        "checkpoint": identity(model.path),
        "reference": [store.digest[:16] for store in genome.stores],
        "renamed": dict(settings.renamed),
        "circular": [contig.name for contig in genome.contigs if contig.circular],
        "windows": [[window.length, window.after] for window in settings.windows],
        "indels": settings.indels,
        "ref_mismatch": ref_mismatch,
        "precision": model.precision,
        "sample": sample,
    }


def _names(genome: Genome) -> str:
    return ", ".join(store.path.name for store in genome.stores)


def _described(settings: Settings) -> dict[str, str]:
    return {
        f"SL_LLR_{window.length}": f"ln p(ALT) - ln p(REF) in nats, mean of both strands, in {window.length} bases; "
        "below 0 is less likely than the reference"
        for window in settings.windows
    }


def _scores(journal: Journal) -> Iterator[tuple[list[str], NDArray[np.float64]]]:
    """For each record the statuses of its alleles, and ``(n w 2)`` scores."""
    record, statuses, rows = "", [], []  # type: ignore[var-annotated]
    for line in journal.lines():
        number, status, *values = line.split("\t")
        if number != record and statuses:
            yield statuses, np.array(rows).reshape(len(rows), -1, 2)
            statuses, rows = [], []
        record = number
        statuses.append(status)
        rows.append([float(value) for value in values])
    if statuses:
        yield statuses, np.array(rows).reshape(len(rows), -1, 2)


def _values(journal: Journal, settings: Settings) -> Iterator[tuple[list[str], list[list[float | None]]]]:
    for statuses, values in _scores(journal):
        means = values.mean(axis=2).T
        yield statuses, [[None if np.isnan(value) else float(value) for value in column] for column in means]


def _write_table(target: Path, source: Path, settings: Settings, journal: Journal) -> None:
    """A row for each allele; written whole or not at all."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            columns = [f"{what}_{w.length}" for w in settings.windows for what in ("llr", "forward", "reverse")]
            file.write("\t".join(["chrom", "pos", "id", "ref", "alt", "status", *columns]) + "\n")
            for record, (statuses, values) in zip(records(source), _scores(journal), strict=True):
                for alt, status, row in zip(record.alts or (".",), statuses, values, strict=True):
                    numbers = [number for pair in row for number in (pair.mean(), *pair)]
                    shown = ["." if np.isnan(number) else f"{number:.6g}" for number in numbers]
                    head = [record.chrom, str(record.pos), record.id or ".", record.ref, alt, status]
                    file.write("\t".join([*head, *shown]) + "\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _summarise(source: Path, settings: Settings, journal: Journal, tally: Any, truth: Truth | None) -> None:
    """Means and spreads, how far the strands agree, and how well the truth is told."""
    sums = np.zeros((len(settings.windows), 6))  # n, x, x², f², r², f·r of the two strands
    for record, (_, values) in zip(records(source), _scores(journal), strict=True):
        if truth is not None:
            truth.add(record, values.mean(axis=2))
        kept = values[~np.isnan(values).any(axis=(1, 2))]
        forward, reverse, mean = kept[..., 0], kept[..., 1], kept.mean(axis=2)
        parts = (np.ones_like(mean), mean, mean**2, forward**2, reverse**2, forward * reverse)
        sums += np.stack([part.sum(axis=0) for part in parts], axis=1)
    table = Table(title=f"{tally.counts['ok']:,} of {tally.alleles:,} alleles scored", title_justify="left")
    for column in ("window", "mean LLR", "deviation", "strands agree"):
        table.add_column(column, justify="right")
    for window, (count, total, square, forward, reverse, both) in zip(settings.windows, sums, strict=True):
        deviation = max(0.0, square / count - (total / count) ** 2) ** 0.5
        agree = both / (forward * reverse) ** 0.5 if forward and reverse else float("nan")
        table.add_row(f"{window.length:,}", f"{total / count:.3f}", f"{deviation:.3f}", f"{agree:.3f}")
    screen = Console()
    screen.print(table)
    if truth is not None:
        screen.print(truth.table([window.length for window in settings.windows]))
