"""Sequences from FASTQ and EMBL, and from proteins: what is read, counted and refused."""

from __future__ import annotations

import gzip
import io
import logging

import numpy as np
import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from seqlong.datamodules.dna.fasta import Header
from seqlong.datamodules.dna.proteins import ProteinSettings, ReverseTranslation
from seqlong.datamodules.dna.records import read_records
from seqlong.datamodules.dna.sequences import read_sequences
from seqlong.datamodules.dna.store import GenomeStore
from seqlong.datamodules.dna.tokens import genetic_code
from seqlong.errors import ConfigError, DataError


def records(path) -> list[tuple[str, str, int, str]]:
    """(name, description, line, bases) of each."""
    found: list[list] = []
    for item in read_sequences(path):
        if isinstance(item, Header):
            found.append([item.name, item.description, item.line, ""])
        else:
            found[-1][3] += item.decode()
    return [tuple(one) for one in found]


# FASTQ

READS = "@r1 1:N:0:A\nACGTN\n+\nII@II\n@r1 2:N:0:A\nacgu\n+r1 2:N:0:A\n@@@@\n@r3 x\nAC\nGT\n+\nII\nII\n"


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_fastq(tmp_path, caplog, ending):
    path = tmp_path / f"reads.fq{ending}"
    path.write_bytes(gzip.compress(READS.encode()) if ending else READS.encode())
    with caplog.at_level(logging.INFO, logger="seqlong"):
        found = records(path)
    assert found == [
        ("r1/1", "1:N:0:A", 1, "ACGTN"), ("r1/2", "2:N:0:A", 5, "acgu"), ("r3", "x", 9, "ACGT")
    ]  # fmt: skip
    assert "3 reads; their qualities are dropped" in caplog.text


def test_a_store_of_fastq_and_labels_in_its_headers(tmp_path):
    path = tmp_path / "reads.fastq"
    path.write_text("\n\n@a 1\r\nACGT\r\n+\r\nIIII\r\n@b 0\r\nGG\r\n+\r\nII\r\n\n")
    store = GenomeStore.build_or_open(path, tmp_path)
    assert [(contig.name, contig.length) for contig in store.contigs] == [("a", 4), ("b", 2)]
    assert store.data.tobytes() == b"ACGTGG"
    found = read_records(path)
    assert found.labels == [("1",), ("0",)] and found.lines.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("@a\nACGT\n+\nIII\n", r"reads.fq:\d: malformed or truncated FASTQ: Lengths of sequence and quality"),
        ("@a\nACGT\n+\nIIII\n@b\nAC", r"reads.fq:\d: malformed or truncated FASTQ: End of file without quality"),
        ("@a\nAC-T\n+\nIIII\n", r"reads.fq:2: illegal character '-' at column 3 of record 'a'"),
        ("@a\nAC\n+\nII\n@b\nA.\n+\nII\n", r"reads.fq:6: illegal character '.' at column 2 of record 'b'"),
        ("@a\n\n+\n\n", r"reads.fq:1: read 'a' has no bases"),
        ("@ a\nA\n+\nI\n", r"reads.fq:1: found a read without a name"),
        ("@a\nA\n+\nI\n@a\nC\n+\nI\n", r"reads.fq:5: two records are called 'a' \(the other at line 1\)"),
    ],
    ids=["lengths", "truncated", "letter", "second", "empty", "nameless", "twice"],
)
def test_fastq_that_is_refused(tmp_path, text, said):
    path = tmp_path / "reads.fq"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        records(path)


# EMBL


def embl(*sequences: tuple[str, str]) -> str:
    made = []
    for name, text in sequences:
        record = SeqRecord(Seq(text), id=f"{name}.1", name=name, description=f"of {name}")
        record.annotations |= {"molecule_type": "DNA", "topology": "circular" if name == "RING" else "linear"}
        made.append(record)
    text = io.StringIO()
    SeqIO.write(made, text, "embl")
    return text.getvalue()


def test_embl(tmp_path):
    path = tmp_path / "two.embl.gz"
    text = "".join(np.random.default_rng(0).choice(list("ACGTN"), 200))
    path.write_bytes(gzip.compress(embl(("RING", text), ("LINE", "ACGTRY")).encode()))
    store = GenomeStore.build_or_open(path, tmp_path)
    assert [(one.name, one.length, one.circular) for one in store.contigs] == [
        ("RING.1", 200, True), ("LINE.1", 6, False)
    ]  # fmt: skip
    assert store.data.tobytes().decode() == text + "ACGTRY"


def test_embl_that_is_refused(tmp_path):
    path = tmp_path / "cut.embl"
    text = embl(("LINE", "ACGT" * 50))
    path.write_text(text[: text.index("acgt") + 30])
    with pytest.raises(DataError, match=r"cut.embl:\d+: malformed"):
        records(path)


# Proteins


def test_proteins_become_their_most_used_codons(tmp_path):
    path = tmp_path / "p.fa"
    path.write_text(">a\nMKl\nW*\n>b\nMR\n")
    store = GenomeStore.build_or_open(path, tmp_path, protein=ReverseTranslation(ProteinSettings("e_coli_316407", 11)))
    # By hand, from the table of E. coli: Lys AAA 0.76, Leu CTG 0.5, stop TAA, Arg CGC.
    assert store.data.tobytes() == b"ATGAAACTGTGGTAA" + b"ATGCGC"
    human = GenomeStore.build_or_open(path, tmp_path, protein=ReverseTranslation(ProteinSettings()))
    assert human.data.tobytes() != store.data.tobytes()  # another table is another store
    assert str(Seq(human.data.tobytes()[:15].decode()).translate()) == "MKLW*"


@pytest.mark.parametrize("code", [1, 2, 6, 27])
@pytest.mark.parametrize("draw", ["most", "sample"])
def test_reverse_translation_translates_back(code, draw):
    protein = "ACDEFGHIKLMNPQRSTVWYacdefghiklmnpqrstvwy" * 20
    made = ReverseTranslation(ProteinSettings("s_cerevisiae_4932", code, draw, seed=3)).bases(protein.encode())
    found = "".join(genetic_code(code)[made[at : at + 3].decode()] for at in range(0, len(made), 3))
    assert found == protein.upper()


def test_sampled_codons_follow_the_table_and_their_place():
    write = ReverseTranslation(ProteinSettings("e_coli_316407", 11, "sample", seed=1))
    made = write.bases(b"L" * 20000).decode()
    codons = [made[at : at + 3] for at in range(0, len(made), 3)]
    shares = {"CTA": 0.04, "CTC": 0.1, "CTG": 0.5, "CTT": 0.1, "TTA": 0.13, "TTG": 0.13}
    assert {codon: codons.count(codon) / 20000 for codon in shares} == pytest.approx(shares, abs=0.015)
    assert write.bases(b"L" * 500, 1000).decode() == made[3000:4500]  # whatever the pieces that a file is read in
    other = ReverseTranslation(ProteinSettings("e_coli_316407", 11, "sample", seed=2))
    assert other.bases(b"L" * 100) != made[:300].encode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MK\nX*", r"p.fa:3: protein 'b', residue 3: residue 'X' has no codon of its own; data.protein.unclear=n"),
        ("MK*L", r"p.fa:3: protein 'b', residue 3: a stop inside of the protein"),
        ("MK-L", r"p.fa:3: protein 'b', residue 3: illegal letter '-'; expected amino acids"),
    ],
    ids=["unclear", "stop", "gap"],
)
def test_proteins_that_are_refused(tmp_path, text, said):
    path = tmp_path / "p.fa"
    path.write_text(f">a\nMKV\n>b\n{text}\n")
    with pytest.raises(DataError, match=said):
        GenomeStore.build_or_open(path, tmp_path, protein=ReverseTranslation(ProteinSettings()))
    loose = ReverseTranslation(ProteinSettings(unclear="n"))
    if "X" in text:
        assert GenomeStore.build_or_open(path, tmp_path, protein=loose).data.tobytes()[15:18] == b"NNN"


def test_labelled_proteins(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("protein,label\nMK,0\nMXK,1\nMW*,1\n")
    write = ReverseTranslation(ProteinSettings("e_coli_316407", 11))
    with pytest.raises(DataError, match=r"p.csv:3: residue 2 of the protein: residue 'X' has no codon"):
        read_records(path, protein=write)
    found = read_records(path, protein=write, bad="drop")
    assert found.bases.tobytes() == b"ATGAAA" + b"ATGTGGTAA" and len(found.dropped) == 1
    fasta = tmp_path / "p.fa"
    fasta.write_text(">a 1\nMK\n")
    assert read_records(fasta, protein=write).bases.tobytes() == b"ATGAAA"


def test_settings_of_proteins_that_are_refused():
    with pytest.raises(ConfigError, match=r"there is no table 'h_sapiens'.*h_sapiens_9606"):
        ReverseTranslation(ProteinSettings("h_sapiens"))
    with pytest.raises(ConfigError, match="no genetic code 8"):
        ReverseTranslation(ProteinSettings(code=8))
