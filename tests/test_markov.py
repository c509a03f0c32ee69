"""The Markov floor: equal to a dictionary-and-loop definition, and to the figures measured for this project."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from seqlong.datamodules.dna import markov
from seqlong.datamodules.dna.genome import Genome
from seqlong.datamodules.dna.markov import SMOOTHING, markov_floor
from seqlong.datamodules.dna.splits import Region
from seqlong.errors import DataError

COMPLEMENT = dict(zip("ACGTN", "TGCAN", strict=True))


def genome_of(folder, **sequences: str) -> Genome:
    (folder / "x.fa").write_text("".join(f">{name}\n{text}\n" for name, text in sequences.items()))
    return Genome.open(folder / "x.fa", folder / "cache")


def definition(training: list[str], scored: list[str], max_order: int) -> dict[float, list[float]]:
    """Bits per base for each smoothing and order, one base at a time."""
    counts: Counter[str] = Counter()
    for text in training:
        for strand in (text, "".join(COMPLEMENT[base] for base in reversed(text))):
            for size in range(1, max_order + 2):
                for start in range(len(strand) - size + 1):
                    counts[strand[start : start + size]] += 1
    result = {}
    for weight in SMOOTHING:
        bits, bases = [0.0] * (max_order + 1), 0
        for text in scored:
            for place, base in enumerate(text):
                if base == "N":
                    continue
                bases += 1
                probability = 0.25
                for order in range(max_order + 1):
                    context = text[place - order : place] if order <= place else "N"
                    if "N" not in context:
                        total = sum(counts[context + letter] for letter in "ACGT")
                        probability = (counts[context + base] + weight * probability) / (total + weight)
                    bits[order] -= math.log2(probability)
        result[weight] = [value / bases for value in bits]
    return result


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_floor_is_its_definition(tmp_path, monkeypatch, chunk):
    """Up to the shorter words just after an unknown base or a region's start, which the definition counts."""
    monkeypatch.setattr(markov, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    chain = "".join(rng.choice(list("ACGT"), p=[0.5, 0.1, 0.1, 0.3]) for _ in range(30_000))
    chain = chain[:9000] + "N" + chain[9001:20_000] + "NNN" + chain[20_003:]
    held = chain[:200] + "NN" + chain[700:900].lower() + "RACGT"
    genome = genome_of(tmp_path, train=chain, held=held)
    floor = markov_floor(genome, [Region(0, 0, 30_000)], [Region(1, 0, 100), Region(1, 100, len(held))], 3)
    upper = held.upper().replace("R", "N")
    expected = definition([chain], [upper[:100], upper[100:]], 3)
    best = [min(expected[weight][order] for weight in SMOOTHING) for order in range(4)]
    assert floor.by_order == pytest.approx(best, abs=2e-4)
    assert floor.bases == sum(base in "ACGT" for base in upper)
    assert floor.bits == min(floor.by_order) == floor.by_order[floor.order]


def test_both_strands_are_counted(tmp_path):
    genome = genome_of(tmp_path, plus="AAAC" * 500, minus="GTTT" * 100)
    floor = markov_floor(genome, [Region(0, 0, 2000)], [Region(1, 0, 400)])
    assert floor.bits < 0.1


def test_random_bases_need_two_bits(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 60_000))
    genome = genome_of(tmp_path, a=text)
    floor = markov_floor(genome, [Region(0, 0, 50_000)], [Region(0, 50_000, 60_000)])
    assert floor.bits == pytest.approx(2.0, abs=0.005) and floor.order <= 2


def test_e_coli_is_as_measured(tmp_path):
    """1.9328 bits at order 6: ../shared/data/dna/PROVENANCE.md, first 90 % against last 10 %."""
    genome = Genome.open("ecoli", tmp_path)
    cut = int(genome.bases * 0.9)
    floor = markov_floor(genome, [Region(0, 0, cut)], [Region(0, cut, genome.bases)])
    assert floor.by_order[6] == pytest.approx(1.9328, abs=0.0005)
    assert floor.bits == pytest.approx(1.933, abs=0.005)
    assert 6 <= floor.order <= 8


def test_tables_grow_with_the_data_only(tmp_path):
    genome = genome_of(tmp_path, a="ACGT" * 300)
    floor = markov_floor(genome, [Region(0, 0, 1100)], [Region(0, 1100, 1200)])
    assert len(floor.by_order) == 6  # 4^5 contexts for 1,100 bases


def test_nothing_to_score(tmp_path):
    genome = genome_of(tmp_path, a="ACGT" * 30, n="N" * 50)
    with pytest.raises(DataError, match=r"the validation regions hold no known base"):
        markov_floor(genome, [Region(0, 0, 120)], [Region(1, 0, 50)])


def test_counts_beyond_32_bits(tmp_path, monkeypatch):
    """A human genome's worth of bases, by its counts: sums over contexts pass 2^31."""
    genome = genome_of(tmp_path, a="ACGT" * 50)
    region = Region(0, 0, 200)
    count = markov._count

    def scaled(*arguments):
        top = count(*arguments)[-1].astype(np.int64)
        factor = 2**33 // int(top.sum())
        tables = [top * factor]
        for _ in range(arguments[2]):
            tables.append(tables[-1].reshape(4, -1).sum(axis=0, dtype=tables[-1].dtype))
        return tables[::-1]

    monkeypatch.setattr(markov, "_count", scaled)
    assert all(0 <= bits < 2.1 for bits in markov_floor(genome, [region], [region], 2).by_order)
    assert all(table.dtype == np.int64 for table in count(genome, [region], 2))
