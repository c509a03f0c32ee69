"""Attribution, reach, what was seen in training, and both strands: each against its definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import causal_model, masked_model, save_checkpoint
from matplotlib.figure import Figure

from seqlong.batch import SequenceBatch
from seqlong.cli import main
from seqlong.datamodules.dna.datamodule import GenomeData
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import DataError
from seqlong.inference.attribute import importance
from seqlong.inference.attribution import gradients, mutagenesis
from seqlong.inference.check_rc import check
from seqlong.inference.logo import COLOURS, logo
from seqlong.inference.reach import Reach, measure
from seqlong.inference.regions import parse
from seqlong.inference.seen import look_up, regions_of
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.inference.variants import Variant, Window, score


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    bases = "".join(np.random.default_rng(3).choice(list("ACGT"), 600))
    (tmp_path / "ref.fa").write_text(f">chr1\n{bases[:50]}N{bases[51:]}\n>chr2:101-160\n{bases[200:260]}\n")
    return Genome.open(tmp_path / "ref.fa", tmp_path / "cache")


def test_mutagenesis_is_the_score_of_every_change(genome: Genome) -> None:
    model, strand, other, window = causal_model(), Strand(genome, 0), Strand(genome, 0, True), Window(64)
    found = mutagenesis(model, strand, 45, 60, window)
    assert found.shape == (15, 4) and np.isnan(found[5]).all() and not np.isnan(found[6:]).any()
    letters = strand.read(45, 60).tobytes()
    for place, base in ((0, 1), (9, 3), (14, 0)):
        change = Variant(45 + place, letters[place : place + 1], b"ACGT"[base : base + 1])
        both = [score(model, one, [change.on(one)], window)[0] for one in (strand, other)]
        assert found[place, base] == pytest.approx(np.mean(both), abs=1e-9)
    assert all(found[place, b"ACGT".index(letter)] == 0 for place, letter in enumerate(letters) if letter in b"ACGT")


@pytest.mark.parametrize("make", [causal_model, masked_model])
def test_gradients_are_slopes_of_the_likelihood(genome: Genome, make) -> None:
    """Moving the embedding of one base a little towards another's changes the sum as the gradient says."""
    model, start, stop, window = make(), 300, 310, Window(64)
    found = gradients(model, Strand(genome, 0), start, stop, window)
    place, base, step = 4, 2, 1e-5

    def total(reverse: bool, size: float) -> float:
        own = Strand(genome, 0, reverse)
        begin = own.place((start + stop) // 2, 0) - 32
        letters = own.read(begin, begin + 64)
        tokens, targets = tokens_of(letters), targets_of(letters)
        at, symbol = own.place(start + place, 1) - begin, [4 + base, 7 - base][reverse]
        table = model.backbone.embedding.weight

        def run(inputs: torch.Tensor, wanted: torch.Tensor) -> float:
            def nudge(module, given, output):  # type: ignore[no-untyped-def]
                moved = output.clone()
                if inputs[at] != 1:  # a base that is hidden says nothing
                    moved[0, at] += size * (table[symbol] - table[inputs[at]])
                return moved

            handle = model.backbone.embedding.register_forward_hook(nudge)
            hidden = model.backbone(SequenceBatch(tokens=inputs[None])).hidden
            handle.remove()
            return -model.task.head.loss(hidden, wanted[None]).sum().item()

        if model.kind == "causal":
            return run(tokens, torch.cat([targets[1:], torch.tensor([-1])]))
        steps = torch.arange(64) % 8
        return sum(run(tokens.masked_fill(steps == k, 1), targets.where(steps == k, -1)) for k in range(8)) / 7

    slopes = [(total(reverse, step) - total(reverse, -step)) / (2 * step) for reverse in (False, True)]
    assert found[place, base] == pytest.approx(np.mean(slopes), rel=1e-4, abs=1e-6)
    assert abs(found).max() > 1e-3


def test_a_logo_has_a_letter_for_each_base_that_counts() -> None:
    axis = Figure().subplots()
    logo(axis, "ACGTN", np.array([1.0, -2.0, 0.0, 0.5, np.nan]))
    colours = [patch.get_facecolor() for patch in axis.patches]
    assert len(colours) == 3 and colours[0][:3] == pytest.approx(
        [int(COLOURS["A"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    )
    low, high = axis.get_ylim()
    assert low < -2 and high > 1
    boxes = [patch.get_path().get_extents(patch.get_transform() - axis.transData) for patch in axis.patches]
    assert [round(box.height, 6) for box in boxes] == [1.0, 2.0, 0.5] and boxes[1].y0 == pytest.approx(-2)
    effects = np.array([[0, -1, -2, -3.0], [np.nan] * 4])
    np.testing.assert_array_equal(importance("AN", effects), [2, 0])


def test_reach_is_measured_on_the_same_bases(genome: Genome) -> None:
    model = causal_model()
    found = measure(model, genome, [8, 64, 200], 6, 10, seed=1)
    again = measure(model, genome, [64, 200], 6, 10, seed=1)
    np.testing.assert_allclose(found.bits[:, 1:], again.bits, rtol=1e-9)
    with pytest.raises(DataError, match="no contig has room for 600 bases"):
        measure(model, genome, [600], 6, 10, seed=1)


def test_a_context_is_useful_as_long_as_longer_ones_do_not_help() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(1.9, 0.1, 50)
    bits = np.stack([base, base - 0.05, base - 0.1, base - 0.1], axis=1) + rng.normal(0, 0.001, (50, 4))
    assert Reach([256, 512, 1024, 2048], bits).useful == 1024
    assert Reach([256, 512], bits[:, 2:]).useful == 256
    assert Reach([256, 512, 1024, 2048], bits).gain[2] == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize("make", [causal_model, masked_model])
def test_scores_of_both_strands_do_not_know_which_is_which(genome: Genome, make) -> None:
    found = check(make(), genome, 2, 64)
    assert found.variants < 1e-9 and found.scale > 1e-3
    assert np.isnan(found.equivariance) == (make is causal_model)


def test_an_equivariant_model_is_found_to_be_one(genome: Genome) -> None:
    model = masked_model()
    assert check(model, genome, 2, 64).equivariance > 0.01
    weight = model.backbone.embedding.weight
    weight[4:8] = weight[4:8] + weight[4:8].flip(0)  # A reads like T, C like G; both directions share their weights
    for block in model.backbone.blocks:
        block.mixer.backward_mixer = None
    assert check(model, genome, 2, 64).equivariance < 1e-9


# --- what was seen ---------------------------------------------------------------------------------------------------


def card_of(path: Path, cache: Path, **more: object) -> dict:
    return json.loads(json.dumps(GenomeData(str(path), length=32, cache_dir=str(cache), **more).describe()))  # type: ignore[arg-type]


def test_what_was_trained_on_is_known_by_its_bases_alone(tmp_path: Path, genome: Genome) -> None:
    card = card_of(tmp_path / "ref.fa", tmp_path / "cache")
    (tmp_path / "other.fa").write_text(
        ">renamed\n" + Strand(genome, 0).read(0, 600).tobytes().decode().lower() + "\n>new\nACGTACGTAA\n"
    )
    other = Genome.open(tmp_path / "other.fa", tmp_path / "cache")
    whole = look_up(card, other, parse("renamed", other))
    assert whole.known and whole.names == ("chr1",)
    expected = {name: np.zeros(600, dtype=bool) for name in ("train", "validation", "test")}
    for split, seen in expected.items():
        for contig, start, stop in card["split"]["regions"][split]:
            if contig == "chr1":
                seen[start:stop] = True
        assert whole.bases[split] == seen.sum()
        part = look_up(card, other, parse("renamed:101-333", other))
        assert part.bases[split] == seen[100:333].sum()
    assert sum(whole.bases.values()) > 500
    assert not look_up(card, other, parse("new:1-5", other)).known


def test_regions_of_a_ring_that_pass_its_end(tmp_path: Path, genome: Genome) -> None:
    digest = genome.contigs[0].digest
    card = {
        "sources": [{"records": [{"name": "c", "digest": digest}]}],
        "split": {"regions": {"train": [["c", 500, 700]]}},
    }
    assert regions_of(card, genome, ("train",)) == [(0, 500, 600), (0, 0, 100)]
    assert look_up(card, genome, parse("chr1:51-550", genome)).bases["train"] == 100


def test_regions_are_read_as_people_write_them(genome: Genome) -> None:
    assert (parse("1:1-600", genome).start, parse("1:1-600", genome).stop) == (0, 600)
    assert (parse("chr1:7", genome).start, parse("chr1:7", genome).stop) == (6, 7)
    place = parse("chr2:121-130", genome)
    assert (place.contig, place.start, place.stop, place.offset) == (1, 20, 30, 100)
    for text in ("chr1:0-5", "chr1:9-5", "chr1:1-601", "chr3:1-5", "chr2:1-50"):
        with pytest.raises(DataError, match=text.partition(":")[0]):
            parse(text, genome)


def test_the_commands(tmp_path: Path, genome: Genome, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path, card=card_of(tmp_path / "ref.fa", tmp_path / "cache"))
    ckpt = ["--ckpt", "last"]
    for words in (
        ["attribute", "chr1:200-212", "ref.fa", *ckpt, "--window", "64", "--output", "i.png", "--tsv", "i.tsv"],
        ["attribute", "chr1:200-512", "ref.fa", *ckpt, "--window", "400", "--method", "gradient", "--output", "g.png"],
        ["reach", "ref.fa", *ckpt, "--contexts", "16,32", "--samples", "3", "--scored", "4", "--json", "r.json"],
        ["check-rc", *ckpt, "--sequences", "ref.fa", "--windows", "2", "--length", "64", "--json", "c.json"],
    ):
        assert main(words) == 0
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in ("i.png", "g.png", "reach.png"))
    assert len(Path("i.tsv").read_text().splitlines()) == 14
    assert json.loads(Path("r.json").read_text())["contexts"] == [16, 32]
    assert json.loads(Path("c.json").read_text())["variants"] < 1e-9
    assert main(["seen", "chr1", "ref.fa", *ckpt]) == 0
    assert "some of it was trained on" in capsys.readouterr().out
    (tmp_path / "new.fa").write_text(">x\nACGTAC\n")
    assert main(["seen", "x", "new.fa", *ckpt]) == 3
    assert "unknown: 'x'" in capsys.readouterr().out
