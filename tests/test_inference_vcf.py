"""``seqlong score`` on files: what is wrong is counted and named, what was stopped goes on, output is whole."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from inference_cases import causal_model, save_checkpoint

pysam = pytest.importorskip("pysam", reason="VCF files need pysam")

from seqlong.cli import main  # noqa: E402
from seqlong.datamodules.dna.genome import Genome  # noqa: E402
from seqlong.errors import DataError, SeqlongError  # noqa: E402
from seqlong.inference import score as verb  # noqa: E402
from seqlong.inference.contigs import Contigs, Place, aliases  # noqa: E402
from seqlong.inference.journal import Journal  # noqa: E402
from seqlong.inference.truth import auroc  # noqa: E402
from seqlong.inference.variants import Window  # noqa: E402
from seqlong.inference.vcf import survey  # noqa: E402

SETTINGS = verb.Settings((Window(64), Window(128)), batch=2)
BASES = "".join(np.random.default_rng(5).choice(list("ACGT"), 600))
HEAD = "##fileformat=VCFv4.2\n##contig=<ID=1>\n##contig=<ID=un>\n##INFO=<ID=CLASS,Number=1,Type=String,Description=x>\n"
COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def line(pos: int, ref: str, alt: str, contig: str = "1", info: str = ".") -> str:
    return f"{contig}\t{pos}\t.\t{ref}\t{alt}\t.\t.\t{info}\n"


def other(base: str) -> str:
    return "ACGT"[("ACGT".index(base) + 1) % 4]


def snv(pos: int, info: str = ".") -> str:
    return line(pos, BASES[pos - 1], other(BASES[pos - 1]), info=info)


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    (tmp_path / "ref.fa").write_text(f">chr1\n{BASES}\n>2\nACGTACGT\n")
    return Genome.open(tmp_path / "ref.fa", tmp_path / "cache")


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "in.vcf"
    path.write_text(HEAD + COLUMNS + "".join(lines))
    return path


def table(path: Path) -> list[dict[str, str]]:
    rows = [row.split("\t") for row in path.read_text().splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def test_every_record_is_written_with_its_scores(tmp_path: Path, genome: Genome) -> None:
    ref = BASES[99:102]
    source = written(
        tmp_path,
        snv(50),
        line(100, ref, f"{other(ref[0])}{ref[1:]},{ref[0]},{ref}GT,<DEL>"),  # SNV, deletion, insertion, symbolic
        line(200, BASES[199], "."),
        line(10, "A", "C", contig="un"),
        line(300, "N", "C"),
    )
    verb.score_file(causal_model(), genome, source, SETTINGS, tmp_path / "o.vcf.gz", tmp_path / "o.tsv", "skip")
    rows = table(tmp_path / "o.tsv")
    assert [row["status"] for row in rows] == [
        "ok", "ok", "ok", "ok", "symbolic", "no_alt", "contig_absent", "ref_mismatch",
    ]  # fmt: skip
    assert [row["llr_64"] == "." for row in rows] == [row["status"] != "ok" for row in rows]
    for row in rows[:4]:
        assert float(row["llr_128"]) == pytest.approx((float(row["forward_128"]) + float(row["reverse_128"])) / 2)
    with pysam.VariantFile(str(tmp_path / "o.vcf.gz")) as file:
        found = list(file)
    assert [(r.pos, r.alts) for r in found] == [(r.pos, r.alts) for r in pysam.VariantFile(str(source))]
    assert found[1].info["SL_STATUS"] == ("ok", "ok", "ok", "symbolic")
    expected = [pytest.approx(float(row["llr_64"]), rel=1e-5) for row in rows[1:4]]
    assert found[1].info["SL_LLR_64"] == (*expected, None)
    assert "SL_STATUS" not in found[0].info and "SL_LLR_64" not in found[2].info
    assert not list(tmp_path.glob(".*")), "nothing half-done is left behind"


def test_all_that_is_wrong_is_counted_and_named(tmp_path: Path, genome: Genome) -> None:
    wrong = other(BASES[49])
    source = written(
        tmp_path, snv(60), snv(40), line(50, wrong, BASES[49]), line(10, "A", "C", contig="chr9"),
        line(599, BASES[598:] + "AC", "A"), line(70, BASES[69], "A" * 40), line(71, BASES[70], "R"),
        line(72, BASES[71], "*"), snv(80),
    )  # fmt: skip
    tally, contigs = survey(source, genome, 20)
    said = "\n".join(tally.lines(contigs))
    assert (tally.records, tally.alleles, tally.unsorted, tally.swapped) == (9, 9, 3, 1)
    assert dict(tally.counts) == {
        "ok": 3, "ref_mismatch": 1, "contig_absent": 1, "out_of_range": 1, "too_long": 1, "unknown_base": 1,
        "symbolic": 1,
    }  # fmt: skip
    assert f"1:50 {wrong}>{BASES[49]} (the reference has {BASES[49]})" in said
    assert "chr9:10 A>C" in said and "did you mean" in said
    assert "contig '1' is read from 'chr1'" in said and "3 of 9 records out of order" in said


def test_unsorted_records_are_scored_and_keep_their_order(tmp_path: Path, genome: Genome) -> None:
    positions = [300, 100, 500, 101, 400]
    verb.score_file(
        causal_model(), genome, written(tmp_path, *map(snv, positions)), SETTINGS, tmp_path / "o.vcf.gz",
        tmp_path / "u.tsv",
    )  # fmt: skip
    verb.score_file(
        causal_model(), genome, written(tmp_path, *map(snv, sorted(positions))), SETTINGS, None, tmp_path / "s.tsv"
    )
    one, two = table(tmp_path / "u.tsv"), table(tmp_path / "s.tsv")
    assert [int(row["pos"]) for row in one] == positions
    assert sorted(one, key=lambda row: int(row["pos"])) == two


def test_a_ref_that_is_not_the_reference_stops_unless_skipped(tmp_path: Path, genome: Genome) -> None:
    source = written(tmp_path, snv(50), line(60, other(BASES[59]), "A"))
    with pytest.raises(DataError, match=r"1 of 2 alleles have a REF.*1:60.*--ref-mismatch skip"):
        verb.score_file(causal_model(), genome, source, SETTINGS, tmp_path / "o.vcf")
    assert not (tmp_path / "o.vcf").exists()
    verb.score_file(causal_model(), genome, source, SETTINGS, tmp_path / "o.vcf", None, "skip")
    assert (tmp_path / "o.vcf").read_text().count("SL_STATUS=ref_mismatch") == 1


def test_a_file_without_anything_to_score_is_an_error(tmp_path: Path, genome: Genome) -> None:
    with pytest.raises(DataError, match="none of its 1 alleles can be scored"):
        verb.score_file(
            causal_model(), genome, written(tmp_path, line(9, "A", "C", "un")), SETTINGS, tmp_path / "o.vcf"
        )
    with pytest.raises(DataError, match="no records"):
        verb.score_file(causal_model(), genome, written(tmp_path), SETTINGS, tmp_path / "o.vcf")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read as VCF"),
        (b"not a VCF\n", "cannot be read as VCF"),
        ((HEAD + COLUMNS + snv(50) + snv(60)[:-4]).encode(), "ends in the middle of a line"),
        ((HEAD + COLUMNS + snv(50) + "1\tsixty\n").encode(), r"record 2 cannot be read \(after 1:50\)"),
    ],
)
def test_files_that_are_cut_short_or_damaged(tmp_path: Path, genome: Genome, content: bytes, complaint: str) -> None:
    (tmp_path / "in.vcf").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        survey(tmp_path / "in.vcf", genome, 20)


def test_a_bgzip_file_without_its_last_block_is_cut_short(tmp_path: Path, genome: Genome) -> None:
    plain = written(tmp_path, *(snv(pos) for pos in range(1, 590)))
    pysam.tabix_compress(str(plain), str(tmp_path / "in.vcf.gz"))
    whole = (tmp_path / "in.vcf.gz").read_bytes()
    assert survey(tmp_path / "in.vcf.gz", genome, 20)[0].records == 589
    (tmp_path / "in.vcf.gz").write_bytes(whole[:-28])
    with pytest.raises(DataError, match="cut short: its last block is missing"):
        survey(tmp_path / "in.vcf.gz", genome, 20)
    (tmp_path / "in.vcf.gz").write_bytes(gzip.compress(plain.read_bytes())[:-200])
    with pytest.raises(DataError, match=r"cut short|cannot be read"):
        survey(tmp_path / "in.vcf.gz", genome, 20)


def test_an_interrupted_command_goes_on_without_losing_or_repeating(
    tmp_path: Path, genome: Genome, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path, *(snv(pos) for pos in range(100, 200, 10)))
    verb.score_file(causal_model(), genome, source, SETTINGS, None, tmp_path / "whole.tsv")
    scored, real = [], verb.score_alleles

    def stop(model, genome, found, settings):  # type: ignore[no-untyped-def]
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(len(found))
        return real(model, genome, found, settings)

    monkeypatch.setattr(verb, "score_alleles", stop)
    with pytest.raises(KeyboardInterrupt):
        verb.score_file(causal_model(), genome, source, SETTINGS, None, tmp_path / "out.tsv")
    assert not (tmp_path / "out.tsv").exists()
    partial = tmp_path / ".out.tsv.partial"
    with partial.open("ab") as file:
        file.write(b"6\tok\t1\t1\n" * 500 + b"7\tok")  # and the machine went down in the middle of a line
    counted = []
    monkeypatch.setattr(verb, "score_alleles", lambda *a: counted.append(len(a[2])) or real(*a))
    verb.score_file(causal_model(), genome, source, SETTINGS, None, tmp_path / "out.tsv")
    assert sum(scored) + sum(counted) == 10 and sum(counted) == 4
    assert table(tmp_path / "out.tsv") == table(tmp_path / "whole.tsv") and not partial.exists()


def test_the_results_of_another_command_are_not_gone_on_with(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {"windows": 1}) as journal:
        journal.add(["a"], 1)
    with pytest.raises(DataError, match=r"another command's results: windows was 1, is 2"):
        Journal(tmp_path / "j", {"windows": 2})
    with Journal(tmp_path / "j", {"windows": 1}) as journal:
        assert journal.done == 1 and list(journal.lines()) == ["a"]


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ("1", "chr1"), ("chr1", "1"), ("chrM", "MT"), ("MT", "chrM"), ("NC_000017.11", "chr17"),
        ("chrX", "NC_000023.10"), ("NC_012920.1", "MT"), ("X", "NC_000023.11"), ("U00096.3", "U00096"),
    ],
)  # fmt: skip
def test_contigs_are_found_under_their_other_names(asked: str, there: str) -> None:
    assert there in aliases(asked) and asked not in aliases(asked)


def test_contigs_are_renamed_as_asked(tmp_path: Path, genome: Genome) -> None:
    contigs = Contigs(genome, {"weird": "2", "chr1": "2"})
    assert contigs.find("weird") == Place(1) and contigs.find("chr1") == Place(1) and contigs.find("1") == Place(0)
    with pytest.raises(DataError, match=r"--rename a=chr2: the reference has no contig 'chr2'; did you mean 'chr1'"):
        Contigs(genome, {"a": "chr2"})
    source = written(tmp_path, line(2, "C", "G", contig="un"))
    assert survey(source, genome, 20, {"un": "2"})[0].counts["ok"] == 1


def test_a_cut_out_region_is_part_of_its_contig(tmp_path: Path) -> None:
    (tmp_path / "r.fa").write_text(f">chr17:1001-1600 cut out\n{BASES}\n>chr18:1-5\nACGTACGT\n")
    contigs = Contigs(Genome.open(tmp_path / "r.fa", tmp_path / "cache"))
    assert contigs.find("17", 1000) == Place(0, 1000) and contigs.find("chr17", 1599) == Place(0, 1000)
    assert contigs.find("chr17", 999) is None and contigs.find("chr17", 1600) is None
    assert contigs.find("chr18", 2) is None, "a region whose length is another is no region"
    source = tmp_path / "in.vcf"
    source.write_text(HEAD + COLUMNS + line(1050, BASES[49], "A" if BASES[49] != "A" else "C", contig="17"))
    assert survey(source, contigs.genome, 20)[0].counts["ok"] == 1


def test_auroc_of_ties_and_orders() -> None:
    assert auroc([0, 0, 1, 1], [1, 2, 3, 4]) == 1 and auroc([1, 1, 0, 0], [1, 2, 3, 4]) == 0
    assert auroc([0, 1, 0, 1], [1, 1, 1, 1]) == 0.5 and auroc([0, 1, 1], [1, 1, 2]) == 0.75


def test_the_command(tmp_path: Path, genome: Genome, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path)
    written(tmp_path, *(snv(pos, f"CLASS={'LOF' if pos % 4 else 'FUNC'}") for pos in range(100, 140, 3)))
    words = ["score", "in.vcf", "--ref", "ref.fa", "--ckpt", "last", "--window", "64"]
    assert main([*words, "--truth", "CLASS=LOF"]) == 0
    assert Path("in.scored.vcf.gz").is_file() and Path("in.scored.vcf.gz.tbi").is_file()
    said = capsys.readouterr()
    assert "14 of 14 alleles scored" in said.out and "AUROC" in said.out and "SL_LLR_64" in said.out
    for more, complaint in (
        (["--window", "8"], "too short"),
        (["--truth", "CLASS"], "INFO field and its value"),
        (["--ckpt", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["--rename", "MT"], "expected VCF's name"),
        (["--output", "x.txt"], "ends in .vcf.gz"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--window", "many"], "'many' is not a whole number"),
    ):
        assert main([*words, *more]) == 2
        assert complaint in capsys.readouterr().err
    assert issubclass(DataError, SeqlongError)
