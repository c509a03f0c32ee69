"""The verb ``seqlong variants``: which variants are damaging, learnt from labelled ones on a frozen model."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from seqlong.datamodules.dna.cache import default_cache_dir
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError, DataError, located, nearest
from seqlong.inference.arguments import Parser, integer, integers, open_model, progress, require_bases
from seqlong.inference.contigs import Contigs
from seqlong.inference.journal import identity
from seqlong.inference.model import Model
from seqlong.inference.score import default_batch
from seqlong.inference.strands import Strand
from seqlong.inference.truth import auroc, numbers
from seqlong.inference.variant_heads import (
    Group,
    Head,
    check_folds,
    fit_head,
    folds_of,
    groups_of,
    held_out,
    interval,
    load_head,
    plain_features,
    save_head,
)
from seqlong.inference.variant_states import differences
from seqlong.inference.variants import Variant, Window, score
from seqlong.inference.vcf import alleles, annotate, records, survey

log = logging.getLogger("seqlong")

HELP = """Learns from labelled variants which are damaging. A model reads each with ALT and with REF, on both strands; a
penalised logistic regression learns from what changes in its hidden states, and in the likelihood. The model stays as
it is, and what it says is kept on disk, so that another call on the same file takes seconds.

Every variant is predicted by a head that was fitted without its fold; variants at one position are never in two folds.
Beside the AUROC, with its 95 % interval, stand the likelihood alone, every number that the VCF holds, and a floor that
knows no sequence: which base became which, and where. The VCF is written again with the predictions; variants without a
label get those of a head fitted on all labels."""
EXAMPLES = """examples:
  seqlong variants brca1.vcf --ref chr17.fa.gz --ckpt last --label CLASS=LOF --output brca1.out.vcf.gz
  seqlong variants my.vcf.gz --ref ref.fa --ckpt last --labels t.tsv --label effect=bad:good --group block --save h.npz
  seqlong variants new.vcf.gz --ref ref.fa --ckpt last --head h.npz --output new.out.vcf.gz"""


@dataclass(frozen=True)
class Label:
    """``FIELD=BAD`` or ``FIELD=BAD:GOOD``: which values of a field are damaging, and which are not (all others)."""

    name: str
    bad: frozenset[str]
    good: frozenset[str] | None

    @staticmethod
    def parse(text: str) -> Label:
        """Several values are joined by commas."""
        name, equals, rest = text.partition("=")
        bad, colon, good = rest.partition(":")
        if not equals or not name or not bad or (colon and not good):
            raise ConfigError(f"--label is '{text}'; expected FIELD=BAD or FIELD=BAD:GOOD, such as CLASS=LOF:FUNC")
        return Label(name, frozenset(bad.split(",")), frozenset(good.split(",")) if colon else None)

    def of(self, values: Sequence[str]) -> int:
        """1 damaging, 0 not, -1 unknown."""
        if self.bad.intersection(values):
            return 1
        known = (
            bool(self.good.intersection(values)) if self.good is not None else any(v not in ("", ".") for v in values)
        )
        return 0 if known else -1


@dataclass
class Found:
    """Alleles of a VCF that can be read, and what is known of them.

    Attributes:
        variants: on the forward strand.
        contig, start: where each is.
        label: 1 damaging, 0 not, -1 unknown.
        statuses: of every allele of every record, those that cannot be read too.
        others: numbers that the VCF holds, by field.
    """

    variants: list[Variant] = field(default_factory=list)
    contig: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    statuses: list[list[str]] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)


def command(words: Sequence[str]) -> int:
    """``seqlong variants``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("variants", HELP, EXAMPLES)
    parser.add_argument("variants", metavar="VCF", help="VCF or BCF, plain or bgzip")
    parser.add_argument("--ref", required=True, nargs="+", metavar="FASTA", help="the reference: FASTA or GenBank")
    parser.add_model()
    parser.add_argument("--label", metavar="FIELD=BAD[:GOOD]", help="INFO field, or column, and its damaging values")
    parser.add_argument("--labels", metavar="TSV", help="a table of labels instead: chrom, pos, ref, alt and FIELD")
    parser.add_argument("--head", metavar="FILE", help="predict with a head that was saved, instead of fitting one")
    parser.add_argument("--save", metavar="FILE", help="save the head that was fitted on all labels, as .npz")
    parser.add_argument("--folds", type=integer, default=5, help="parts that are predicted by the others; 5")
    parser.add_argument(
        "--group", choices=("position", "block", "contig"), default="position", help="what folds do not part; position"
    )
    parser.add_argument("--window", type=integer, default=8192, help="bases around a variant; 8192")
    parser.add_argument("--spans", type=integers, default=[16, 128], help="bases behind it whose states count; 16,128")
    parser.add_argument("--output", metavar="FILE", help=".vcf.gz or .vcf; VCF's name.predicted.vcf.gz if left out")
    parser.add_argument("--ref-mismatch", choices=("raise", "skip"), default="raise", help="what to do with such REFs")
    parser.add_argument("--circular", nargs="*", default=(), metavar="CONTIG", help="contigs that are rings")
    parser.add_argument("--rename", nargs="+", default=(), metavar="A=B", help="VCF's contig A is the reference's B")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    given = parser.parse_args(list(words))
    if bool(given.label) == bool(given.head):
        raise ConfigError(
            "give --label FIELD=BAD to learn from labels, or --head FILE to predict with a head; one of them"
        )
    if given.folds < 2:
        raise ConfigError(f"--folds is {given.folds}; expected 2 or more")
    renamed = dict(text.partition("=")[::2] for text in given.rename)
    label = Label.parse(given.label) if given.label else None
    name = Path(given.variants).name.removesuffix(".gz").removesuffix(".vcf").removesuffix(".bcf")
    output = Path(given.output or f"{name}.predicted.vcf.gz")
    if not output.name.endswith((".vcf", ".vcf.gz")):
        raise ConfigError(f"--output is '{output}'; expected a name that ends in .vcf.gz or .vcf")
    model = open_model(given)
    require_bases(model, "variants")
    spans = tuple(sorted(set(given.spans)))
    window = Window(given.window, min(given.window // 2, max(256, 2 * max(spans))))
    genome = Genome.open(given.ref, circular=list(given.circular))
    source = Path(given.variants)
    tally, contigs = survey(source, genome, window.longest, renamed)
    for line in tally.lines(contigs):
        log.info("%s", line)
    if tally.counts["ref_mismatch"] and given.ref_mismatch == "raise":
        raise DataError(
            f"{source}: {tally.counts['ref_mismatch']:,} of {tally.alleles:,} alleles have a REF that is not in the "
            f"reference: {'; '.join(tally.examples['ref_mismatch'])}. Is it the same assembly? Give the right --ref, "
            "or --ref-mismatch skip to leave them out"
        )
    if not tally.counts["ok"]:
        raise DataError(f"{source}: none of its {tally.alleles:,} alleles can be read; see the lines above")
    table = read_labels(Path(given.labels), label, contigs) if given.labels and label else None
    found = gather(source, contigs, window.longest, label, table)
    features = embedded(model, genome, found, window, spans, source)
    facts = json.dumps({"window": window.length, "spans": list(spans), "features": features.shape[1]})
    if label is None:
        head, made = load_head(given.head)
        if made != facts:
            raise ConfigError(
                f"{given.head} was fitted with {made}, but this call has {facts}; give the same flags and model"
            )
        answers = head.logits(features)
        words_ = f"by the head {Path(given.head).name}"
    else:
        answers, head = learn(model, found, features, given.folds, given.group, given.seed)
        words_ = f"of {given.label}; where there is a label, by a head fitted without its fold"
    output.parent.mkdir(parents=True, exist_ok=True)
    if given.save:
        Path(given.save).parent.mkdir(parents=True, exist_ok=True)
        save_head(given.save, head, facts)
        log.info("wrote %s", given.save)
    note = f"variants --ckpt {model.path.name} ({type(model.task).__name__})"
    annotate(source, output, {"SL_DAMAGING": f"Probability {words_}"}, [note], _values(found, answers))
    log.info("wrote %s", output)
    return 0


def read_labels(path: Path, label: Label, contigs: Contigs) -> dict[tuple[int, int, str, str], int]:
    """Labels of a table, by contig, position from 0, REF and ALT.

    Raises:
        DataError: no such file or column, a position that is none; with the line.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; expected a table with columns chrom, pos, ref, alt, {label.name}")
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    found: dict[tuple[int, int, str, str], int] = {}
    with (gzip.open if packed else open)(path, "rt", encoding="utf-8") as lines:
        comma = "," if path.name.removesuffix(".gz").endswith(".csv") else "\t"
        names = next(lines, "").rstrip("\r\n").split(comma)
        plain = [name.strip().lstrip("#").lower() for name in names]
        wanted = (("chrom", "chr", "contig"), ("pos",), ("ref",), ("alt",))
        columns = [next((n for n, name in enumerate(plain) if name.startswith(starts)), None) for starts in wanted]
        if label.name not in names or None in columns:
            listed = ", ".join(names)
            raise DataError(
                located(path, 1, f"expected columns chrom, pos, ref, alt and {label.name}; found {listed}")
                + nearest(label.name, names)
            )
        for number, line in enumerate(lines, start=2):
            parts = line.rstrip("\r\n").split(comma)
            if not line.strip():
                continue
            try:
                contig, at, ref, alt = (parts[column].strip() for column in columns if column is not None)
                place, value = contigs.find(contig, int(at) - 1), parts[names.index(label.name)].strip()
            except (IndexError, ValueError):
                raise DataError(
                    located(path, number, f"found '{line[:60].rstrip()}'; expected {', '.join(names)}")
                ) from None
            if place is None:
                raise DataError(
                    located(path, number, f"contig '{contig}' is not in the reference{contigs.closest(contig)}")
                )
            found[place.contig, int(at) - 1 - place.offset, ref.upper(), alt.upper()] = label.of([value])
    return found


def gather(
    source: Path,
    contigs: Contigs,
    longest: int,
    label: Label | None,
    table: dict[tuple[int, int, str, str], int] | None,
) -> Found:
    """Every allele of a VCF that can be read, with its label.

    Raises:
        DataError: the VCF has no such field.
    """
    found = Found()
    used = 0
    for record in records(source):
        if label is not None and table is None and label.name not in record.header.info:
            known = ", ".join(record.header.info) or "none"
            raise DataError(
                f"--label {label.name}: the VCF's header has no such INFO field; it has {known}. Labels of a table: "
                "--labels FILE"
            )
        line = alleles(record, contigs, longest)
        found.statuses.append([allele.status for allele in line])
        for number, allele in enumerate(line):
            if allele.variant is None:
                continue
            found.variants.append(allele.variant)
            found.contig.append(allele.contig)
            found.start.append(allele.variant.start)
            if table is not None:
                place = contigs.find(record.chrom, record.pos - 1)
                assert place is not None and record.alts is not None
                key = (place.contig, record.pos - 1 - place.offset, record.ref.upper(), record.alts[number].upper())
                used += key in table
                found.label.append(table.get(key, -1))
            else:
                found.label.append(-1 if label is None else label.of(_said(record, label.name, number, len(line))))
            for name, value in numbers(record, number).items():
                found.others.setdefault(name, [float("nan")] * (len(found.variants) - 1)).append(value)
    if table is not None:
        log.info("%s of %s labels are of alleles of the VCF", f"{used:,}", f"{len(table):,}")
    return found


def _said(record: Any, name: str, number: int, count: int) -> list[str]:
    value = record.info.get(name)
    if value is None:
        return []
    each = value if isinstance(value, tuple) else (value,)
    if len(each) == count and record.header.info[name].number == "A":
        each = (each[number],)
    return [str(one) for one in each]


def embedded(
    model: Model, genome: Genome, found: Found, window: Window, spans: Sequence[int], source: Path
) -> NDArray[np.float32]:
    """``(n f)`` features: what each allele changes in the states, on each strand and over each span, and in ``ln p``.

    Kept in the cache folder, under a name made of the files and settings.
    """
    facts = {
        "vcf": identity(source),
        "checkpoint": identity(model.path),
        "reference": [store.digest[:16] for store in genome.stores],
        "circular": [contig.name for contig in genome.contigs if contig.circular],
        "window": [window.length, window.after],
        "spans": list(spans),
        "precision": model.precision,
        "alleles": hashlib.sha256(repr([found.contig, found.start, found.variants]).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    kept = default_cache_dir() / "variants" / f"{key}.npy"
    if kept.is_file():
        log.info("states of %s alleles taken from %s", f"{len(found.variants):,}", kept)
        saved: NDArray[np.float32] = np.load(kept)
        return saved
    likely = model.kind in ("causal", "masked")
    width = model.width * len(spans)
    table = np.zeros((len(found.variants), 2 * (width + likely)), dtype=np.float32)
    by_contig: dict[int, list[int]] = {}
    for number, contig in enumerate(found.contig):
        by_contig.setdefault(contig, []).append(number)
    batch, size = default_batch(model), 256
    with progress("Reading", 2 * len(found.variants), "alleles") as advance:
        for contig, members in by_contig.items():
            for side, reverse in enumerate((False, True)):
                strand = Strand(genome, contig, reverse)
                for first in range(0, len(members), size):
                    rows = members[first : first + size]
                    there = [found.variants[row].on(strand) for row in rows]
                    at = side * (width + likely)
                    table[rows, at : at + width], said = differences(model, strand, there, window, spans, batch)
                    if likely:
                        again = model.kind == "masked"  # asked with its bases hidden, which is another reading
                        table[rows, at + width] = score(model, strand, there, window) if again else said
                    advance(len(rows))
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{key}.{os.getpid()}.npy")
    np.save(temporary, table)
    os.replace(temporary, kept)
    return table


def learn(
    model: Model, found: Found, features: NDArray[np.float32], folds: int, by: Group, seed: int
) -> tuple[NDArray[np.float64], Head]:
    """Cross-validate, print the table, and fit on all labels.

    Returns:
        Logits of all alleles, those of labelled ones from heads that have not seen them; the head of all labels.

    Raises:
        DataError: a fold has one class only.
    """
    label = np.array(found.label)
    rows = np.flatnonzero(label >= 0)
    if not len(rows):
        raise DataError(f"none of the {len(label):,} alleles has a label; see --label and --labels")
    positive = label[rows] == 1
    contig, start = np.array(found.contig, dtype=np.int64), np.array(found.start, dtype=np.int64)
    groups = groups_of(contig[rows], start[rows], by, folds)
    fold = folds_of(groups, folds, seed)
    check_folds(positive, fold, folds, by)
    plain = plain_features(contig, start, [(variant.ref, variant.alt) for variant in found.variants])
    table = Table(
        title=f"{int(positive.sum()):,} of {len(rows):,} labelled alleles damaging, {folds} folds by {by}",
        title_justify="left",
    )
    for heading in ("score", "AUROC", "95 %", "folds", "variants"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    own = features[rows]
    said = held_out(own, positive, groups, fold, seed)
    floor = held_out(plain[rows], positive, groups, fold, seed)
    both = held_out(np.concatenate([own, plain[rows]], axis=1), positive, groups, fold, seed)
    _row(table, "this model's states", positive, said, groups, fold)
    if model.kind in ("causal", "masked"):
        half = features.shape[1] // 2
        _row(table, "zero-shot likelihood", positive, -own[:, [half - 1, -1]].mean(axis=1), groups, fold)
    _row(table, "floor: change, place", positive, floor, groups, fold)
    _row(table, "states and floor", positive, both, groups, fold)
    for name, values in found.others.items():
        column = np.array(values)[rows]
        known = ~np.isnan(column)
        if 0 < positive[known].sum() < known.sum():
            value = auroc(positive[known], column[known])
            side = "high" if value >= 0.5 else "low"
            table.add_row(f"{name} ({side}; in the VCF)", f"{max(value, 1 - value):.3f}", "", "", f"{known.sum():,}")
    Console().print(table)
    head = fit_head(own, positive, groups, seed)
    answers = head.logits(features)
    answers[rows] = said
    return answers, head


def _row(
    table: Table,
    name: str,
    positive: NDArray[np.bool_],
    said: NDArray[Any],
    groups: NDArray[np.int64],
    fold: NDArray[np.int64],
) -> None:
    value, low, high = interval(positive, said.astype(np.float64), groups)
    each = [auroc(positive[fold == number], said[fold == number]) for number in range(int(fold.max()) + 1)]
    shown = f"{min(each):.3f} to {max(each):.3f}"
    table.add_row(name, f"{value:.3f}", f"{low:.3f} to {high:.3f}", shown, f"{len(said):,}")


def _values(found: Found, logits: NDArray[np.float64]) -> Iterator[tuple[list[str], list[list[float | None]]]]:
    rows = iter(logits)
    for statuses in found.statuses:
        yield statuses, [[float(1 / (1 + np.exp(-next(rows)))) if one == "ok" else None for one in statuses]]
