"""Recall tasks: what is asked has one answer, rows are pure functions of their number, a run learns from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqlong.batch import SequenceBatch
from seqlong.datamodules.sampler import BatchSampler, Stage
from seqlong.datamodules.synthetic import MQAR, Cell, Induction, Needle, Phonebook, RecallBatch, SyntheticData
from seqlong.datamodules.synthetic.data import TEST, VALIDATION, make
from seqlong.errors import ConfigError


@pytest.mark.parametrize(("pairs", "length", "vocab"), [(1, 4, 6), (4, 16, 64), (16, 256, 256), (64, 4096, 8192)])
def test_each_key_asks_once_for_its_own_value(pairs: int, length: int, vocab: int) -> None:
    for seed in range(5):
        row = MQAR(pairs, vocab).row(np.random.default_rng(seed), length)
        assert row.tokens.shape == row.targets.shape == (length,)
        assert row.tokens.min() >= 1 and row.tokens.max() < vocab
        told = dict(zip(row.tokens[0 : 2 * pairs : 2].tolist(), row.tokens[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(told) == pairs and max(told) < vocab // 2 <= min(told.values())
        asked = np.flatnonzero(row.targets >= 0)
        assert asked.min() >= 2 * pairs and sorted(row.tokens[asked].tolist()) == sorted(told)
        assert [told[key] for key in row.tokens[asked].tolist()] == row.targets[asked].tolist()
        rest = np.setdiff1d(np.arange(2 * pairs, length), asked)
        assert not set(row.tokens[rest].tolist()) & set(told), "a key stands where nothing is asked"


def test_questions_follow_the_power_law() -> None:
    """A small exponent asks soon after the pairs, 1 asks anywhere alike."""
    means = []
    for alpha in (0.1, 1.0):
        rows = [MQAR(4, 64, alpha).row(np.random.default_rng(seed), 512) for seed in range(200)]
        means.append(np.mean([np.flatnonzero(row.targets >= 0).mean() for row in rows]))
    assert means[0] < 130 and 240 < means[1] < 280


def test_a_row_is_a_function_of_its_number() -> None:
    whole = make(MQAR(), np.arange(8), 64, 3, 0)
    part = make(MQAR(), np.array([5, 2]), 64, 3, 0)
    assert torch.equal(part.tokens, whole.tokens[[5, 2]]) and torch.equal(part.targets, whole.targets[[5, 2]])
    assert len({tuple(row) for row in whole.tokens.tolist()}) == 8
    for other in (make(MQAR(), np.arange(8), 64, 4, 0), make(MQAR(), np.arange(8), 64, 3, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(whole.tokens, other.tokens, strict=True))
    nothing = make(MQAR(), np.array([-1, 0]), 64, 0)
    assert (nothing.targets[0] == -1).all() and nothing.loss_weight[0].sum() == 0 and nothing.loss_weight[1].sum() == 16


def test_resuming_and_ranks_change_no_row() -> None:
    data = SyntheticData(MQAR(4, 64), length=32, batch_size=6, workers=0)
    batches = data.training_batches()
    alone = [batches[BatchSampler(data.stages).request(number)] for number in range(4)]
    for rank in range(3):
        sampler = BatchSampler(data.stages, rank, 3, start=2)
        shared = batches[next(iter(sampler))]
        assert torch.equal(shared.tokens, alone[2].tokens[rank::3])
    data.load_state_dict({"consumed_batches": 3})
    assert torch.equal(next(iter(data.train_dataloader())).tokens, alone[3].tokens)


def test_validation_and_test_are_always_the_same_and_not_each_other() -> None:
    data = SyntheticData(MQAR(4, 64), length=32, batch_size=8, eval_rows=20, seed=1)
    again = SyntheticData(MQAR(4, 64), length=32, batch_size=8, eval_rows=20, seed=2)
    found = [
        torch.cat([batch.tokens for batch in loader]) for loader in (data.val_dataloader(), again.val_dataloader())
    ]
    assert torch.equal(*found) and found[0].shape == (20, 32)
    tested = torch.cat([batch.tokens for batch in data.test_dataloader()])
    assert not any(torch.equal(a, b) for a, b in zip(found[0], tested, strict=True)) and VALIDATION != TEST


def test_length_grows_in_stages() -> None:
    data = SyntheticData(MQAR(4, 64), stages=[Stage(16, 4, 2), Stage(64, 2)], workers=0)
    loader = iter(data.train_dataloader())
    assert [tuple(next(loader).tokens.shape) for _ in range(4)] == [(4, 16), (4, 16), (2, 64), (2, 64)]
    assert data.eval_length == 64 and data.describe()["generator"]["pairs"] == 4  # type: ignore[index]
    assert data.floors() == [{"name": "chance", "bits": 5.0}]


def test_a_grid_measures_every_length_with_every_number_of_items() -> None:
    data = SyntheticData(
        MQAR(4, 64), length=32, batch_size=8, eval_rows=10, eval_lengths=[32, 64, 512], eval_items=[2, 8]
    )
    shapes: dict[tuple[int, int], int] = {}
    seen: list[int] = []
    for batch in data.val_dataloader():
        assert isinstance(batch, RecallBatch) and batch.index is not None and batch.tokens is not None
        rows, length = batch.shape
        assert rows == max(1, min(10, 8 * 32 // length)) or rows == 10 % 8, "longer rows come fewer at a time"
        shapes[length, batch.items] = shapes.get((length, batch.items), 0) + rows
        seen += batch.index.tolist()
        assert ((batch.targets >= 0).sum(1) == batch.items).all()  # type: ignore[operator]
    assert shapes == {(length, items): 10 for length in (32, 64, 512) for items in (2, 8)}
    assert sorted(seen) == list(range(60))
    again = SyntheticData(MQAR(9, 64), length=64, batch_size=3, eval_rows=10, evaluation=[Cell(64, 8, 10)])
    alone = torch.cat([batch.tokens for batch in again.val_dataloader()])
    grid = torch.cat([b.tokens for b in data.val_dataloader() if b.shape[1] == 64 and b.items == 8])
    assert torch.equal(alone, grid), "a cell's rows are its own, whatever stands beside it"


def test_ranks_share_a_grid_out() -> None:
    from seqlong.datamodules.synthetic.grid import GridSampler

    cells = [Cell(16, rows=5), Cell(64, rows=3)]
    parts = [list(GridSampler(cells, 64, rank, 2)) for rank in range(2)]
    assert [part.cell for part in parts[0]] == [part.cell for part in parts[1]]
    assert [len(part.numbers) for part in parts[0]] == [len(part.numbers) for part in parts[1]]
    for cell, rows in ((0, 5), (1, 3)):
        numbers = [n for share in parts for part in share if part.cell == cell for n in part.numbers.tolist()]
        assert sorted(n for n in numbers if n >= 0) == list(range(rows))


def test_mixtures_keep_their_shares_and_their_rows() -> None:
    mixture = [Cell(16, 2, 30), Cell(32, 4, 10)]
    data = SyntheticData(MQAR(2, 64), length=16, batch_size=4, mixture=mixture)
    batches = data.training_batches()
    shapes, rows = [], set()
    for number in range(200):
        batch = batches[BatchSampler(data.stages).request(number)]
        shapes.append(batch.shape[1])
        rows |= {tuple(row) for row in batch.tokens.tolist()}
    assert 120 < shapes.count(16) < 180 and set(shapes) == {16, 32}
    assert len(rows) == 40, "each part has its own rows, again and again"
    halves = [batches[next(iter(BatchSampler(data.stages, rank, 2, start=5)))].tokens for rank in range(2)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), batches[BatchSampler(data.stages).request(5)].tokens)


def test_rows_may_come_again_in_another_order() -> None:
    data = SyntheticData(MQAR(2, 64), length=16, batch_size=4, train_rows=6)
    batches = data.training_batches()
    rows = torch.cat([batches[BatchSampler(data.stages).request(number)].tokens for number in range(3)]).tolist()
    first, second = [tuple(row) for row in rows[:6]], [tuple(row) for row in rows[6:]]
    assert sorted(first) == sorted(second) and len(set(first)) == 6 and first != second


def test_the_rest_of_a_row_may_be_learnt_too() -> None:
    data = SyntheticData(Induction(8), length=12, batch_size=2, rest=0.25)
    batch = data.training_batches()[BatchSampler(data.stages).request(0)]
    assert isinstance(batch, SequenceBatch) and batch.tokens is not None and batch.targets is not None
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:]) and (batch.targets[:, -1] > 0).all()
    assert batch.loss_weight is not None and (batch.loss_weight[:, :-1] == 0.25).all()
    assert (batch.loss_weight[:, -1] == 1).all()
    for measured in data.val_dataloader():
        assert (measured.loss_weight.sum(1) == 1).all(), "evaluation counts answers only"


def test_floors_are_bits_of_a_token() -> None:
    data = SyntheticData(Needle("repeat", digits=4), length=200, batch_size=2, eval_rows=2)
    assert data.floors()[0]["bits"] == pytest.approx(np.log2(9000) / 4)
    assert SyntheticData(Phonebook(), length=200).vocabulary.size == 260


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"generator": {"pairs": 40, "vocab_size": 64}}, "vocab_size 64 has 31 keys for 40 pairs"),
        ({"generator": {"alpha": 0.0}}, r"alpha in \(0, 1\], found 0.0"),
        ({"length": 32}, "16 pairs need rows of 64 positions, found length 32"),
        ({"eval_length": 63}, "16 pairs need rows of 64 positions, found length 63"),
        ({"eval_rows": 0}, "eval_rows must be 1 or more, found 0"),
        ({"workers": -1}, "workers -1 must be 0 or more"),
        ({"eval_lengths": [256, 60]}, "16 pairs need rows of 64 positions, found length 60"),
        ({"eval_items": [200]}, "vocab_size 256 has 127 keys for 200 pairs"),
        ({"evaluation": []}, "data.evaluation is an empty list"),
        ({"mixture": [Cell(0)]}, "data.mixture: number 1 has length 0 and rows 1024"),
        ({"mixture": [Cell(64)], "train_rows": 9}, "data.mixture and data.train_rows exclude one another"),
        ({"rest": -0.5}, "rest must be 0 or more, found -0.5"),
        ({"train_rows": 0}, "train_rows must be 1 or more, or null, found 0"),
    ],
)
def test_bad_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        given = dict(settings)
        generator = MQAR(**given.pop("generator", {}))  # type: ignore[arg-type]
        SyntheticData(generator, **given)  # type: ignore[arg-type]
