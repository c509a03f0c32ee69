"""Labels of bases from GFF3 and GTF: what is read, how it turns with the strand, scores, and whole contigs as BED."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from seqlong.backbone import BackboneConfig
from seqlong.callbacks.checkpoints import CONFIG_KEY, DATA_KEY
from seqlong.datamodules.dna.annotation import AnnotationData
from seqlong.datamodules.dna.annotation_labels import BaseLabels
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import BlockSplit, Region
from seqlong.errors import ConfigError, DataError
from seqlong.inference.track import command
from seqlong.mixers import Mamba2
from seqlong.tasks import BaseLabelling
from seqlong.tasks.base_labels import LabelScores

LABELS = ["donor", "acceptor", "CDS", "UTR", "intron"]


def genome(folder: Path, size: int = 100, circular: str | tuple[()] = ()) -> Genome:
    random = np.random.default_rng(0)
    text = "".join(f">{name}\n{''.join(random.choice(list('ACGT'), length))}\n" for name, length in
                   (("chr1", size), ("chr2", 50)))  # fmt: skip
    (folder / "ref.fa").write_text(text)
    return Genome.open(folder / "ref.fa", folder / "cache", circular=circular)  # type: ignore[arg-type]


def line(kind: str, start: int, stop: int, strand: str = "+", said: str = "Parent=t1", contig: str = "1") -> str:
    return "\t".join((contig, "x", kind, str(start), str(stop), ".", strand, ".", said)) + "\n"


def shown(labels: BaseLabels, contig: int, reverse: bool = False) -> str:
    """Labels as letters: upper case for plus, lower case for minus."""
    letters = {name: name[0] for name in ("donor", "acceptor", "UTR", "intron", "CDS", "tRNA")}
    text = ""
    for code in labels.read(contig, 0, labels.genome.contigs[contig].length, reverse):
        name, _, strand = labels.names[code].partition("_")
        text += "." if name == "other" else letters[name].lower() if strand == "minus" else letters[name].upper()
    return text


GENE = (
    line("exon", 11, 20) + line("exon", 31, 45) + line("CDS", 15, 20) + line("CDS", 31, 40)
    + line("exon", 51, 55, "-", "Parent=t2,t3") + line("CDS", 70, 75, "-", "Parent=t2")
)  # fmt: skip
EXPECTED = (
    "." * 10 + "UUUU" + "CCCCCC" + "DDIIIIIIAA" + "CCCCCCCCCC" + "UUUUU" + "....." + "uuuuu" + "aa" + "i" * 10 + "dd"
    + "cccccc" + "." * 25
)  # fmt: skip


def test_genes_become_labels_on_their_strand(tmp_path: Path) -> None:
    ref = genome(tmp_path)
    (tmp_path / "a.gff3.gz").write_bytes(gzip.compress(f"##gff-version 3\n{GENE}##FASTA\n>x\nAC\n".encode()))
    labels = BaseLabels(ref, str(tmp_path / "a.gff3.gz"), LABELS)
    assert shown(labels, 0) == EXPECTED
    assert shown(labels, 0, reverse=True) == EXPECTED[::-1].swapcase()
    assert labels.contigs == [0]
    assert labels.notes == [
        "a.gff3.gz: contig '1' is 'chr1'",
        "a.gff3.gz: 1 contigs of the genome without a feature are not used: chr2",
    ]
    gtf = GENE.replace("Parent=t2,t3", 'transcript_id "t2";')
    for name in ("t1", "t2"):
        gtf = gtf.replace(f"Parent={name}", f'gene_id "g"; transcript_id "{name}"; exon_number 1')
    (tmp_path / "a.gtf").write_text(gtf)
    assert shown(BaseLabels(ref, str(tmp_path / "a.gtf"), LABELS), 0) == EXPECTED
    plain = BaseLabels(ref, str(tmp_path / "a.gtf"), LABELS, stranded=False)
    assert plain.names == ["other", *LABELS]
    assert shown(plain, 0) == EXPECTED.upper()
    assert shown(plain, 0, reverse=True) == EXPECTED[::-1].upper()
    for start, stop in ((0, 1), (13, 14), (12, 33), (99, 100)):
        np.testing.assert_array_equal(labels.read(0, start, stop), labels.read(0, 0, 100)[start:stop])
    assert labels.counts([Region(0, 0, 100)])[1:3].tolist() == [2, 2]


def test_a_slip_is_no_intron_and_a_ring_goes_round(tmp_path: Path) -> None:
    ref = genome(tmp_path, circular="all")
    (tmp_path / "a.gff").write_text(
        line("CDS", 11, 20) + line("CDS", 22, 30) + line("tRNA", 91, 105, "-", "ID=r") + line("CDS", 1, 3, "+", "ID=q")
    )
    labels = BaseLabels(ref, str(tmp_path / "a.gff"), ["CDS", "tRNA", "intron"])
    assert shown(labels, 0) == "CCCtt" + "." * 5 + "C" * 10 + "." + "C" * 9 + "." * 60 + "t" * 10
    assert labels.notes[-1] == "a.gff: no base is intron; the file has CDS (3), tRNA (1)"
    np.testing.assert_array_equal(labels.read(0, 95, 108), np.r_[[4] * 5, [1] * 3, [4] * 2, [0] * 3])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (GENE + "1 x CDS 1 2\n", r"a\.gff:7: found 1 columns; expected the nine .* data.bad_lines=skip"),
        (line("CDS", 5, 4), r"a\.gff:1: found 5 to 4; expected 1 <= start <= end"),
        ("#\n" + line("CDS", 5, 9, "x"), r"a\.gff:2: found strand 'x'"),
        (line("CDS", 5, 9).replace("5", "five"), r"a\.gff:1: found 'five' to '9'; expected two numbers"),
        (line("CDS", 5, 101), r"a\.gff:1: to 101 on chr1, which has 100; so do 1 features: .* another assembly"),
        (line("CDS", 5, 9, contig="chrZ"), r"none of its contigs \(chrZ\).*'data.rename=\{chrZ: chr1\}'"),
        (line("gene", 5, 9), r"no base is donor or acceptor or CDS or UTR or intron; the file has gene \(1\)"),
        ("##gff-version 3\n\n", r"a\.gff: no features"),
    ],
    ids=["columns", "order", "strand", "number", "past", "contig", "labels", "empty"],
)
def test_bad_files_are_named(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.gff").write_text(text)
    with pytest.raises(DataError, match=complaint):
        BaseLabels(genome(tmp_path), str(tmp_path / "a.gff"), LABELS)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.gff").write_text(
        GENE + "broken\n" + line("CDS", 99, 101) + line("CDS", 80, 82, ".") + line("CDS", 1, 9, contig="un")
    )
    labels = BaseLabels(genome(tmp_path), str(tmp_path / "a.gff"), LABELS, bad_lines="skip")
    assert shown(labels, 0) == EXPECTED
    said = " | ".join(labels.notes)
    for part in ("1 lines passed over", "a.gff:7: found 1 columns", "1 contigs left out, for the genome lacks them: un",
                 "1 features past the end", "a.gff:8: to 101 on chr1",
                 "1 features without a strand", "a.gff:9"):  # fmt: skip
        assert part in said
    with pytest.raises(ConfigError, match=r"data\.labels is"):
        BaseLabels(labels.genome, str(tmp_path / "a.gff"), ["CDS", "CDS"])


def toy(folder: Path) -> AnnotationData:
    """CDS_plus wherever there is a G, CDS_minus wherever there is a C."""
    genome(folder, 4000)
    letters = (folder / "ref.fa").read_text().split("\n")[1]
    (folder / "a.gff").write_text("".join(
        line("CDS", n + 1, n + 1, {"G": "+", "C": "-"}[base], f"ID={n}") for n, base in enumerate(letters)
        if base in "GC"
    ))  # fmt: skip
    return AnnotationData(
        str(folder / "ref.fa"), str(folder / "a.gff"), ["CDS"], length=128, batch_size=6,
        split=BlockSplit(block_bases=400, gap_bases=10), cache_dir=str(folder / "cache"),
    )  # fmt: skip


def test_labels_turn_with_windows_and_a_floor_is_fitted(tmp_path: Path) -> None:
    data = toy(tmp_path)
    turned = 0
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert batch.targets is not None and batch.tokens is not None
        for row, where in enumerate(batch.source or []):
            turned += where.endswith("-")
            inside = batch.tokens[row] > 0
            expected = torch.tensor([0, 0, 0, 0, 0, 2, 1, 0, 0])[batch.tokens[row]]  # C, G of what is read
            if batch.index[row] >= 0:
                assert torch.equal(batch.targets[row][inside], expected[inside])
            assert (batch.targets[row][~inside] == -1).all()
    assert turned > 0
    with torch.inference_mode():
        share, letters = data.floors()
    assert letters["bits"] < 0.3 * share["bits"]  # type: ignore[operator]
    assert min(letters["test"]["f1"]) > 0.95  # type: ignore[index]
    assert sum(data.prior) == pytest.approx(1)
    assert {region.contig for part in data.split.regions.values() for region in part} == {0}


def tiny(labels: list[str], balance: float = 0.5) -> BaseLabelling:
    torch.manual_seed(5)
    mixers = {"m": partial(Mamba2, d_state=8, head_dim=8)}
    task = BaseLabelling(BackboneConfig(d_model=16, pattern="m", mixers=mixers), labels, balance=balance, width=8)
    task.backbone.embedding.weight.data.mul_(30)
    task.head.last.weight.data.mul_(50)
    return task


def test_the_loss_and_the_scores(tmp_path: Path) -> None:
    data = toy(tmp_path)
    batch = next(iter(data.train_dataloader()))
    for balance in (0.0, 1.0):
        task = tiny(["CDS"], balance)
        share = torch.tensor([0.9, 0.08, 0.02])
        task.start_from(share, torch.tensor([0, 2, 1]))
        assert float((share * task.weights).sum()) == pytest.approx(1)
        assert float(task.weights[2] / task.weights[1]) == pytest.approx(4**balance)
        loss, figures = task.objective(batch)
        said, known = task(batch), batch.targets >= 0
        p = said[known].gather(1, batch.targets[known][:, None])[:, 0]
        assert float(loss) == pytest.approx(float((-p.log() * task.weights[batch.targets[known]]).mean()), rel=1e-4)
        assert float(figures["nats"]) == pytest.approx(float(-p.log().sum()), rel=1e-4)
    scores = LabelScores(3)
    said = torch.tensor([[[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]])
    scores.update(said, torch.tensor([[0, 1, 0, -1]]))
    found = scores.compute()
    assert float(found["accuracy"]) == pytest.approx(2 / 3)
    assert float(found["bits"]) == pytest.approx(-np.log2([0.7, 0.6, 0.2]).mean())
    np.testing.assert_allclose(found["f1"], [2 / 3, 2 / 3, np.nan], rtol=1e-5)
    np.testing.assert_allclose(found["auprc"], [5 / 6, 1 / 2, np.nan], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"the data has 3 labels \(other, CDS_plus, CDS_minus\), the task 5"):
        tiny(["CDS", "UTR"]).check_data(data)


def test_whole_contigs_as_bed(tmp_path: Path) -> None:
    path = genome(tmp_path).stores[0].path
    task = tiny(["CDS"])
    task.start_from(torch.tensor([0.4, 0.3, 0.3]), torch.tensor([0, 2, 1]))
    mixers = {"m": {"class_path": "seqlong.mixers.Mamba2", "init_args": {"d_state": 8, "head_dim": 8}}}
    given = {"backbone": {"d_model": 16, "pattern": "m", "mixers": mixers}, "labels": ["CDS"], "width": 8}
    config = {
        "model": {"class_path": "seqlong.tasks.BaseLabelling", "init_args": given},
        "data": {"class_path": "seqlong.datamodules.dna.annotation.AnnotationData", "init_args": {"length": 64}},
    }
    card = {"tracks": [{"name": name} for name in ("other", "CDS_plus", "CDS_minus")]}
    torch.save({"state_dict": task.state_dict(), CONFIG_KEY: config, DATA_KEY: card}, tmp_path / "c.ckpt")
    words = [str(path), "--ckpt", str(tmp_path / "c.ckpt"), "--device", "cpu", "--chunk", "24"]
    assert command([*words, "--output", str(tmp_path / "said.npy")]) == 0
    assert command([*words, "--output", str(tmp_path / "said.bed")]) == 0
    said = np.load(tmp_path / "said.npy")
    np.testing.assert_allclose(said.sum(1), 1, rtol=1e-5)
    best, found = said.argmax(1), np.zeros(150, dtype=int)
    for row in (tmp_path / "said.bed").read_text().splitlines():
        contig, start, stop, name, score, strand = row.split("\t")
        first = {"chr1": 0, "chr2": 100}[contig] + int(start)
        part = slice(first, first + int(stop) - int(start))
        assert name == "CDS" and not found[part].any()
        found[part] = {"+": 1, "-": 2}[strand]
        assert int(score) == pytest.approx(1000 * said[part].max(1).mean(), abs=1)
    assert len(set(best)) == 3
    np.testing.assert_array_equal(found, best)
