"""Scoring variants: shared contexts give what whole windows give, on both strands, for every kind of allele."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import causal_model, masked_model

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.alphabet import reverse_complement
from seqlong.datamodules.dna.genome import Genome
from seqlong.inference.model import Model
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.inference.variants import Variant, Window, haplotype, score


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    rng = np.random.default_rng(0)
    bases = "".join(rng.choice(list("ACGT"), 900))
    bases = f"{bases[:300]}NNN{bases[303:]}"
    path = tmp_path / "a.fa"
    path.write_text(f">one\n{bases}\n>ring\n{bases[:400]}\n>short\n{bases[500:560]}\n")
    return Genome.open(path, tmp_path / "cache", ["ring"])


def whole(model: Model, strand: Strand, variant: Variant, window: Window, indels: str) -> float:
    """The definition: two whole windows, each read from its first base, by loops over letters."""
    begin = window.begin(variant.start, strand)
    stop = begin + window.length if strand.circular else min(begin + window.length, strand.length)
    sums = []
    for allele in (variant, None):
        letters = haplotype(strand, begin, stop, allele)
        tokens, targets = tokens_of(letters)[None], targets_of(letters)[None]
        logits = model.task.head.logits(model.backbone(SequenceBatch(tokens=tokens)).hidden)[0].log_softmax(dim=-1)
        values = [0.0] + [
            logits[i - 1, t].item() if t >= 0 else 0.0 for i, t in enumerate(targets[0].tolist()) if i > 0
        ]
        sums.append((values, [t >= 0 for t in targets[0].tolist()]))
    (alt, _), (ref, known) = sums
    if indels == "window" or len(variant.ref) == len(variant.alt):
        return sum(alt) - sum(ref)
    at, longer = variant.start - begin, len(variant.alt) - len(variant.ref)
    flank = min(len(alt) - at - len(variant.alt), len(ref) - at - len(variant.ref))
    mean = sum(ref[at:]) / sum(known[at:])
    end = at + flank
    return sum(alt[: end + len(variant.alt)]) - sum(ref[: end + len(variant.ref)]) - longer * mean


def some_variants(strand: Strand, seed: int = 0) -> list[Variant]:
    rng = np.random.default_rng(seed)
    found = []
    places = [0, 1, 2, 5, strand.length - 1, strand.length - 3, *rng.integers(0, strand.length - 6, 9).tolist()]
    for number, start in enumerate(places):
        size = min([1, 1, 2, 0, 4][number % 5], strand.length - start)
        ref = strand.read(start, start + size).tobytes()
        alt = "".join(rng.choice(list("ACGT"), [1, 1, 2, 3, 0][number % 5])).encode()
        found.append(Variant(start, ref, alt))
    return found


@pytest.mark.parametrize(
    ("contig", "reverse", "indels"),
    [(0, False, "calibrated"), (0, True, "window"), (1, True, "calibrated"), (2, False, "calibrated")],
)
def test_shared_context_gives_what_whole_windows_give(genome: Genome, contig: int, reverse: bool, indels: str) -> None:
    model, strand, window = causal_model(), Strand(genome, contig, reverse), Window(128)
    variants = some_variants(strand)
    expected = [whole(model, strand, variant, window, indels) for variant in variants]
    for batch_tokens in (100_000, 500):
        found = score(model, strand, variants, window, indels, batch_tokens)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert np.abs(found).max() > 0.5


def test_full_attention_shares_its_context_too(genome: Genome) -> None:
    model, strand, window = causal_model(window=None), Strand(genome, 0), Window(128, after=100)
    variants = some_variants(strand)
    expected = [whole(model, strand, variant, window, "calibrated") for variant in variants]
    np.testing.assert_allclose(score(model, strand, variants, window), expected, rtol=1e-9, atol=1e-9)


def test_scores_do_not_depend_on_what_else_is_in_the_file(genome: Genome) -> None:
    model, strand, window = causal_model(), Strand(genome, 0), Window(128)
    variants = some_variants(strand)
    together = score(model, strand, variants, window)
    alone = [score(model, strand, [variant], window)[0] for variant in variants]
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-9)
    backwards = score(model, strand, variants[::-1], window)[::-1]
    np.testing.assert_allclose(together, backwards, rtol=1e-9, atol=1e-9)


def test_no_change_scores_exactly_nothing(genome: Genome) -> None:
    """Also in float32: the reference's row is in the batch of its alleles, so that rounding cancels."""
    model, strand = causal_model(dtype=torch.float32), Strand(genome, 0)
    variants = [Variant(start, (ref := strand.read(start, start + 1).tobytes()), ref) for start in range(100, 250, 7)]
    assert np.abs(score(model, strand, variants, Window(128))).max() < 1e-5


def test_the_strand_of_a_reverse_complemented_genome_is_the_other_strand(tmp_path: Path, genome: Genome) -> None:
    turned = tmp_path / "b.fa"
    letters = Strand(genome, 0).read(0, 900)
    turned.write_text(f">one\n{reverse_complement(letters).tobytes().decode()}\n")
    other = Genome.open(turned, tmp_path / "cache")
    model, window = causal_model(), Window(128)
    variants = some_variants(Strand(genome, 0))
    there = [Variant(900 - v.start - len(v.ref), *(reverse_complement(np.frombuffer(x, np.uint8)).tobytes()
             for x in (v.ref, v.alt))) for v in variants]  # fmt: skip
    for reverse in (False, True):
        mine, theirs = Strand(genome, 0, reverse), Strand(other, 0, not reverse)
        found = score(model, mine, [v.on(mine) for v in variants], window)
        np.testing.assert_allclose(found, score(model, theirs, [v.on(theirs) for v in there], window), atol=1e-9)


def test_windows_have_what_they_promise(genome: Genome) -> None:
    strand, window = Strand(genome, 0), Window(128, after=48)
    for position in range(900):
        begin = window.begin(position, strand)
        assert 0 <= begin <= 900 - 128 and begin <= position < begin + 128
        if 80 + window.grid <= position < 900 - 48:
            assert 80 <= position - begin < 80 + window.grid


def test_masked_models_are_asked_about_the_hidden_allele(genome: Genome) -> None:
    model, strand, window = masked_model(), Strand(genome, 0), Window(64)
    start = 200
    ref = strand.read(start, start + 1).tobytes()
    alts = [base for base in (b"A", b"C", b"G", b"T") if base != ref]
    found = score(model, strand, [Variant(start, ref, alt) for alt in alts], window)
    begin = start - 63 // 2
    tokens = tokens_of(strand.read(begin, begin + 64))[None]
    tokens[0, start - begin] = 1
    said = model.task.head.logits(model.backbone(SequenceBatch(tokens=tokens)).hidden)[0, start - begin].log_softmax(-1)
    expected = [(said["ACGT".index(alt.decode()) + 4] - said["ACGT".index(ref.decode()) + 4]).item() for alt in alts]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_masked_indels_hide_the_allele_and_its_flanks(genome: Genome) -> None:
    model, strand, window = masked_model(), Strand(genome, 0), Window(64)
    variant = Variant(600, b"", b"GA")
    begin, total = 600 - 32, []
    for allele, size in ((variant, 2), (None, 0)):
        letters = haplotype(strand, begin, begin + 64, allele)
        tokens, low, high = tokens_of(letters)[None], 32 - 4, 32 + size + 4
        truth = tokens[0, low:high].clone()
        tokens[0, low:high] = 1
        said = model.task.head.logits(model.backbone(SequenceBatch(tokens=tokens)).hidden)[0].log_softmax(-1)
        total.append(sum(said[low + i, token].item() for i, token in enumerate(truth.tolist())))
    assert score(model, strand, [variant], window)[0] == pytest.approx(total[0] - total[1] - 2 * total[1] / 8, abs=1e-9)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((10, b"A", b"T"), (10, b"A", b"T")),
        ((10, b"CA", b"C"), (11, b"A", b"")),
        ((10, b"C", b"CTT"), (11, b"", b"TT")),
        ((10, b"CAAA", b"CAA"), (11, b"A", b"")),
        ((10, b"ACGT", b"ATGT"), (11, b"C", b"T")),
        ((10, b"A", b"A"), (10, b"", b"")),
    ],
)
def test_alleles_are_trimmed_to_what_differs(given: tuple, expected: tuple) -> None:
    assert Variant.trimmed(*given) == Variant(*expected)
