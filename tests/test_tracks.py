"""Tracks along a genome: files, bins, strands, losses, scores, and whole contigs in parts."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.regression import spearman_corrcoef

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.callbacks.checkpoints import CONFIG_KEY, DATA_KEY
from seqlong.datamodules.dna.alphabet import C, DnaVocabulary, G
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import BlockSplit, Region
from seqlong.datamodules.dna.tracks import TrackData
from seqlong.datamodules.dna.tracks_files import open_signals
from seqlong.datamodules.dna.tracks_values import Squash, Tracks
from seqlong.errors import ConfigError, DataError
from seqlong.inference import load
from seqlong.inference.model import Model
from seqlong.inference.passes import Plan
from seqlong.inference.predict_tracks import Predictor
from seqlong.inference.track import command
from seqlong.mixers import Attention, Mamba2
from seqlong.tasks import TrackPrediction
from seqlong.tracks import TrackBatch, correlations

pyBigWig = pytest.importorskip("pyBigWig")


def write_genome(folder: Path, sizes: dict[str, int], seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    path = folder / "ref.fa"
    letters = {name: "".join(random.choice(list("ACGT"), size)) for name, size in sizes.items()}
    path.write_text("".join(f">{name}\n{text}\n" for name, text in letters.items()))
    return path


def write_bigwig(path: Path, sizes: dict[str, int], entries: list[tuple[str, int, int, float]]) -> Path:
    file = pyBigWig.open(str(path), "w")
    file.addHeader(list(sizes.items()))
    for contig, start, stop, value in entries:
        file.addEntries([contig], [start], ends=[stop], values=[value])
    file.close()
    return path


def test_every_format_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.wig").write_text(
        "track type=wiggle_0\n# said\nvariableStep chrom=one span=2\n3 1.5\n9 0\n"
        "fixedStep chrom=two start=5 step=3\n1\n2.5\n"
    )
    (tmp_path / "b.bedgraph.gz").write_bytes(
        gzip.compress(b"one\t8\t10\t0\ntwo\t4\t5\t1\ntwo\t7\t8\t2.5\none\t2\t4\t1.5\n")  # not in order
    )
    rows = ["one 3 1.5", "one 4 1.5", "one 5 nan", "one 9 0", "one 10 0", "two 5 1", "two 8 2.5"]
    (tmp_path / "c.tsv").write_text("contig position signal\n" + "\n".join(rows) + "\n")
    (tmp_path / "d.csv").write_text("\n".join(row.replace(" ", ",") for row in rows) + "\n")
    entries = [("one", 2, 4, 1.5), ("one", 8, 10, 0.0), ("two", 4, 5, 1.0), ("two", 7, 8, 2.5)]
    write_bigwig(tmp_path / "e.bw", {"one": 20, "two": 10}, entries)
    n = np.nan
    for name in ("a.wig", "b.bedgraph.gz", "c.tsv", "d.csv", "e.bw"):
        (signal,) = open_signals(tmp_path / name)
        np.testing.assert_array_equal(signal.read("one", 1, 11), [n, 1.5, 1.5, n, n, n, n, 0, 0, n])
        np.testing.assert_array_equal(signal.read("two", 4, 9), [1, n, n, 2.5, n])
        np.testing.assert_array_equal(signal.read("one", 3, 4), [1.5])
        assert signal.lowest.value == 0
    (tmp_path / "two.tsv").write_text("contig\tposition\tx\ty\none\t3\t1\tnan\none\t4\t2\t5\n")
    assert [signal.name for signal in open_signals(tmp_path / "two.tsv", "lab")] == ["lab_x", "lab_y"]


def test_long_wig_runs_go_on_where_they_were(tmp_path: Path) -> None:
    count = 40_000  # more than is read at once
    lines = "\n".join(str(value) for value in range(count))
    (tmp_path / "a.wig").write_text(f"fixedStep chrom=c start=11 step=2\n{lines}\n")
    (signal,) = open_signals(tmp_path / "a.wig")
    assert signal.read("c", 10 + 2 * 39_999, 11 + 2 * 39_999).tolist() == [39_999]
    assert signal.contigs() == {"c": (11 + 2 * 39_999, False, f"{tmp_path}/a.wig:40001")}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.wig", "1\n", r"a\.wig:1: found '1'; expected fixedStep or variableStep"),
        ("a.wig", "variableStep chrom=one\n5 1\nx 2\n", r"a\.wig:3: found 'x 2'; expected a position and a value"),
        ("a.wig", "variableStep\n5 1\n", r"a\.wig:1: found 'variableStep'; expected variableStep chrom=NAME"),
        ("a.wig", "variableStep chrom=one\n0 1\n", r"a\.wig:2: found a position below 1"),
        ("a.bedgraph", "one 5 5 1\n", r"a\.bedgraph:1: found 5 to 5; expected start < stop"),
        ("a.bedgraph", "one 5 9 1\none 8 10 2\n", r"a\.bedgraph:2: one:9 has a value already, from line 1"),
        ("a.bedgraph", "one 5 9 inf\n", r"a\.bedgraph:1: found an infinite value"),
        ("a.bedgraph", "one 5 9 1\none 95 101 2\n", r"a\.bedgraph:2: contig 'one' has a value at 101, but .* has 100"),
        ("a.bedgraph", "three 5 9 1\n", r"none of its contigs \(three\).*'data.rename=\{three: one\}'"),
        ("a.tsv", "one 5\n", r"a\.tsv:1: found 2 columns; expected contig, position"),
        ("a.tsv", "one 5 nan\n", r"track 'a' has no values"),
        ("a.tsv", "", r"a\.tsv is empty"),
        ("a.wiggle", "", r"its name says nothing that is known"),
        ("a.bw", "no bigWig", r"a\.bw cannot be read as a bigWig"),
    ],
)
def test_bad_files_are_named(name: str, text: str, complaint: str, tmp_path: Path) -> None:
    genome = Genome.open(write_genome(tmp_path, {"one": 100, "two": 50}), tmp_path / "cache")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=complaint):
        Tracks(genome, [str(tmp_path / name)])


def test_a_bigwig_of_another_assembly_is_refused(tmp_path: Path) -> None:
    genome = Genome.open(write_genome(tmp_path, {"chr1": 100, "chr2": 50}), tmp_path / "cache")
    other = write_bigwig(tmp_path / "o.bw", {"1": 100, "2": 51}, [("1", 0, 5, 1.0)])
    with pytest.raises(
        DataError, match=r"contig '2' has 51 bases, but 'chr2' of the genome has 50; .*another assembly"
    ):
        Tracks(genome, [str(other)])
    part = write_bigwig(tmp_path / "p.bw", {"1": 100, "un": 7}, [("1", 0, 5, 1.0)])
    tracks = Tracks(genome, {"cov": str(part)})
    assert tracks.contigs == [0]
    assert tracks.notes == [
        "p.bw: contig '1' is 'chr1'",
        "p.bw: left out, for the genome lacks them: un",
        "p.bw: no values on chr2; these are not used",
    ]
    with pytest.raises(ConfigError, match="there is no track 'minus'; they are cov"):
        Tracks(genome, {"cov": str(part)}, pairs=[["cov", "minus"]])
    empty = write_bigwig(tmp_path / "q.bw", {"chr1": 100}, [])
    with pytest.raises(DataError, match="the bigWig has no values"):
        Tracks(genome, [str(empty)])


def stranded(folder: Path, size: int = 3000) -> TrackData:
    """One where the strand that is read has G (plus) or the other one (minus); nothing measured at every 7th base."""
    path = write_genome(folder, {"one": size, "two": 90})
    letters = path.read_text().split("\n")[1]
    for name, letter in (("plus", "G"), ("minus", "C")):
        lines = [f"one {n + 1} {int(base == letter)}" for n, base in enumerate(letters) if n % 7]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return TrackData(
        str(path), {name: str(folder / f"{name}.tsv") for name in ("plus", "minus")}, 1, pairs=[["plus", "minus"]],
        length=128, batch_size=6, split=BlockSplit(block_bases=300, gap_bases=10), cache_dir=str(folder / "cache"),
    )  # fmt: skip


def test_tracks_turn_with_the_strand(tmp_path: Path) -> None:
    data = stranded(tmp_path)
    turned = 0
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert isinstance(batch, TrackBatch) and batch.tracks is not None and batch.tokens is not None
        for row, where in enumerate(batch.source or []):
            turned += where.endswith("-")
            known = ~batch.tracks[row].isnan().any(-1)
            assert 0.8 < known[batch.tokens[row] > 0].float().mean() < 0.9
            assert torch.equal(batch.tracks[row, known, 0] == 1, batch.tokens[row, known] == G)
            assert torch.equal(batch.tracks[row, known, 1] == 1, batch.tokens[row, known] == C)
    assert turned > 0
    assert {region.contig for part in data.split.regions.values() for region in part} == {0}


def test_bins_of_a_ring_with_gaps(tmp_path: Path) -> None:
    path = write_genome(tmp_path, {"one": 10})
    (tmp_path / "a.bedgraph").write_text("one 0 3 4\none 8 9 9\n")
    genome = Genome.open(path, tmp_path / "cache", circular="all")
    n = np.nan
    for summary, missing, expected in (
        ("mean", "mask", [9, 4, n]),
        ("sum", "mask", [9, 8, n]),
        ("max", "zero", [9, 4, 0]),
        ("mean", "zero", [4.5, 4, 0]),
    ):
        tracks = Tracks(genome, [str(tmp_path / "a.bedgraph")], 2, summary, missing)  # type: ignore[arg-type]
        found = tracks.bins(0, 8, 14)[:, 0]
        np.testing.assert_allclose(found, np.array([expected[0], 4 if summary != "sum" else 8, {"sum": 4, "max": 4}.get(
            summary, 2 if missing == "zero" else 4)]))  # fmt: skip
        np.testing.assert_allclose(tracks.bins(0, 4, 6)[:, 0], expected[2:])
    assert Tracks(genome, [str(tmp_path / "a.bedgraph")], 4).aligned([Region(0, 1, 9), Region(0, 5, 7)]) == [
        Region(0, 4, 8)
    ]


def test_squashing_has_an_inverse() -> None:
    values = np.array([0, 0.5, 3, 80, 1e5, np.nan], dtype=np.float32)
    squash = Squash(0.75, 20.0)
    found = squash.forward(values)
    assert found[3] == pytest.approx(20 - 1 + (80**0.75 - 20 + 1) ** 0.5)
    np.testing.assert_allclose(squash.back(found), values, rtol=1e-4)


def tiny(strands: str = "both", loss: str = "poisson", tracks: int = 2, size: int = 4) -> TrackPrediction:
    mixers = {"m": partial(Mamba2, d_state=8, head_dim=8), "a": partial(Attention, heads=2, window=24)}
    torch.manual_seed(5)
    task = TrackPrediction(
        BackboneConfig(d_model=16, pattern="ma", mixers=mixers), tracks, size, loss, 0.2, strands, 8  # type: ignore[arg-type]
    )  # fmt: skip
    task.backbone.embedding.weight.data.mul_(30)
    task.head.last.weight.data.mul_(50)
    task.swap.copy_(torch.arange(tracks).flip(0))
    return task.eval().requires_grad_(False).double()


def test_losses_are_what_they_say() -> None:
    torch.manual_seed(0)
    said, truth = torch.rand(2, 5, 3, dtype=torch.float64) + 0.1, torch.rand(2, 5, 3, dtype=torch.float64) * 3
    truth[0, 1:3, 0] = torch.nan
    truth[1, :, 2] = torch.nan
    expected = {"poisson": 0.0, "poisson_multinomial": 0.0, "squared": 0.0}
    for row in range(2):
        for track in range(3):
            pairs = [(s, y) for s, y in zip(said[row, :, track], truth[row, :, track], strict=True) if not y.isnan()]
            total, all_said = sum(float(y) for _, y in pairs), sum(float(s) for s, _ in pairs)
            for s, y in pairs:
                expected["poisson"] += float(s - y * s.log())
                expected["squared"] += float((s - y) ** 2 / 2)
                expected["poisson_multinomial"] -= float(y * (s / all_said).log())
            if pairs:
                expected["poisson_multinomial"] += 0.2 * (all_said - total * np.log(all_said))
    for loss, value in expected.items():
        assert float(tiny(loss=loss, tracks=3).nats(said, truth)) == pytest.approx(value), loss
    whole = tiny(loss="poisson_multinomial", tracks=3)
    whole.total_weight = 1.0
    assert float(whole.nats(said, truth)) == pytest.approx(expected["poisson"])


def test_the_other_strand_gives_the_same_answer_in_packed_rows() -> None:
    task = tiny()
    tokens = torch.randint(4, 8, (1, 40))
    ids = torch.tensor([[1] * 12 + [2] * 20 + [0] * 8], dtype=torch.int32)
    other = tokens.clone()
    for start, stop in ((0, 12), (12, 32)):
        other[0, start:stop] = task.complement[tokens[0, start:stop].flip(0)]
    here = task(SequenceBatch(tokens=tokens, segment_ids=ids))
    there = task(SequenceBatch(tokens=other, segment_ids=ids))
    for start, stop in ((0, 3), (3, 8)):
        assert torch.allclose(here[0, start:stop], there[0, start:stop].flip(0)[:, [1, 0]], atol=1e-10)
    assert not torch.allclose(here[0, :3], here[0, :3].flip(0), atol=1e-3)


@pytest.mark.parametrize("strands", ["both", "forward"])
def test_whole_contigs_in_parts_are_the_whole(strands: str, tmp_path: Path) -> None:
    task = tiny(strands)
    task.scale.copy_(torch.tensor([2.0, 5.0]))
    model = Model(
        task, Path("toy.ckpt"), torch.device("cpu"), "float64", config={"data": {"init_args": {"power": 0.5}}}
    )
    genome = Genome.open(write_genome(tmp_path, {"one": 203, "two": 30}), tmp_path / "cache")
    for contig, size in ((0, 203), (1, 30)):
        tokens = torch.tensor([DnaVocabulary().encode(genome.read(contig, 0, size).tobytes().decode())])
        whole = (task(SequenceBatch(tokens=tokens))[0, : size // 4] * task.scale) ** 2
        plan = Plan(genome, (0, 1), 4, 48)
        predictor, state, parts = Predictor(model, plan), None, []
        assert predictor.exact
        for piece in plan.pieces():
            found, state = predictor(model, piece, None if piece.first else state)
            parts += [found] if piece.strand.contig == contig else []
        rows = np.concatenate(parts)
        assert len(rows) == -(-size // 4)
        np.testing.assert_allclose(rows[: size // 4], whole.float().numpy(), rtol=2e-4)


def test_correlations_and_floor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    truth, said = torch.randint(0, 4, (50, 2)).double(), torch.randn(50, 2).double()
    truth[::5, 1] = torch.nan
    found = correlations(truth, said)
    known = ~truth[:, 1].isnan()
    # Equal values have the mean of their ranks, as in the rank correlation of torchmetrics.
    assert found["spearman"][1] == pytest.approx(float(spearman_corrcoef(said[known, 1], truth[known, 1])))
    assert found["pearson"][0] == pytest.approx(float(torch.corrcoef(torch.stack([truth[:, 0], said[:, 0]]))[0, 1]))
    with torch.inference_mode():  # as a test run does
        floors = stranded(tmp_path).floors()
    assert [floor["name"] for floor in floors] == ["mean", "local composition"]
    assert floors[1]["bits"] < 0.2 * floors[0]["bits"]  # type: ignore[operator]
    assert min(floors[1]["test"]["pearson"]) > 0.9  # type: ignore[index]


def test_bad_settings_and_values(tmp_path: Path) -> None:
    data = stranded(tmp_path)
    with pytest.raises(ConfigError, match=r"no whole number of bins of 48; try data.length=96"):
        TrackData("x.fa", "y.bw", 48, length=128)
    task = tiny(size=1)
    task.check_data(data)
    with pytest.raises(
        ConfigError, match=r"the data has 2 tracks \(plus, minus\), task.tracks is 3; set task.tracks=2"
    ):
        tiny(tracks=3, size=1).check_data(data)
    with pytest.raises(ConfigError, match=r"data.bin is 1, task.bin is 4"):
        tiny().check_data(data)
    (tmp_path / "plus.tsv").write_text("one 5 1\none 9 -2\n")
    again = TrackData(data.path, {"plus": str(tmp_path / "plus.tsv"), "minus": str(tmp_path / "minus.tsv")})
    with pytest.raises(DataError, match=r"plus\.tsv:2: found the value -2, but task.loss=poisson is of counts"):
        task.check_data(again)
    tiny(loss="squared", size=1).check_data(again)
    (tmp_path / "plus.tsv").write_text("".join(f"one {n} 0\n" for n in range(1, 3000)))
    with pytest.raises(DataError, match="track 'plus' is 0 throughout the training regions"):
        _ = TrackData(data.path, {"plus": str(tmp_path / "plus.tsv")}).scale


def test_the_command_writes_a_bigwig_for_each_track(tmp_path: Path) -> None:
    mixers = {"m": {"class_path": "seqlong.mixers.Mamba2", "init_args": {"d_state": 8, "head_dim": 8}}}
    given = {"backbone": {"d_model": 16, "pattern": "m", "mixers": mixers}, "tracks": 2, "bin": 8, "width": 8}
    task = TrackPrediction(
        BackboneConfig(d_model=16, pattern="m", mixers={"m": partial(Mamba2, d_state=8, head_dim=8)}), 2, 8, width=8
    )
    config = {
        "model": {"class_path": "seqlong.tasks.TrackPrediction", "init_args": given},
        "data": {"class_path": "seqlong.datamodules.dna.tracks.TrackData", "init_args": {"length": 64}},
    }
    card = {"tracks": [{"name": "plus"}, {"name": "minus"}]}
    torch.save({"state_dict": task.state_dict(), CONFIG_KEY: config, DATA_KEY: card}, tmp_path / "c.ckpt")
    path = write_genome(tmp_path, {"two": 61, "one": 100})
    words = [str(path), "--ckpt", str(tmp_path / "c.ckpt"), "--device", "cpu", "--chunk", "24"]
    assert command([*words, "--output", str(tmp_path / "said.bw")]) == 0
    assert command([*words, "--output", str(tmp_path / "said.npy")]) == 0
    rows = np.load(tmp_path / "said.npy")
    assert rows.shape == (8 + 13, 2)
    file = pyBigWig.open(str(tmp_path / "said.minus.bw"))
    assert file.chroms() == {"two": 61, "one": 100}
    np.testing.assert_allclose(file.values("one", 96, 100), [rows[20, 1]] * 4)
    np.testing.assert_allclose(file.values("two", 0, 61)[4::8], rows[:8, 1][: len(file.values("two", 0, 61)[4::8])])
    assert load(tmp_path / "c.ckpt").kind == "TrackPrediction"
