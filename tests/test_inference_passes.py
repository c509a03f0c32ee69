"""Whole contigs in parts are what they are whole, in float64; what was stopped goes on; every format holds the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import causal_model, masked_model, save_checkpoint

from seqlong.batch import SequenceBatch
from seqlong.cli import main
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError, DataError
from seqlong.inference import passes
from seqlong.inference.embed import embed
from seqlong.inference.model import Model
from seqlong.inference.passes import Piece, Plan, embeddings, fill, likelihoods
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.inference.track import joined, track

LENGTHS = {"b": 700, "a": 65, "one": 1}


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    rng = np.random.default_rng(1)
    text = ""
    for name, length in LENGTHS.items():
        bases = "".join(rng.choice(list("ACGT"), length))
        text += f">{name}\n{bases[:20]}{'N' if length > 20 else ''}{bases[21:]}\n"
    (tmp_path / "ref.fa").write_text(text)
    return Genome.open(tmp_path / "ref.fa", tmp_path / "cache")


def whole_hidden(model: Model, strand: Strand) -> torch.Tensor:
    """``(t d)``: one pass, without any state, in the order of the forward strand."""
    hidden = model.backbone(SequenceBatch(tokens=tokens_of(strand.read(0, strand.length))[None])).hidden[0]
    return hidden.flip(0) if strand.reverse else hidden


@pytest.mark.parametrize("window", [24, None])
def test_parts_of_any_size_are_the_whole(window: int | None) -> None:
    model = causal_model(window)
    tokens = torch.randint(4, 8, (2, 31))
    whole, _ = model.hidden(tokens)
    for size in (1, 7, 31):
        parts = torch.cat(list(model.stream(tokens.split(size, dim=1))), dim=1)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


def test_a_model_that_sees_both_sides_has_no_parts() -> None:
    with pytest.raises(ConfigError, match="sees both sides"):
        next(iter(masked_model().stream([torch.zeros(1, 4, dtype=torch.int64)])))


@pytest.mark.parametrize("every", [1, 10, 128])
def test_embeddings_are_means_of_one_pass(tmp_path: Path, genome: Genome, every: int) -> None:
    model = causal_model()
    plan = Plan(genome, (0, 1, 2), every, 130 // every * every, (False, True))
    found = fill(model, plan, 16, partial(embeddings, every=every), tmp_path / "x", {}, "x")  # type: ignore[arg-type]
    assert found.shape == (plan.rows, 32)
    row = 0
    for number, length in enumerate(LENGTHS.values()):
        both = [whole_hidden(model, Strand(genome, number, reverse)) for reverse in (False, True)]
        for start in range(0, length, every):
            expected = torch.cat([hidden[start : start + every].mean(dim=0) for hidden in both])
            np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)
            row += 1
    assert row == plan.rows


def test_likelihoods_are_those_of_one_pass(tmp_path: Path, genome: Genome) -> None:
    model, plan = causal_model(), Plan(genome, (0, 1, 2), 1, 90, (False, True))
    found = fill(model, plan, 1, likelihoods, tmp_path / "x", {}, "x")
    row = 0
    for number, length in enumerate(LENGTHS.values()):
        for column, reverse in enumerate((False, True)):
            strand = Strand(genome, number, reverse)
            letters = strand.read(0, length)
            said = model.logits(tokens_of(letters)[None])[0][0].log_softmax(dim=-1)
            targets = targets_of(letters)
            expected = [np.nan] + [
                said[i - 1, targets[i]].item() if targets[i] >= 0 else np.nan for i in range(1, length)
            ]
            own = found[row : row + length, column]
            np.testing.assert_allclose(own[::-1] if reverse else own, expected, rtol=1e-5)
        row += length
    assert np.isnan(found[20]).all() and not np.isnan(found[21:600]).any()


def test_masked_models_are_asked_about_every_base_once(genome: Genome) -> None:
    model, piece = masked_model(), Piece(Strand(genome, 1), 0, 65, 0, 65, True)
    found, _ = likelihoods(model, piece, None)
    tokens = tokens_of(piece.strand.read(0, 65))
    for base in (3, 11, 40):
        seen = tokens.clone()
        seen[base % 8 :: 8] = 1
        expected = model.logits(seen[None])[0][0, base].log_softmax(-1)[tokens[base]]
        assert found[base, 0] == pytest.approx(expected.item(), rel=1e-5)
    assert np.isnan(found[20, 0])


def test_what_was_stopped_goes_on_exactly(tmp_path: Path, genome: Genome, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = causal_model(), Plan(genome, (0, 1), 1, 150, (False, True))
    monkeypatch.setattr(passes, "SAVE_EVERY", 300)
    whole = np.array(fill(model, plan, 1, likelihoods, tmp_path / "whole", {}, "x"))
    read: list[Piece] = []

    def stop_at(count: int):  # type: ignore[no-untyped-def]
        def compute(model, piece, state):  # type: ignore[no-untyped-def]
            if len(read) == count:
                raise KeyboardInterrupt
            read.append(piece)
            return likelihoods(model, piece, state)

        return compute

    for count in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            fill(model, plan, 1, stop_at(count), tmp_path / "parts", {}, "x")
    found = fill(model, plan, 1, stop_at(10**9), tmp_path / "parts", {}, "x")
    np.testing.assert_array_equal(found, whole)
    assert len(read) <= len(plan.pieces()) + 4, "no more is read again than since the last time that it was saved"
    with pytest.raises(DataError, match=r"another command's results \(every differ"):
        fill(model, Plan(genome, (0, 1), 2, 150, (False, True)), 1, likelihoods, tmp_path / "parts", {}, "x")


def test_every_format_of_embeddings_holds_the_same(tmp_path: Path, genome: Genome) -> None:
    model, plan = causal_model(), Plan(genome, (0, 1), 64, 128)
    embed(model, plan, tmp_path / "e.npy")
    expected = np.load(tmp_path / "e.npy")
    assert expected.shape == (13, 16)
    assert (tmp_path / "e.bins.tsv").read_text().splitlines()[1:] == ["b\t700\t64\t0", "a\t65\t64\t11"]
    pq = pytest.importorskip("pyarrow.parquet")
    embed(model, plan, tmp_path / "e.parquet")
    rows = pq.read_table(tmp_path / "e.parquet").to_pydict()
    np.testing.assert_array_equal(np.array(rows["embedding"], dtype=np.float32), expected)
    assert (rows["contig"][10:], rows["start"][10:], rows["stop"][10:]) == (
        ["b", "a", "a"], [640, 0, 64], [700, 64, 65],
    )  # fmt: skip
    zarr = pytest.importorskip("zarr")
    embed(model, plan, tmp_path / "e.zarr")
    group = zarr.open_group(str(tmp_path / "e.zarr"), mode="r")
    np.testing.assert_array_equal(group["embedding"][:], expected)
    assert list(group["contig"][10:]) == [0, 1, 1] and list(group.attrs["contigs"]) == ["b", "a"]
    assert not list(tmp_path.glob(".*"))


def test_tracks(tmp_path: Path, genome: Genome) -> None:
    model, plan = causal_model(), Plan(genome, (0, 1, 2), 1, 90, (False, True))
    mean = track(model, plan, tmp_path / "t.npy")
    expected = np.load(tmp_path / "t.npy")
    assert mean == pytest.approx(np.nanmean(expected), rel=1e-5) and np.isnan(expected[[20, 720, 765]]).all()
    bigwig = pytest.importorskip("pyBigWig")
    assert track(model, plan, tmp_path / "t.bw") == pytest.approx(mean, rel=1e-6)
    with bigwig.open(str(tmp_path / "t.bw")) as file:
        assert file.chroms() == LENGTHS
        np.testing.assert_array_equal(file.values("b", 0, 700, numpy=True), expected[:700])
        np.testing.assert_array_equal(file.values("a", 0, 65, numpy=True), expected[700:765])
    assert not list(tmp_path.glob(".*"))


def test_strands_are_joined_where_they_have_a_value() -> None:
    values = np.array([[1, 3], [np.nan, 2], [np.nan, np.nan]], dtype=np.float32)
    np.testing.assert_array_equal(joined(values), [2, 2, np.nan])


def test_the_commands(tmp_path: Path, genome: Genome, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path)
    assert main(["embed", "ref.fa", "--ckpt", "runs/toy", "--output", "out/e.npy", "--every", "100"]) == 0
    assert np.load("out/e.npy").shape == (9, 16)
    assert main(["track", "ref.fa", "--ckpt", "last", "--output", "t.npy", "--contigs", "a"]) == 0
    assert np.load("t.npy").shape == (65,)
    capsys.readouterr()
    for words, complaint in (
        (["embed", "ref.fa", "--ckpt", "last", "--output", "e.csv"], "expected a name that ends in .npy"),
        (["track", "ref.fa", "--ckpt", "last", "--output", "e.wig"], "expected a name that ends in .bw"),
        (["track", "ref.fa", "--ckpt", "last", "--output", "e.npy", "--contigs", "bb"], "no such contig"),
        (["embed", "ref.fa", "--ckpt", "last", "--output", "e.npy", "--chunk", "10"], "less than a bin"),
    ):
        assert main(words) == 2
        assert complaint in capsys.readouterr().err
