"""The genome store: every way a sequence file may be written, every way it may be broken, windows, and the cache."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO, bgzf
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlong.datamodules.dna import alphabet, cache, store
from seqlong.datamodules.dna.fasta import Header, read_fasta
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.sequences import read_sequences
from seqlong.datamodules.dna.store import GenomeStore
from seqlong.errors import DataError

IUPAC = "ACGTURYSWKMBDHVNX"


def text_of(window: np.ndarray) -> str:
    return window.tobytes().decode()


def array(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


@pytest.fixture
def build(tmp_path):
    """Write a file and open its store."""

    def make(content: str | bytes, name: str = "genome.fa", **kwargs) -> GenomeStore:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return GenomeStore.build_or_open(path, tmp_path / "cache", **kwargs)

    return make


# The alphabet


def test_reverse_complement_is_biopythons_for_all_of_iupac_in_either_case():
    text = IUPAC.replace("U", "") + IUPAC.replace("U", "").lower()
    assert text_of(alphabet.reverse_complement(array(text))) == str(Seq(text).reverse_complement())


def test_reverse_complement_pairs_u_with_a():
    assert text_of(alphabet.reverse_complement(array("ACGUu"))) == "aACGT"


def test_tokens():
    assert alphabet.encode(array("ACGTUacgtuNnRyX")).tolist() == [4, 5, 6, 7, 7] * 2 + [8] * 5
    assert alphabet.encode(np.zeros((2, 3), np.uint8)).tolist() == [[0] * 3] * 2
    assert alphabet.encode_targets(array("ACgtuNR")).tolist() == [4, 5, 6, 7, 7, -1, -1]
    assert alphabet.is_unknown(array("AcUNRx")).tolist() == [False, False, False, True, True, True]
    assert alphabet.is_soft_masked(array("AcNn")).tolist() == [False, True, False, True]


def test_vocabulary():
    vocabulary = alphabet.DnaVocabulary()
    assert (vocabulary.size, vocabulary.pad, vocabulary.mask) == (16, 0, 1)
    assert len(vocabulary.letters) == 16
    assert vocabulary.decode(vocabulary.replacements) == "ACGT"
    assert vocabulary.decode(vocabulary.encode("acgun")) == "ACGTN"


# Reading

CONTENT = b">one first record\nACGTN\nacgtn\n\n>two\r\nRYSWKM\r\nBDHV\r\n>three\nA\n\n\n"
RECORDS = {"one": "ACGTNacgtn", "two": "RYSWKMBDHV", "three": "A"}


def records(items) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for item in items:
        if isinstance(item, Header):
            name = item.name
            found[name] = ""
        else:
            found[name] += item.decode()
    return found


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 11, 64, 1 << 20])
def test_fasta_is_the_same_however_it_is_cut(chunk):
    assert records(read_fasta(BytesIO(CONTENT), Path("x.fa"), chunk)) == RECORDS


def test_headers_know_their_lines():
    headers = [item for item in read_fasta(BytesIO(CONTENT), Path("x.fa"), 3) if isinstance(item, Header)]
    assert [(header.name, header.line) for header in headers] == [("one", 1), ("two", 5), ("three", 8)]
    assert headers[0].description == "first record"


@pytest.mark.parametrize("packing", ["plain", "gzip", "two gzip members", "gzip with padding", "bgzip"])
def test_compressions_read_the_same(packing, tmp_path):
    path = tmp_path / "x.fa"
    half = len(CONTENT) // 2
    if packing == "bgzip":
        with bgzf.BgzfWriter(str(path)) as writer:
            writer.write(CONTENT)
    else:
        path.write_bytes(
            {
                "plain": CONTENT,
                "gzip": gzip.compress(CONTENT),
                "two gzip members": gzip.compress(CONTENT[:half]) + gzip.compress(CONTENT[half:]),
                "gzip with padding": gzip.compress(CONTENT) + b"\0" * 100,
            }[packing]
        )
    assert records(read_sequences(path)) == RECORDS


def test_a_chromosome_on_one_line_takes_constant_memory(tmp_path):
    path = tmp_path / "x.fa"
    path.write_bytes(b">x\n" + b"ACGT" * (2 << 20))
    pieces = [item for item in read_sequences(path) if isinstance(item, bytes)]
    assert sum(map(len, pieces)) == 8 << 20
    assert max(map(len, pieces)) <= 1 << 20


def test_genbank_is_upper_case_and_knows_rings(build):
    ring = SeqRecord(Seq("acgtn" * 30), "ring.1", "ring", "a ring", annotations={"molecule_type": "DNA"})
    ring.annotations["topology"] = "circular"
    line = SeqRecord(Seq("GGCC" * 30), "line.1", "line", "a line", annotations={"molecule_type": "DNA"})
    line.annotations["topology"] = "linear"
    content = "".join(record.format("genbank") for record in (ring, line))
    found = build(gzip.compress(content.encode()), "x.gbk.gz")
    assert [(contig.name, contig.length, contig.circular) for contig in found.contigs] == [
        ("ring.1", 150, True),
        ("line.1", 120, False),
    ]
    assert text_of(found.window("ring.1", 148, 153)) == "TNACG"
    assert found.contigs[0].soft_masked == 0


def test_genbank_of_ncbi_equals_its_fasta(shared_data, tmp_path):
    folder = shared_data / "dna" / "genomes"
    flat = GenomeStore.build_or_open(folder / "GCF_000005845.2_ASM584v2_genomic.gbff.gz", tmp_path)
    fasta = GenomeStore.build_or_open(folder / "GCF_000005845.2_ASM584v2_genomic.fna.gz", tmp_path)
    assert flat.contigs[0].circular and not fasta.contigs[0].circular
    assert flat.contigs[0].digest == fasta.contigs[0].digest
    assert flat.digest != fasta.digest


# Bad input

PROTEIN = ">p1 insulin\nMALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALYLVCGERG\n"
GENBANK_HEAD = "LOCUS       x                        120 bp    DNA     linear   UNK 01-JAN-1980\nDEFINITION  x\n"
GENBANK_HEAD += "ACCESSION   x\nVERSION     x.1\nFEATURES             Location/Qualifiers\nORIGIN\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"genome\.fa: the file is empty; expected a FASTA, FASTQ, GenBank or EMBL file, plain, gzip or bgzip"),
        ("\n\n\n", r"genome\.fa: found only blank lines; expected FASTA"),
        (
            b">x\nAC\x00\x01GT\n",
            r"genome\.fa: found a binary file \(byte 0x00\); expected a FASTA, FASTQ, GenBank or EMBL",
        ),
        (gzip.compress(b"\x01\x02\x03\x00" * 9, mtime=0), r"genome\.fa: found a binary file \(byte 0x01\)"),
        (b"BZh91AY", r"genome\.fa: found bzip2-compressed file; expected .* plain, gzip or bgzip"),
        (gzip.compress(b"BAM\x01xxxx", mtime=0), r"genome\.fa: found a BAM alignment file"),
        (
            gzip.compress(CONTENT * 999, mtime=0)[:-30],
            r"the gzip data stop in the middle, after [\d,]+ bytes of text.*truncated",
        ),
        (
            gzip.compress(CONTENT, mtime=0)[:40] + b"xxxxxxxxxxxxxxxxxxx",
            r"the gzip data are damaged after [\d,]+ bytes of text",
        ),
        (PROTEIN, r"genome\.fa:2: record 'p1' is protein: residues E, F, L, P, Q are not nucleotides; expected DNA"),
        (">a\nAC\nGT\n>b\nAC\n>a\nGG\n", r"genome\.fa:6: two records are called 'a' \(the other at line 1\)"),
        ("ACGT\nACGT\n", r"genome\.fa:1: no header: found 'ACGT' first; expected FASTA"),
        ("\n\n@read1\nACGT\n+\nIIII\nACGT\n", r"genome\.fa:\d: malformed or truncated FASTQ"),
        (">a\nACGT\nAC-GT\n", r"genome\.fa:3: illegal character '-' at column 3 of record 'a';.*remove the gaps"),
        (">a\nACGT\n\nAC7T\n>b\nA\n", r"genome\.fa:4: illegal character '7' at column 3 of record 'a'"),
        (">a\nACGT>b\nACGT\n", r"genome\.fa:2: illegal character '>' at column 5 of record 'a'"),
        (">a\n>b\nACGT\n", r"genome\.fa:2: record 'a' has no bases before this line"),
        (">a\nACGT\n>b\n", r"genome\.fa:4: record 'b' has no bases before this line"),
        (">a\nACGT\n>b", r"genome\.fa:3: record 'b' has no bases before this line"),
        (">\nACGT\n", r"genome\.fa:1: found a header without a name"),
        (">a\rACGT\r>b\rACGT\r\n", r"genome\.fa:1: lines end in CR alone"),
        (GENBANK_HEAD + "        1 acgtacgtac\n", r"genome\.fa:\d+: malformed or truncated GenBank: Premature end"),
        (GENBANK_HEAD + "        1 acgtacgtac\n//\n", r"malformed or truncated GenBank: Expected sequence length 120"),
        (GENBANK_HEAD + "//\n", r"genome\.fa:1: record 'x\.1' has no sequence \(no ORIGIN\)"),
    ],
)
def test_bad_files_say_what_is_wrong_and_where(build, content, message):
    with pytest.raises(DataError, match=message):
        build(content)
    with pytest.raises(DataError, match=message):  # and leave nothing that the next start would believe
        build(content)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_a_header_begins_a_line_however_the_file_is_cut(chunk):
    with pytest.raises(DataError, match=r"x\.fa:2: illegal character '>'"):
        records(read_fasta(BytesIO(b">a\nACGT>b\nACGT\n"), Path("x.fa"), chunk))


def test_truncated_bgzip(tmp_path):
    path = tmp_path / "x.fa.gz"
    with bgzf.BgzfWriter(str(path)) as writer:
        writer.write(CONTENT)
    path.write_bytes(path.read_bytes()[:-28])
    with pytest.raises(DataError, match=r"x\.fa\.gz: the bgzip end-of-file block is missing.*truncated"):
        list(read_sequences(path))


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "human.fa.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"humen\.fa\.gz: no such file; did you mean 'human\.fa\.gz'\?"):
        GenomeStore.build_or_open(tmp_path / "humen.fa.gz", tmp_path)
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist either"):
        GenomeStore.build_or_open(tmp_path / "nowhere" / "x.fa", tmp_path)
    with pytest.raises(DataError, match=r"found a folder \(it holds human\.fa\.gz\)"):
        GenomeStore.build_or_open(tmp_path, tmp_path)


# Windows


def test_windows_of_a_ring_wrap_round(build):
    ring = build(">r\nACGTTGCAAC\n", circular=["r"])
    endless = "ACGTTGCAAC" * 8
    for start in range(-20, 20, 3):
        for size in (1, 4, 10, 11, 25, 40):
            assert text_of(ring.window("r", start, start + size)) == endless[20 + start : 20 + start + size]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (8, 11), (11, 12)])
def test_off_the_end_of_a_line(build, start, stop):
    line = build(">chr1\nACGTTGCAAC\n")
    with pytest.raises(
        DataError, match=rf"interval chr1:{start}-{stop} runs off the end of this linear contig; 'chr1' has 10 bases"
    ):
        line.window("chr1", start, stop)
    assert text_of(line.window("chr1", 0, 10)) == "ACGTTGCAAC"


def test_empty_interval_and_unknown_contig(build):
    line = build(">chr1\nACGT\n>chr2\nAC\n")
    with pytest.raises(DataError, match=r"chr1:2-2 is empty"):
        line.window("chr1", 2, 2)
    with pytest.raises(DataError, match=r"no contig is called 'chr3'; did you mean 'chr[12]'\?"):
        line.window("chr3", 0, 1)


def test_index_counts_and_refget_digest(build):
    found = build(">a\nACgtNNr\n>b\nacgt\n")
    first, second = found.contigs
    assert (first.unknown, first.soft_masked, second.soft_masked) == (3, 3, 4)
    assert second.digest == "SQ.aKF498dAxcJAqme6QYQ7EZ07-fiw8Kw2"  # of ACGT, in the refget specification
    assert (first.offset, second.offset, found.bases) == (0, 7, 11)


def test_embedded_genome_is_e_coli_and_a_ring(tmp_path):
    ecoli = GenomeStore.build_or_open("ecoli", tmp_path)
    (contig,) = ecoli.contigs
    assert (contig.name, contig.length, contig.circular, contig.unknown) == ("K-12-MG1655", 4_639_675, True, 0)
    start = text_of(ecoli.window(contig.name, contig.length - 3, contig.length + 5))
    assert start[3:] == "AGCTT" and start[:3] == text_of(ecoli.window(contig.name, -3, 0))


def test_circular_setting(build, tmp_path):
    assert [c.circular for c in build(">a\nAC\n>b\nAC\n", circular="all").contigs] == [True, True]
    with pytest.raises(DataError, match=r"no contig is called 'A'"):
        build(">a\nAC\n>b\nAC\n", circular=["A"])
    with pytest.raises(DataError, match=r"circular: found 'some'"):
        build(">a\nAC\n>b\nAC\n", circular="some")  # type: ignore[arg-type]


def test_several_files_are_one_genome(tmp_path):
    for name in ("x.fa", "y.fa"):
        (tmp_path / name).write_text(f">chr1\nACGT\n>{name[0]}\nGG\n")
    genome = Genome.open([tmp_path / "x.fa", tmp_path / "y.fa"], tmp_path / "c", ["y.fa:chr1"])
    assert [contig.circular for contig in genome.contigs] == [False, False, True, False]
    assert genome.bases == 12 and text_of(genome.read(3, 0, 2)) == "GG"
    with pytest.raises(DataError, match=r"'chr1' is in several of .*write it with its file, as 'x\.fa:chr1'"):
        genome.number("chr1")
    (tmp_path / "copy.fa").write_bytes((tmp_path / "x.fa").read_bytes())
    with pytest.raises(DataError, match=r"copy\.fa has the same content as .*x\.fa"):
        Genome.open([tmp_path / "x.fa", tmp_path / "copy.fa"], tmp_path / "c")
    with pytest.raises(DataError, match=r"is listed twice"):
        Genome.open([tmp_path / "x.fa", tmp_path / "x.fa"], tmp_path / "c")
    with pytest.raises(DataError, match=r"found an empty list"):
        Genome.open([], tmp_path / "c")


# The cache


def test_a_store_is_built_once_and_again_when_the_file_changes(build, monkeypatch):
    first = build(">a\nACGT\n")
    with monkeypatch.context() as patch:
        patch.setattr(store, "read_sequences", lambda *_: pytest.fail("built twice"))
        assert build(">a\nACGT\n").digest == first.digest
    changed = build(">a\nGGGG\n")
    assert changed.digest != first.digest and text_of(changed.window("a", 0, 4)) == "GGGG"
    assert text_of(first.window("a", 0, 4)) == "ACGT"


def test_a_built_store_opens_where_nothing_can_be_written(build, monkeypatch):
    first = build(">a\nACGT\n")
    monkeypatch.setattr(store, "locked", lambda *_: pytest.fail("took the lock"))
    monkeypatch.setattr(cache, "atomic_write", lambda *_: pytest.fail("wrote"))
    assert GenomeStore.build_or_open(first.path, first.path.parent / "cache").digest == first.digest


def test_an_unchanged_file_is_not_hashed_again(build, monkeypatch):
    found = build(">a\nACGT\n")
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda *_: pytest.fail("hashed twice"))
    again = GenomeStore.build_or_open(found.path, found.path.parent / "cache")
    assert again.digest == found.digest


def test_a_torn_store_is_not_believed(build):
    found = build(">a\nACGT\n")
    folder = found.path.parent / "cache"
    (bases,) = folder.glob("*.bases")
    bases.write_bytes(b"AC")
    assert text_of(build(">a\nACGT\n").window("a", 0, 4)) == "ACGT"
    (index,) = folder.glob("*-v1.json")
    index.write_text('{"bases": 4, "cont')
    assert text_of(build(">a\nACGT\n").window("a", 0, 4)) == "ACGT"
    assert json.loads(index.read_text())["bases"] == 4


def run_python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_killed_build_leaves_nothing_to_believe(tmp_path):
    path = tmp_path / "x.fa"
    path.write_text(">a\n" + "ACGT" * 1000 + "\n")
    code = """
        import sys, time
        from seqlong.datamodules.dna import store
        read = store.read_sequences
        def slow(*arguments):
            for item in read(*arguments):
                yield item
                print(flush=True)
            time.sleep(60)
        store.read_sequences = slow
        store.GenomeStore.build_or_open(sys.argv[1], sys.argv[2])
    """
    process = run_python(code, str(path), str(tmp_path / "cache"))
    process.stdout.readline()
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    leftovers = list((tmp_path / "cache").glob("*.tmp"))
    assert leftovers and not list((tmp_path / "cache").glob("*-v1.json"))
    found = GenomeStore.build_or_open(path, tmp_path / "cache")
    assert text_of(found.window("a", 3996, 4000)) == "ACGT"
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_several_processes_build_once(tmp_path):
    path = tmp_path / "x.fa"
    path.write_text(">a\n" + "ACGT" * 1000 + "\n")
    code = """
        import sys, time
        from seqlong.datamodules.dna import store
        read = store.read_sequences
        def slow(*arguments):
            print("building", flush=True)
            time.sleep(0.5)
            yield from read(*arguments)
        store.read_sequences = slow
        found = store.GenomeStore.build_or_open(sys.argv[1], sys.argv[2])
        print(found.window("a", 0, 4).tobytes().decode())
    """
    processes = [run_python(code, str(path), str(tmp_path / "cache")) for _ in range(3)]
    said = "".join(process.communicate()[0].decode() for process in processes)
    assert said.count("ACGT") == 3 and said.count("building") == 1


@pytest.mark.parametrize(
    ("mount", "reason"), [("size=1m", "the disk is full"), ("size=9m,ro", "the file system is read-only")]
)
def test_full_and_read_only_cache_folders(tmp_path, mount, reason):
    folder = tmp_path / "cache"
    folder.mkdir()
    path = tmp_path / "x.fa"
    path.write_text(">a\n" + "ACGT" * 500_000 + "\n")
    options = mount.split(",")[0]
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode:
        pytest.skip("may not mount a small file system here")
    code = "import sys; from seqlong.datamodules.dna.store import GenomeStore; GenomeStore.build_or_open(*sys.argv[1:])"
    script = f'mount -t tmpfs -o {mount} none "$1" && "$2" -c "{code}" "$3" "$1"; ls "$1" >&2'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", folder, sys.executable, path], capture_output=True, text=True
    )
    assert f"cannot write the cache folder {folder}: {reason}" in done.stderr
    assert "SEQLONG_CACHE" in done.stderr
    assert ".tmp" not in done.stderr.splitlines()[-1]


def test_cache_folder_that_is_a_file(tmp_path):
    path = tmp_path / "x.fa"
    path.write_text(">a\nAC\n")
    with pytest.raises(DataError, match=r"cannot write the cache folder .*x\.fa: it is a file"):
        GenomeStore.build_or_open(path, path)


def test_cache_folder_without_permission(tmp_path):
    path = tmp_path / "x.fa"
    path.write_text(">a\nAC\n")
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"permission is denied"):
        GenomeStore.build_or_open(path, folder)


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SEQLONG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "seqlong"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.default_cache_dir() == Path("/xdg/seqlong")
    monkeypatch.setenv("SEQLONG_CACHE", "/own")
    assert cache.default_cache_dir() == Path("/own")


def test_pickles_stay_small(tmp_path):
    ecoli = GenomeStore.build_or_open("ecoli", tmp_path)
    assert ecoli.data.size == 4_639_675
    copy = pickle.dumps(ecoli)
    assert len(copy) < 2_000
    assert (pickle.loads(copy).window("K-12-MG1655", 5, 900) == ecoli.window("K-12-MG1655", 5, 900)).all()


def test_soft_masked_and_many_contigs_of_real_genomes(shared_data, tmp_path):
    folder = shared_data / "dna" / "genomes"
    fly = GenomeStore.build_or_open(folder / "dm3_chr2R.fa.gz", tmp_path)
    assert (fly.bases, fly.contigs[0].soft_masked, fly.contigs[0].unknown) == (21_146_708, 2_224_455, 100)
    smut = GenomeStore.build_or_open(folder / "Umaydis.fasta.gz", tmp_path)
    assert (len(smut.contigs), smut.bases) == (36, 19_702_792)
    for contig in smut.contigs[:5]:
        assert contig.length == int(contig.name.split(":")[-1])
    with gzip.open(folder / "Umaydis.fasta.gz", "rt") as file:
        third = next(record for number, record in enumerate(SeqIO.parse(file, "fasta")) if number == 2)
    assert text_of(smut.window(third.id, 1_000_000, 1_000_500)) == str(third.seq[1_000_000:1_000_500])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet=IUPAC + IUPAC.lower(), min_size=1, max_size=60), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.integers(1, 40),
)
def test_what_is_written_is_what_is_read(sequences, width, ending, chunk):
    content = ""
    for number, sequence in enumerate(sequences):
        lines = [sequence[start : start + width] for start in range(0, len(sequence), width)]
        content += ending.join([f">r{number}", *lines]) + ending
    found = records(read_fasta(BytesIO(content.encode()), Path("x.fa"), chunk))
    assert found == {f"r{number}": sequence for number, sequence in enumerate(sequences)}
