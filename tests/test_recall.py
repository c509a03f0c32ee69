"""Recall tasks: what is asked has one answer, rows are pure functions of their number, a run learns from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqlong.datamodules.sampler import BatchSampler, Stage
from seqlong.datamodules.synthetic import MQAR, SyntheticData
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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"generator": {"pairs": 40, "vocab_size": 64}}, "vocab_size 64 has 31 keys for 40 pairs"),
        ({"generator": {"alpha": 0.0}}, r"alpha in \(0, 1\], found 0.0"),
        ({"length": 32}, "16 pairs need rows of 64 positions, found length 32"),
        ({"eval_length": 63}, "16 pairs need rows of 64 positions, found length 63"),
        ({"eval_rows": 0}, "eval_rows must be 1 or more, found 0"),
        ({"workers": -1}, "workers -1 must be 0 or more"),
    ],
)
def test_bad_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        given = dict(settings)
        generator = MQAR(**given.pop("generator", {}))  # type: ignore[arg-type]
        SyntheticData(generator, **given)  # type: ignore[arg-type]
