"""The counter-based sampler: a permutation that is one, and batches that do not depend on how they are shared out."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlong.datamodules.sampler import (
    BatchSampler,
    EvaluationSampler,
    Stage,
    below,
    coin,
    mix,
    permute,
)
from seqlong.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size):
    for key in ((0,), (1,), (-5, 3)):
        assert sorted(permute(np.arange(size), size, *key).tolist()) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**62), st.integers(-(2**63), 2**63 - 1), st.data())
def test_permute_is_one_to_one_at_any_size(size, seed, data):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    found = permute(index, size, seed)
    assert len(set(found.tolist())) == len(index)
    assert found.min() >= 0 and found.max() < size
    one_by_one = [int(permute(place, size, seed)[0]) for place in index]
    assert found.tolist() == one_by_one


def test_permutations_differ_by_key_and_look_random():
    size = 10_000
    found = permute(np.arange(size), size, 1, 2)
    assert (found == permute(np.arange(size), size, 1, 3)).sum() < 10
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.05
    assert abs((np.diff(found) > 0).mean() - 0.5) < 0.03
    # every position of a small permutation is reached from every other about as often
    small = np.array([permute(np.arange(6), 6, key) for key in range(3000)])
    for place in range(6):
        assert np.abs(np.bincount(small[:, place], minlength=6) / 3000 - 1 / 6).max() < 0.04


def test_permute_refuses_what_is_outside():
    with pytest.raises(ValueError, match=r"index outside \[0, 5\)"):
        permute([5], 5, 0)
    with pytest.raises(ValueError, match=r"index outside"):
        permute([-1], 5, 0)


def test_numbers_stay_the_same_between_versions():
    """A run is resumed by number alone, so these may never change."""
    assert permute(np.arange(10), 10, 0, 1).tolist() == GOLDEN_PERMUTATION
    assert mix(1, 2, 3).tolist() == GOLDEN_MIX


GOLDEN_PERMUTATION = [1, 3, 4, 2, 6, 5, 0, 9, 7, 8]
GOLDEN_MIX = [9812528628958509896]


def test_mix_tells_counters_and_their_order_apart():
    values = {int(mix(*counters)[0]) for counters in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**40,), (2**40, 0)]}
    assert len(values) == 8
    flips = [bin(int(mix(5)[0]) ^ int(mix(5 ^ (1 << bit))[0])).count("1") for bit in range(63)]
    assert 26 < np.mean(flips) < 38


def test_coins_and_dice_are_fair():
    counters = np.arange(20_000)
    for probability in (0.0, 0.1, 0.5, 1.0):
        assert abs(coin(probability, 7, counters).mean() - probability) < 0.015
    dice = below(6, 7, counters)
    assert np.abs(np.bincount(dice, minlength=6) / 20_000 - 1 / 6).max() < 0.015
    assert below(np.array([1, 2]), 0, np.arange(2))[0] == 0


STAGES = [Stage(64, 8, 3), Stage(128, 4, 2), Stage(256, 12)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_make_the_batches_of_one(world):
    whole = list(islice(BatchSampler(STAGES), 8))
    ranks = [list(islice(BatchSampler(STAGES, rank, world), 8)) for rank in range(world)]
    for batch, request in enumerate(whole):
        shares = [rank[batch].samples for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        assert np.stack(shares, axis=1).reshape(-1).tolist() == request.samples.tolist()
        assert {rank[batch].length for rank in ranks} == {request.length}


def test_stages_follow_one_another_and_the_last_lasts():
    requests = list(islice(BatchSampler(STAGES), 7))
    assert [request.length for request in requests] == [64] * 3 + [128] * 2 + [256] * 2
    assert np.concatenate([request.samples for request in requests]).tolist() == list(range(24 + 8 + 24))
    assert [request.first for request in requests] == [0] * 3 + [24] * 2 + [32] * 2
    assert [request.rows for request in requests] == [8] * 3 + [4] * 2 + [12] * 2
    assert BatchSampler(STAGES).request(10**9).length == 256


def test_steps_count_optimizer_steps():
    lengths = [request.length for request in islice(BatchSampler(STAGES, batches_per_step=2), 11)]
    assert lengths == [64] * 6 + [128] * 4 + [256]


def test_start_goes_on_exactly():
    whole = [request.samples.tolist() for request in islice(BatchSampler(STAGES), 9)]
    for start in range(9):
        rest = [request.samples.tolist() for request in islice(BatchSampler(STAGES, start=start), 9 - start)]
        assert rest == whole[start:]


def test_endless_but_sized():
    assert len(BatchSampler(STAGES)) == 10**9


@pytest.mark.parametrize(
    ("stages", "world", "message"),
    [
        ([], 1, r"found an empty list"),
        (
            [Stage(8, 6)],
            4,
            r"batch: batch_size 6 \(rows over all ranks\) does not divide among 4 ranks; take a multiple",
        ),
        ([Stage(8, 4), Stage(8, 4)], 1, r"stage 1 of 2: steps is None; every stage but the last needs"),
        ([Stage(8, 4, 1), Stage(8, 3)], 2, r"stage 2 of 2: batch_size 3 .* does not divide among 2"),
        ([Stage(0, 4)], 1, r"length 0 and batch_size 4 must both be 1 or more"),
    ],
)
def test_bad_stages(stages, world, message):
    with pytest.raises(ConfigError, match=message):
        BatchSampler(stages, 0, world)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 13])
def test_evaluation_sees_each_row_once_in_step(rows, world):
    samplers = [EvaluationSampler(rows, 6, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(rank) for rank in batches} == {-(-rows // 6)} == {len(sampler) for sampler in samplers}
    for together in zip(*batches, strict=True):
        assert len({len(share) for share in together}) == 1
    seen = np.concatenate([share for rank in batches for share in rank])
    assert sorted(seen[seen >= 0].tolist()) == list(range(rows))
    assert (seen < 0).sum() < world


def test_evaluation_batch_must_divide():
    with pytest.raises(ConfigError, match=r"evaluation batch size 3 .* does not divide among 2 ranks"):
        EvaluationSampler(9, 3, 0, 2)
