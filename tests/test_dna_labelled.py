"""Labelled sequences: files, splits, leakage, floors and rows."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from seqlong.datamodules.dna.alphabet import encode, reverse_complement
from seqlong.datamodules.dna.kmers import count_matrix, words
from seqlong.datamodules.dna.label_floors import Part, label_floors, matthews
from seqlong.datamodules.dna.label_kinds import learn_labels
from seqlong.datamodules.dna.label_rows import parts_of
from seqlong.datamodules.dna.label_split import folds_of, hold_out
from seqlong.datamodules.dna.labelled import LabelledData
from seqlong.datamodules.dna.leakage import find_leakage
from seqlong.datamodules.dna.records import Records, read_records
from seqlong.errors import ConfigError, DataError


def drawn(count: int, low: int, high: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("ACGT"), random.integers(low, high + 1))) for _ in range(count)]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("sequence,label\n" + "".join(f"{sequence},{label}\n" for sequence, label in rows))
    return path


def letters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def other(text: str) -> str:
    return reverse_complement(letters(text)).tobytes().decode()


def test_every_format_says_the_same(tmp_path: Path) -> None:
    rows = [("ACGTN", "a b"), ("acguu", "c"), ("G" * 200_000, "c")]
    files = [write(tmp_path / "a.csv", rows)]
    (tmp_path / "b.tsv.gz").write_bytes(
        gzip.compress("".join(f"c{n}\t{label}\t{dna}\n" for n, (dna, label) in enumerate(rows)).encode())
    )
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"dna": s, "target": y}) + "\n\n" for s, y in rows))
    (tmp_path / "d.fa").write_text("".join(f">n{i} x|{y}\n{s}\n" for i, (s, y) in enumerate(rows)))
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(
        arrow.table({"seq": [s for s, _ in rows], "class": [y for _, y in rows]}), tmp_path / "e.parquet"
    )
    found = [read_records(files[0]), read_records(tmp_path / "b.tsv.gz", label=1), read_records(tmp_path / "c.jsonl")]
    found += [read_records(tmp_path / "d.fa", label=r"\|(.*)$"), read_records(tmp_path / "e.parquet")]
    for records in found:
        assert records.labels == [("a b",), ("c",), ("c",)]
        assert [records.sequence(n).tobytes().decode()[:6] for n in range(3)] == ["ACGTN", "ACGUU", "GGGGGG"]
        assert records.lengths.tolist() == [5, 5, 200_000]
    assert found[0].where(1) == "a.csv:3"
    assert found[2].where(1) == "c.jsonl:3"


@pytest.mark.parametrize(
    ("content", "settings", "complaint"),
    [
        ("sequence,label\nACGT,1\nACZT,0\n", {}, r"a\.csv:3: illegal letter 'Z' at position 3 of the sequence"),
        ("sequence,label\nACGT,1\nACGT,\n", {}, r"a\.csv:3: the label is missing"),
        ("sequence,label\nACGT,1\n,0\n", {}, r"a\.csv:3: the sequence is empty"),
        ("sequence,label\nACGT,1\nACGT\n", {}, r"a\.csv:3: found 1 columns; the first row has more"),
        ("sequence,label\nACGT,1\n", {"label": "labl"}, "no column 'labl'; did you mean 'label'"),
        ("sequence,kind\nACGT,1\n", {}, "say which has the label: data.label=NAME. The columns: sequence, kind"),
        ("ACGTA,1\n", {"label": 7}, "data.label=7 is no other column's number"),
    ],
)
def test_bad_records_are_named(content: str, settings: dict, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=complaint):
        read_records(tmp_path / "a.csv", **settings)


def test_bad_records_are_dropped_and_counted_if_one_asks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("ACGT", "1"), ("AC-T", "0"), ("ACGT", ""), ("TTTT", "0")])
    records = read_records(path, bad="drop")
    assert len(records) == 2
    assert ["illegal letter '-'" in records.dropped[0], "label is missing" in records.dropped[1]] == [True, True]


def test_one_class_and_unknown_classes_are_refused(tmp_path: Path) -> None:
    one = read_records(write(tmp_path / "a.csv", [("ACGT", "x"), ("ACGG", "x")]))
    with pytest.raises(DataError, match="all 2 training records are of one class, 'x'"):
        learn_labels(one, "class")
    two = read_records(write(tmp_path / "b.csv", [("ACGT", "10"), ("ACGG", "9")]))
    labels = learn_labels(two, "class")
    assert labels.names == ["9", "10"]
    new = read_records(write(tmp_path / "c.csv", [("ACGT", "9"), ("ACGG", "11")]))
    with pytest.raises(DataError, match=r"c\.csv:3: class '11' is not in the training data"):
        labels.encode(new)
    with pytest.raises(DataError, match=r"a\.csv:2: 'x' is no number"):
        learn_labels(one, "value")


def test_several_labels_and_values(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "a.csv", [("ACGT", "x;y"), ("ACGG", "y"), ("AAAA", "z; x")]))
    labels = learn_labels(records, "multilabel")
    assert labels.names == ["x", "y", "z"]
    assert labels.encode(records).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    values = read_records(write(tmp_path / "b.csv", [("ACGT", "1.5"), ("ACGG", "-0.5")]))
    learnt = learn_labels(values, "value")
    assert (learnt.mean, learnt.deviation) == ([0.5], [1.0])


@pytest.mark.parametrize("k", [1, 2, 5, 31, 32])
def test_words_are_those_counted_by_hand(k: int) -> None:
    text = drawn(1, 90, 90, k)[0]
    text = text[:40] + "N" + text[41:]
    found, known = words(letters(text), k)
    for place in range(len(text) - k + 1):
        word = text[place : place + k]
        assert bool(known[place]) == ("N" not in word)
        if "N" not in word:
            both = [sum("ACGT".index(c) << 2 * (k - 1 - i) for i, c in enumerate(w)) for w in (word, other(word))]
            assert int(found[place]) == min(both)


def test_counts_of_words_are_the_same_on_both_strands() -> None:
    text = drawn(1, 50, 50)[0]
    joined = letters(text + other(text) + "ACG")
    made = count_matrix(joined, np.array([0, 50, 100]), np.array([50, 100, 103]), (1, 2, 3))
    assert np.array_equal(made[0], made[1])
    assert made.shape == (3, 2 + 10 + 32)
    assert np.allclose((made**2).sum(1), 3)
    forward = [text[n : n + 2] for n in range(49)]
    share = sum(word in ("AC", "GT") for word in forward) / 49
    assert np.isclose(made[0, 2 + 1] ** 2, share)


def test_leakage_is_found_by_letters_by_strand_and_by_words(tmp_path: Path) -> None:
    known, fresh = drawn(30, 100, 120), drawn(5, 100, 120, seed=1)
    training = read_records(write(tmp_path / "train.csv", [(s, "01"[n % 2]) for n, s in enumerate(known)]))
    changed = known[5][:60] + "ACGT"[("ACGT".index(known[5][60]) + 1) % 4] + known[5][61:]
    rows = [(fresh[0], "0"), (known[3], "0"), (other(known[4]).lower(), "0"), (changed + "A" * 3, "1"), (fresh[1], "1")]
    found = find_leakage(training, read_records(write(tmp_path / "test.csv", rows)))
    assert found.exact.tolist() == [False, True, False, False, False]
    assert found.reverse.tolist() == [False, False, True, False, False]
    assert found.near.tolist() == [False, False, False, True, False]
    assert found.seen(strict=False).tolist() == [False, True, True, False, False]
    assert found.found[0] == "test.csv:3 is train.csv:5, labelled 0 here and 1 there"
    halves = [(known[7] + fresh[2][:20], "0"), (fresh[3] + known[8][:40], "0")]
    near = find_leakage(training, read_records(write(tmp_path / "near.csv", halves))).near
    assert near.tolist() == [True, False]


def test_split_keeps_shares_and_keeps_twins_together() -> None:
    sequences = drawn(400, 30, 40)
    sequences[200:300] = [other(s) for s in sequences[:100]]
    labels = ["abcd"[n % 4] if n < 200 else "abcd"[(n - 200) % 4] for n in range(400)]
    records = made(sequences, labels)
    fold = folds_of(records, 5, seed=3)
    assert np.array_equal(fold[:100], fold[200:300])
    for label in "abcd":
        mine = np.array([one == label for one in labels])
        assert abs(np.bincount(fold[mine]) - mine.sum() / 5).max() <= 5
    held = hold_out(records, 0.1, seed=3)
    assert np.array_equal(held[:100], held[200:300])
    shares = [held[[n for n in range(400) if labels[n] == label]].mean() for label in "abcd"]
    assert min(shares) > 0.05
    assert max(shares) < 0.16


def made(sequences: list[str], labels: list[str]) -> Records:
    ends = np.cumsum([len(s) for s in sequences])
    starts = ends - [len(s) for s in sequences]
    count = np.arange(len(sequences))
    return Records(
        letters("".join(sequences)), starts, ends, [(y,) for y in labels], count + 2, count * 0, [Path("x.csv")]
    )


def test_floors_learn_what_words_and_places_tell() -> None:
    random = np.random.default_rng(0)
    sequences, labels = drawn(600, 60, 60), [str(n % 2) for n in range(600)]
    for number in range(0, 600, 2):
        place = random.integers(0, 54)
        sequences[number] = sequences[number][:place] + "TATAAA" + sequences[number][place + 6 :]
    records = made(sequences, labels)
    learnt = learn_labels(records, "class")
    parts = [records.take(np.arange(a, b)) for a, b in ((0, 400), (400, 500), (500, 600))]
    held = [Part(part, learnt.encode(part)) for part in parts]
    held[2].seen = np.arange(100) < 50
    prior, by_words, by_place = label_floors(learnt, *held)
    assert prior["bits"] == pytest.approx(1, abs=1e-3)
    assert by_words["test"]["mcc"] > 0.8 > by_place["test"]["mcc"] + 0.4  # type: ignore[index]
    assert by_words["bits"] < 0.6  # type: ignore[operator]
    assert set(by_words["test_unseen"]) == {"accuracy", "mcc"}  # type: ignore[call-overload]


def test_matthews_correlation_is_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    said, right = torch.randint(4, (200,)), torch.randint(4, (200,))
    assert matthews(said, right, 4) == pytest.approx(float(multiclass_matthews_corrcoef(said, right, 4)), abs=1e-6)


def data(tmp_path: Path, **settings) -> LabelledData:  # type: ignore[no-untyped-def]
    path = tmp_path / "train.csv"
    if not path.exists():
        write(path, [(s, "ab"[n % 2]) for n, s in enumerate(drawn(90, 5, 60))])
    return LabelledData(str(path), cache_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_an_epoch_reads_every_record_once_and_resumes(rows: str, tmp_path: Path) -> None:
    source = data(tmp_path, rows=rows, length=64, batch_size=4, seed=5)
    batches = list(itertools.islice(source.train_dataloader(), 45))
    part = source.parts["train"]
    seen: list[int] = []
    for batch in batches:
        assert batch.tokens is not None
        assert batch.records is not None
        flat = batch.tokens.flatten()
        for record, start, end, label in zip(batch.records, batch.starts, batch.ends, batch.labels, strict=True):
            assert flat[start : end + 1].tolist() == encode(part.sequence(int(record))).tolist()
            assert int(label) == "ab".index(part.labels[int(record)][0])
            seen.append(int(record))
    count = len(part)
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count]) == list(range(count))
    assert seen[:count] != seen[count : 2 * count]
    again = data(tmp_path, rows=rows, length=64, batch_size=4, seed=5)
    again.load_state_dict({"consumed_batches": 17})
    assert torch.equal(next(iter(again.train_dataloader())).tokens, batches[17].tokens)


@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_evaluation_reads_every_record_once(rows: str, tmp_path: Path) -> None:
    source = data(tmp_path, rows=rows, length=64, folds=3, fold=1, eval_batch_size=7)
    found = [int(record) for batch in source.test_dataloader() for record in batch.records]
    assert sorted(found) == list(range(len(source.parts["test"])))
    total = sum(len(part) for part in source.parts.values())
    assert total == 90


def test_long_records_are_refused_or_read_in_parts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.csv:\d+: a sequence of \d+ bases, and .*data\.long=crop"):
        _ = data(tmp_path, length=20).parts
    source = data(tmp_path, length=20, long="crop", batch_size=8)
    batches = list(itertools.islice(source.train_dataloader(), 12))
    assert max(batch.shape[1] for batch in batches) == 20
    covered = sum(int((batch.ends - batch.starts + 1).sum()) for batch in source.val_dataloader())
    lengths = source.parts["validation"].lengths
    assert lengths.sum() - 10 * len(lengths) < covered <= lengths.sum()


def test_tail_holds_out_the_ends_of_genomes(tmp_path: Path) -> None:
    for name, text in zip(("s1", "s2"), drawn(2, 1000, 1000), strict=True):
        (tmp_path / f"{name}.fa").write_text(f">{name}\n{text}\n")
    source = LabelledData(
        [str(tmp_path / "s1.fa"), str(tmp_path / "s2.fa")],
        label="file",
        tail=0.25,
        length=50,
        long="crop",
        floors=False,
    )
    assert [int(source.parts[part].lengths[0]) for part in ("train", "validation", "test")] == [675, 75, 250]
    assert source.label_names.names == ["s1", "s2"]
    assert sum(len(batch.records) for batch in source.test_dataloader()) == 10


def test_genomes_in_parts_have_floors_of_parts(tmp_path: Path) -> None:
    """One genome has twice as much G and C: words tell parts of 50 bases, better the longer the parts are."""
    random = np.random.default_rng(0)
    for name, rich in (("s1", 0.4), ("s2", 0.6)):
        letters = random.choice(list("ACGT"), 4000, p=[(1 - rich) / 2, rich / 2, rich / 2, (1 - rich) / 2])
        (tmp_path / f"{name}.fa").write_text(f">{name}\n{''.join(letters)}\n")
    found = []
    for length in (25, 200):
        source = LabelledData(
            [str(tmp_path / "s1.fa"), str(tmp_path / "s2.fa")], label="file", tail=0.25, length=length, long="crop",
            cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip
        (words,) = [floor for floor in source.floors() if str(floor["name"]).startswith("words")]
        found.append(words["test"]["accuracy"])  # type: ignore[index]
        again = {str(floor["name"]): floor for floor in source.floors()}
        assert again[str(words["name"])] == words
    assert 0.6 < found[0] < found[1] and found[1] > 0.9


def test_parts_overlap_where_they_would_be_few(tmp_path: Path) -> None:
    (tmp_path / "s.fa").write_text(f">s\n{drawn(1, 1000, 1000)[0]}\n>t\n{drawn(1, 30, 30)[0]}\n")
    records = read_records(tmp_path / "s.fa", label=0)
    parts, which = parts_of(records, 300)
    assert list(zip(parts.starts, parts.ends, which, strict=True)) == [
        (0, 300, 0), (300, 600, 0), (600, 900, 0), (1000, 1030, 1)
    ]  # fmt: skip
    parts, which = parts_of(records, 300, 10)
    assert len(parts) >= 10 and set(parts.lengths.tolist()) == {300, 30} and parts.ends.max() == 1030
    assert parts.labels == [records.labels[number] for number in which.tolist()]
    assert len(parts_of(records, 300, 10**6)[0]) == 1 + len(range(0, 701, 37))


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.test and data\.folds both"):
        data(tmp_path, test="x.csv", folds=5)
    with pytest.raises(ConfigError, match=r"data\.fold=5 is not one of the 5 folds"):
        data(tmp_path, folds=5, fold=5)
    with pytest.raises(DataError, match=r"there are no test records; give data\.test=FILE"):
        data(tmp_path).test_dataloader()


def test_a_test_row_in_training_is_reported_and_left_out_of_unseen_scores(tmp_path: Path) -> None:
    source = data(tmp_path)
    leaked = source.parts["train"].sequence(4).tobytes().decode()
    test = write(tmp_path / "test.csv", [(drawn(1, 60, 60, 9)[0], "a"), (leaked, "b")])
    source = data(tmp_path, test=str(test))
    assert source.seen("test").tolist() == [False, True]
    said = source.describe()
    assert said["leakage"]["test"]["exact"] == 1  # type: ignore[index]
    assert any("Of 2 test records, 1 are in training letter by letter" in note for note in said["notes"])  # type: ignore[union-attr]
    json.dumps(said)
    (batch,) = list(source.test_dataloader())
    assert [bool(flag) for flag in batch.seen[batch.records.argsort()]] == [False, True]


def test_measured_leakage_of_public_sets(shared_data: Path) -> None:
    """Counts that were taken by other means (PROVENANCE.md)."""
    folder = shared_data / "dna" / "labelled" / "GUE" / "prom" / "prom_core_tata"
    training, test = (read_records(folder / f"{part}.csv.gz") for part in ("train", "test"))
    assert (len(training), len(test)) == (4904, 613)
    assert int(find_leakage(training, test).exact.sum()) == 16
