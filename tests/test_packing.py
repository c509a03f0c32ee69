"""Packing: every item lies whole in one row, nothing overlaps, and rows are well filled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlong.datamodules.packing import pack, pad_length, segment_ids
from seqlong.layout import SequenceLayout


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120), st.sampled_from([1, 2, 1024]))
def test_items_lie_side_by_side(lengths, capacity, open_rows):
    packing = pack(lengths, capacity, open_rows)
    taken = np.zeros((packing.rows, capacity), dtype=int)
    for item, length in enumerate(lengths):
        row, offset = packing.row[item], packing.offset[item]
        assert offset + length <= capacity
        taken[row, offset : offset + length] += 1
    assert taken.sum() == sum(lengths) and taken.max(initial=0) <= 1
    assert (taken.sum(axis=1) == packing.used).all() and (packing.used > 0).all()
    for row in range(packing.rows):
        assert taken[row, : packing.used[row]].all()  # padding is at the end alone
        offsets = packing.offset[packing.items(row)].tolist()
        assert offsets == sorted(offsets) and (packing.row[packing.items(row)] == row).all()

    ids = segment_ids(
        packing.row[packing.order],
        packing.offset[packing.order],
        np.array(lengths, int)[packing.order],
        packing.rows,
        capacity,
    )
    assert ((ids > 0) == (taken > 0)).all()
    for row in range(packing.rows):
        sizes = [lengths[item] for item in packing.items(row)]
        assert ids[row][ids[row] > 0].tolist() == np.repeat(np.arange(1, len(sizes) + 1), sizes).tolist()


def test_rows_are_well_filled_and_always_the_same():
    lengths = np.random.default_rng(0).integers(1, 8192, 5000)
    packing = pack(lengths, 8192)
    assert packing.rows <= 1.03 * lengths.sum() / 8192
    assert (packing.row == pack(lengths, 8192).row).all()
    assert pack(lengths, 8192, open_rows=1).rows > packing.rows


def test_one_open_row_keeps_the_order():
    packing = pack([3, 3, 3, 1, 4], 6, open_rows=1)
    assert packing.row.tolist() == [0, 0, 1, 1, 2] and packing.offset.tolist() == [0, 3, 0, 3, 0]


def test_nothing_to_pack():
    packing = pack([], 10)
    assert (packing.rows, packing.used.size) == (0, 0)


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3]])
def test_items_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in \[1, 10\]"):
        pack(lengths, 10)


def test_padding_to_a_multiple():
    assert [pad_length(length, 8) for length in (1, 8, 9)] == [8, 8, 16]
    ids = segment_ids([0, 0, 1], [0, 2, 0], [2, 3, 1], 2, 5, multiple=4)
    assert ids.tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert ids.dtype == np.int32


def test_ids_are_what_the_layout_reads():
    import torch

    ids = torch.from_numpy(segment_ids([0, 0, 1], [0, 2, 0], [2, 3, 4], 2, 6))
    layout = SequenceLayout.build(2, 6, ids)
    assert layout.boundaries == [[(0, 2), (2, 5)], [(0, 4)]]
    assert layout.positions[0, :5].tolist() == [0, 1, 0, 1, 2]
