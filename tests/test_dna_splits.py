"""Splits: disjoint, apart by the gap (round the ring too), complete, and explained when they cannot be."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.splits import NAMES, BlockSplit, ContigSplit, Region, RegionSplit, Split
from seqlong.errors import DataError


def make_genome(folder, lengths: dict[str, int], circular=()) -> Genome:
    path = folder / "genome.fa"
    path.write_text(
        "".join(f">{name}\n{'ACGT' * (length // 4)}{'A' * (length % 4)}\n" for name, length in lengths.items())
    )
    return Genome.open(path, folder / "cache", circular)


@pytest.fixture
def genome(tmp_path) -> Genome:
    return make_genome(tmp_path, {"chr1": 1000, "chr2": 500, "ring": 300}, ["ring"])


def labels(genome: Genome, split: Split) -> list[np.ndarray]:
    """For each contig the split of every base: -1 unused, else its place in NAMES."""
    found = [np.full(contig.length, -1) for contig in genome.contigs]
    for number, name in enumerate(NAMES):
        for contig, start, stop in split.regions[name]:
            places = np.arange(start, stop) % genome.contigs[contig].length
            assert stop - start <= genome.contigs[contig].length
            assert (found[contig][places] == -1).all(), "regions overlap"
            found[contig][places] = number
    return found


def smallest_distance(label: np.ndarray, circular: bool) -> int:
    """Fewest unused bases between bases of different splits."""
    used = np.flatnonzero(label >= 0)
    if used.size < 2:
        return label.size
    following = np.roll(used, -1)
    apart = (following - used) % label.size - 1
    if not circular:
        used, following, apart = used[:-1], following[:-1], apart[:-1]
    differ = label[used] != label[following]
    return int(apart[differ].min()) if differ.any() else label.size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(50, 2000), st.booleans()), min_size=1, max_size=5),
    st.integers(20, 200),
    st.integers(0, 5),
    st.integers(0, 100),
)
def test_blocks_never_overlap_and_keep_their_distance(tmp_path_factory, contigs, block, gap, seed):
    names = {f"c{number}": length for number, (length, _) in enumerate(contigs)}
    rings = [f"c{number}" for number, (_, ring) in enumerate(contigs) if ring]
    genome = make_genome(tmp_path_factory.mktemp("genome"), names, rings)
    try:
        split = BlockSplit(0.2, 0.2, block, gap, seed).split(genome)
    except DataError as error:
        assert "leave none for" in str(error) or "leaves nothing" in str(error)
        return
    for contig, label in zip(genome.contigs, labels(genome, split), strict=True):
        assert smallest_distance(label, contig.circular) >= gap
        if gap == 0:
            assert (label >= 0).all()


def test_blocks_come_near_their_fractions_and_depend_on_their_seed(tmp_path):
    genome = Genome.open("ecoli", tmp_path)
    split = BlockSplit().split(genome)
    assert abs(split.bases("validation") / genome.bases - 0.1) < 0.01
    assert abs(split.bases("test") / genome.bases - 0.1) < 0.01
    assert split.how["block_bases"] == 231_983 and split.how["gap_bases"] == 1_000
    assert BlockSplit().split(genome) == split
    assert BlockSplit(seed=1).split(genome).regions != split.regions


def test_blocks_are_dealt_to_the_nearest_number(tmp_path):
    genome = make_genome(tmp_path, {"a": 1000})
    sizes = {f: BlockSplit(f, 0.0, 100, 0).split(genome).bases("validation") for f in (0.01, 0.14, 0.16, 0.34)}
    assert sizes == {0.01: 100, 0.14: 100, 0.16: 200, 0.34: 300}


def test_a_ring_joins_at_its_junction(tmp_path):
    genome = make_genome(tmp_path, {"ring": 300}, ["ring"])
    (tmp_path / "v.bed").write_text("ring\t100\t150\n")
    split = RegionSplit(str(tmp_path / "v.bed"), gap_bases=10).split(genome)
    assert split.regions["train"] == [Region(0, 160, 390)]
    line = make_genome(tmp_path, {"ring": 300})
    assert RegionSplit(str(tmp_path / "v.bed"), gap_bases=10).split(line).regions["train"] == [
        Region(0, 0, 90),
        Region(0, 160, 300),
    ]


def test_the_gap_passes_the_junction(tmp_path):
    genome = make_genome(tmp_path, {"ring": 300}, ["ring"])
    (tmp_path / "v.bed").write_text("ring\t5\t50\n")
    (tmp_path / "t.bed").write_text("ring\t250\t292\n")
    split = RegionSplit(str(tmp_path / "v.bed"), str(tmp_path / "t.bed"), gap_bases=10).split(genome)
    assert split.regions["train"] == [Region(0, 60, 240)]


def test_contigs(genome):
    split = ContigSplit(["chr2"], ["ring"]).split(genome)
    assert split.regions == {"train": [(0, 0, 1000)], "validation": [(1, 0, 500)], "test": [(2, 0, 300)]}
    only = ContigSplit(["chr2"], train=["ring"]).split(genome)
    assert only.regions == {"train": [(2, 0, 300)], "validation": [(1, 0, 500)], "test": []}
    with pytest.raises(DataError, match=r"split\.validation: contig 'chr3' is not in .*; did you mean 'chr[12]'\?"):
        ContigSplit(["chr3"]).split(genome)
    with pytest.raises(DataError, match=r"contig 'chr1' is named in validation and again in test"):
        ContigSplit(["chr1"], ["chr1"]).split(genome)
    with pytest.raises(DataError, match=r"the training split is empty: no contig is left"):
        ContigSplit(["chr1", "chr2", "ring"]).split(genome)


def test_regions_of_bed_files(genome, tmp_path):
    (tmp_path / "v.bed").write_text("# comment\ntrack name=x\n\nchr1\t100\t200\tname\t0\t+\nchr1 150 250\n")
    (tmp_path / "t.bed").write_text("chr2\t0\t100\r\n")
    split = RegionSplit(str(tmp_path / "v.bed"), str(tmp_path / "t.bed"), gap_bases=5).split(genome)
    assert split.regions["validation"] == [(0, 100, 250)]
    assert split.regions["test"] == [(1, 0, 100)]
    assert split.regions["train"] == [(0, 0, 95), (0, 255, 1000), (1, 105, 500), (2, 0, 300)]
    (tmp_path / "n.bed").write_text("chr1\t250\t400\n")
    given_train = RegionSplit(str(tmp_path / "v.bed"), train=str(tmp_path / "n.bed")).split(genome)
    assert given_train.regions["train"] == [(0, 250, 400)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("chr9\t1\t2", r"v\.bed:2: BED: contig 'chr9' is not in .*genome\.fa; did you mean 'chr[12]'\?"),
        ("chr1\t900\t1001", r"v\.bed:2: interval chr1:900-1,001 runs off the end; 'chr1' has 1,000 bases"),
        ("chr1\t20\t20", r"v\.bed:2: interval chr1:20-20 is empty"),
        ("chr1\t20", r"v\.bed:2: found 'chr1\t20'; expected BED: contig, start, stop"),
        ("chr1\t-5\t20", r"v\.bed:2: found .*; expected BED"),
    ],
)
def test_bad_bed(genome, tmp_path, line, message):
    (tmp_path / "v.bed").write_text(f"chr1\t0\t10\n{line}\n")
    with pytest.raises(DataError, match=message):
        RegionSplit(str(tmp_path / "v.bed")).split(genome)


def test_overlapping_and_missing_bed(genome, tmp_path):
    (tmp_path / "v.bed").write_text("chr1\t0\t100\n")
    (tmp_path / "t.bed").write_text("chr1\t99\t200\n")
    with pytest.raises(DataError, match=r"validation chr1:0-100 overlaps test chr1:99-200; make the regions"):
        RegionSplit(str(tmp_path / "v.bed"), str(tmp_path / "t.bed")).split(genome)
    with pytest.raises(DataError, match=r"overlaps train|train .* overlaps"):
        RegionSplit(str(tmp_path / "v.bed"), train=str(tmp_path / "t.bed")).split(genome)
    with pytest.raises(DataError, match=r"w\.bed: no such file; did you mean '.\.bed'"):
        RegionSplit(str(tmp_path / "w.bed")).split(genome)
    (tmp_path / "e.bed").write_text("# nothing\n")
    with pytest.raises(DataError, match=r"e\.bed: found no regions"):
        RegionSplit(str(tmp_path / "e.bed")).split(genome)


def test_what_blocks_cannot_do(genome):
    with pytest.raises(DataError, match=r"blocks of about 5,000 bases leave none for train; lower split\.block_bases"):
        BlockSplit(block_bases=5000, validation=0.4, test=0.5).split(genome)
    with pytest.raises(DataError, match=r"gap_bases 900 leaves nothing; lower split\.gap_bases"):
        BlockSplit(block_bases=100, gap_bases=900).split(genome)
    with pytest.raises(DataError, match=r"must be fractions of 0 or more that sum to below 1"):
        BlockSplit(0.5, 0.5)


def test_no_validation_when_none_is_asked_for(genome):
    split = BlockSplit(validation=0.0, test=0.0, block_bases=100).split(genome)
    assert split.regions["validation"] == [] and split.bases("train") == 1800


def test_described_and_drawn(genome):
    split = BlockSplit(block_bases=100, gap_bases=10).split(genome)
    record = json.loads(json.dumps(split.describe(genome)))
    assert record["kind"] == "by blocks" and record["gap_bases"] == 10
    assert [row["split"] for row in record["summary"]] == ["train", "validation", "test", "unused"]
    assert sum(row["bases"] for row in record["summary"]) == 1800
    assert {name for name, _, _ in record["regions"]["train"]} <= {"chr1", "chr2", "ring"}
    console = Console(width=100, record=True, file=StringIO())
    console.print(split.table(genome))
    text = console.export_text()
    assert "validation" in text and f"{split.bases('train'):,}" in text and "%" in text
