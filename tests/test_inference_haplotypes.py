"""Phased haplotypes: what a chromosome reads, where variants lie on it, and their scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pysam")

from inference_cases import causal_model

from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import DataError
from seqlong.inference.contigs import Contigs
from seqlong.inference.haplotypes import Edits, Haplotype, open_person
from seqlong.inference.score import Settings, score_file
from seqlong.inference.strands import Strand
from seqlong.inference.variants import Variant, Window, score

HEAD = (
    "##fileformat=VCFv4.2\n##contig=<ID=one>\n"
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tHG1\tHG2\n"
)


def write_genome(folder: Path, size: int, circular: bool = False, seed: int = 0) -> tuple[Genome, str]:
    letters = "".join(np.random.default_rng(seed).choice(list("ACGT"), size))
    (folder / "ref.fa").write_text(f">one\n{letters}\n")
    return Genome.open(folder / "ref.fa", folder / "cache", "all" if circular else ()), letters


def write_vcf(folder: Path, rows: list[tuple[int, str, str, str]]) -> Path:
    path = folder / "v.vcf"
    lines = [f"one\t{pos}\t.\t{ref}\t{alt}\t.\t.\t.\tGT\t{gt}\t0/0\n" for pos, ref, alt, gt in rows]
    path.write_text(HEAD + "".join(lines))
    return path


@pytest.mark.parametrize("circular", [False, True])
def test_a_chromosome_reads_as_its_letters_do(circular: bool, tmp_path: Path) -> None:
    genome, letters = write_genome(tmp_path, 60, circular)
    edits = Edits([0, 7, 10, 11, 30, 57], [1, 3, 1, 1, 5, 3], [b"TTT", b"", b"A", b"GGG", b"CC", b"T"])
    edits.settle()
    text, at = "", 0
    for start, ref, alt in zip(edits.starts, edits.refs, edits.alts, strict=True):
        text += letters[at:start] + alt.decode()
        at = start + ref
    text += letters[at:]
    haplotype = Haplotype(genome, {0: edits})
    assert haplotype.contigs[0].length == len(text)
    for start in range(len(text)):
        for stop in range(start, len(text) + 1):
            assert haplotype.read(0, start, stop).tobytes().decode() == text[start:stop]
    if circular:
        assert haplotype.read(0, -5, 4).tobytes().decode() == text[-5:] + text[:4]
        assert haplotype.read(0, len(text) - 2, len(text) + 6).tobytes().decode() == text[-2:] + text[:6]
    for start in range(60):
        found = haplotype.find(0, start, 1)
        if found is not None and found[1] is None:
            assert text[found[0]] == letters[start]
    assert haplotype.find(0, 8, 1) is None and haplotype.find(0, 6, 4) is None
    assert haplotype.find(0, 11, 1) == (11 + 2 - 3, b"GGG")


def test_scores_on_haplotypes_are_those_of_their_letters(tmp_path: Path) -> None:
    genome, letters = write_genome(tmp_path, 150)

    def other(position: int, step: int = 1) -> str:
        return "ACGT"[("ACGT".index(letters[position - 1]) + step) % 4]

    def base(position: int, size: int = 1) -> str:
        return letters[position - 1 : position - 1 + size]

    rows = [
        (20, base(20), f"{base(20)}GA", "0|1"),  # an insertion on the second
        (40, base(40), f"{other(40)},{other(40, 2)}", "1|2"),
        (60, base(60, 3), base(60), "1|0"),  # a deletion on the first
        (61, base(61), other(61), "0|1"),  # inside it
        (70, base(70), other(70), "0/1"),  # without phase
        (80, base(80), other(80), "1|1"),
        (90, base(90), other(90), "0|0"),
        (100, base(100), other(100), ".|."),
    ]
    path = write_vcf(tmp_path, rows)
    person = open_person(path, "HG1", Contigs(genome), 20)
    assert dict(person.counts) == {"carried": 7, "unphased": 1, "missing": 1}
    assert "HG1: 1 heterozygous sites without phase, left as in the reference" in person.lines()

    def text(side: int, instead: dict[int, str]) -> tuple[str, dict[int, int]]:
        """Letters of a chromosome with ``instead`` at some positions, and where each position is."""
        made, at, places = "", 1, {}
        for pos, ref, alts, gt in rows:
            index = gt.split("|")[side] if "|" in gt else "0"
            if pos < at or (pos not in instead and index in "0."):
                continue
            made += letters[at - 1 : pos - 1]
            places[pos] = len(made)
            own = alts.split(",")[int(index) - 1] if index not in "0." else ref
            made += instead.get(pos, own)
            at = pos + len(ref)
        return made + letters[at - 1 :], places

    model, window = causal_model(), Window(64)
    settings = Settings((window,))
    score_file(model, genome, path, settings, None, tmp_path / "out.tsv", sample="HG1")
    lines = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()[1:]]
    found = {(int(line[1]), line[4]): (line[5], [float(value) for value in line[7:9]]) for line in lines}
    expected = {
        (40, other(40)): [0],
        (40, other(40, 2)): [1],
        (61, other(61)): [1],
        (70, other(70)): [0, 1],
        (80, other(80)): [0, 1],
        (90, other(90)): [0, 1],
        (100, other(100)): [0, 1],
    }
    for (position, alt), sides in expected.items():
        scores = np.zeros(2)
        for side in sides:
            made, places = text(side, {position: base(position)})  # the chromosome with REF here
            (tmp_path / f"h{position}{side}.fa").write_text(f">one\n{made}\n")
            chromosome = Genome.open(tmp_path / f"h{position}{side}.fa", tmp_path / "cache")
            variant = Variant(places[position], base(position).encode(), alt.encode())
            for way, reverse in enumerate((False, True)):
                strand = Strand(chromosome, 0, reverse)
                scores[way] += score(model, strand, [variant.on(strand)], window)[0] / len(sides)
        status, values = found[position, alt]
        assert status == "ok"
        np.testing.assert_allclose(values, scores, rtol=1e-5, atol=1e-4, err_msg=f"{position} {alt}")
    plain = score_of_reference(model, genome, rows, window)
    assert abs(found[61, other(61)][1][0] - plain) > 1e-3  # the insertion and the others before it are in sight
    assert [found[20, f"{base(20)}GA"][0], found[60, base(60)][0]] == ["ok", "ok"]


def score_of_reference(model, genome: Genome, rows: list, window: Window) -> float:  # type: ignore[no-untyped-def]
    position, ref, alt, _ = rows[3]
    return float(score(model, Strand(genome, 0), [Variant(position - 1, ref.encode(), alt.encode())], window)[0])


def test_an_allele_without_a_place_has_no_score(tmp_path: Path) -> None:
    genome, letters = write_genome(tmp_path, 150)
    alt = "A" if letters[50] != "A" else "C"
    path = write_vcf(tmp_path, [(49, letters[48:54], letters[48], "1|1"), (51, letters[50], alt, "0|0")])
    score_file(causal_model(), genome, path, Settings((Window(64),)), tmp_path / "o.vcf", sample="HG1")
    lines = (tmp_path / "o.vcf").read_text().splitlines()
    assert lines[-1].split("\t")[7] == "SL_LLR_64=.;SL_STATUS=on_deleted"
    assert "haplotypes of HG1" in next(line for line in lines if line.startswith("##seqlong="))


def test_samples_and_genotypes_must_be_there(tmp_path: Path) -> None:
    genome, letters = write_genome(tmp_path, 50)
    path = write_vcf(tmp_path, [(9, letters[8], "A" if letters[8] != "A" else "C", "1|0")])
    with pytest.raises(DataError, match=r"--sample HG3: .* has no such sample; did you mean 'HG2'\?; it has HG1, HG2"):
        open_person(path, "HG3", Contigs(genome), 20)
    path.write_text(path.read_text().replace("\tGT\t1|0\t0/0", "\tDP\t3\t4").replace("ID=GT", "ID=DP"))
    with pytest.raises(DataError, match="has no genotypes"):
        open_person(path, "HG1", Contigs(genome), 20)


def test_a_real_mitochondrion(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "dna" / "variants" / "human_mtDNA"
    genome = Genome.open(folder / "rCRS.fasta", tmp_path / "cache")
    contigs = Contigs(genome)
    person = open_person(folder / "ALL.chrMT.phase1.vcf.gz", "HG00097", contigs, 1000)
    assert len(person.haplotypes) == 1
    assert person.counts["carried"] > 10 and not person.counts["unphased"]
    own = person.haplotypes[0]
    differ = sum(len(edits.starts) for edits in own._edits.values())
    assert differ == person.counts["carried"]
    place = own.find(0, 72, 1)  # 73 A>G, which nearly all but the reference have
    assert place is not None and own.read(0, place[0], place[0] + 1).tobytes() == b"G"
