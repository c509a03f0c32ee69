"""Rows of documents: each position of a split in exactly one row of an epoch, however documents fill the rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlong.datamodules.mixture import BLOCK, Mixture, slots
from seqlong.datamodules.text.rows import LAYOUTS, EvaluationRows, Spans, shuffled, streamed
from seqlong.errors import ConfigError


def spans(lengths: list[int], first: int = 0) -> Spans:
    sizes = np.array(lengths, dtype=np.int64)
    return Spans(np.arange(len(sizes)) + 7, np.full_like(sizes, first), sizes + first)


def covered(pieces, given: Spans, length: int) -> None:
    """Each position once; rows are filled from the left without holes, and no further than they are long."""
    seen = {
        number: np.zeros(stop, int) for number, stop in zip(given.document.tolist(), given.stop.tolist(), strict=True)
    }
    ends: dict[int, int] = {}
    for row, offset, document, start, size, more in pieces:
        assert offset == ends.get(row, 0) and size > 0
        ends[row] = offset + size
        assert ends[row] <= length
        seen[document][start : start + size] += 1
        assert not more or start + size < len(seen[document])
    for document, start in zip(given.document.tolist(), given.start.tolist(), strict=True):
        assert (seen[document][start:] == 1).all() and (seen[document][:start] == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["cut", "fit", "single"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 17),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_an_epoch_has_every_position_once(kind, lengths, length, first, epoch):
    given = spans(lengths, first)
    layout = LAYOUTS[kind](given, length, 3)
    pieces = [piece for window in range(layout.count) for piece in layout.pieces(epoch, window, window)]
    covered(pieces, given, length)
    mixed = shuffled(layout, np.arange(layout.count) + epoch * layout.count, range(layout.count), 3)
    covered(mixed, given, length)
    if kind == "single":
        assert all(len({piece.document for piece in pieces if piece.row == row}) == 1 for row in range(layout.count))
    if kind == "fit":
        short = [number + 7 for number, size in enumerate(lengths) if size <= length]
        assert all(sum(piece.document == number for piece in pieces) == 1 for number in short)
    for window in range(layout.count):
        begins = layout.pieces(epoch, window, 0)[0]
        before = layout.pieces(epoch, window - 1, 0)[-1] if window else None
        goes_on = before is not None and (before.document, before.start + before.length) == begins[2:4]
        if kind == "fit":
            assert not layout.follows(epoch, window)
        elif window:
            assert layout.follows(epoch, window) == goes_on


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["cut", "single"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 17),
    st.integers(1, 5),
)
def test_streams_see_every_position_once_and_follow_on(kind, lengths, length, lanes):
    given = spans(lengths)
    layout = LAYOUTS[kind](given, length, 5)
    share = -(-layout.count // lanes)
    for epoch in range(2):
        pieces, before = [], [None] * lanes
        for step in range(epoch * share, (epoch + 1) * share):
            for lane in range(lanes):
                found, follows = streamed(layout, step, lane, lanes, step * lanes + lane)
                pieces += found
                if follows:
                    last, begins = before[lane], found[0]
                    assert (last.document, last.start + last.length) == (begins.document, begins.start)
                before[lane] = found[-1] if found else None
        covered(pieces, given, length)


@pytest.mark.parametrize("kind", ["cut", "single"])
def test_books_are_cut_elsewhere_in_each_epoch(kind):
    layout = LAYOUTS[kind](spans([1000]), 64, 0)
    cuts = [
        frozenset(piece.start for window in range(layout.count) for piece in layout.pieces(epoch, window, 0))
        for epoch in range(8)
    ]
    assert len(set(cuts)) == 8


def test_documents_come_in_another_order_in_each_epoch_and_for_each_seed():
    given = spans([3] * 20)
    orders = [
        tuple(piece.document for piece in LAYOUTS["cut"](given, 60, seed).pieces(epoch, 0, 0))
        for seed in range(2)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("single", [True, False])
def test_evaluation_sees_each_position_once(single):
    given = spans([5, 30, 1, 64, 16, 33])
    rows = EvaluationRows(given, 16, single)
    numbers = np.arange(rows.size)
    covered(rows.pieces(numbers, numbers), given, 16)


# Mixtures


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda w: sum(w) > 0), st.integers(6, 1000))
def test_slots_are_shares(weights, places):
    count = slots(weights, places)
    assert count.sum() == places and count.min() >= 0
    shares = np.array(weights) / sum(weights) * places
    assert all((one >= 1) == (weight > 0) for one, weight in zip(count, weights, strict=True))
    if (shares >= 1).all():
        assert np.abs(count - shares).max() < 1


def test_a_mixture_is_a_bijection_with_its_shares():
    mixture = Mixture([0.7, 0.0, 0.3], 5)
    source, number = mixture.assign(np.arange(3 * BLOCK))
    assert np.bincount(source).tolist() == [3 * 700, 0, 3 * 300]
    for which, count in ((0, 2100), (2, 900)):
        assert sorted(number[source == which].tolist()) == list(range(count))
    head = np.bincount(source[:200], minlength=3) / 200
    assert np.abs(head - [0.7, 0, 0.3]).max() < 0.1  # mixed, not one after the other
    assert mixture.assign(np.array([1234]))[0][0] == source[1234]
    assert (Mixture([0.7, 0.0, 0.3], 6).assign(np.arange(200))[0] != source[:200]).any()


@pytest.mark.parametrize(
    ("weights", "places", "message"),
    [
        ([0.0], 5, "0 or more, and one at least"),
        ([-1.0, 2.0], 5, "0 or more"),
        ([1.0] * 3, 2, "3 sources cannot share 2"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be(weights, places, message):
    with pytest.raises(ConfigError, match=message):
        slots(weights, places)
