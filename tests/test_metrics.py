"""Metrics are exact sums; those over two ranks are in test_tasks.py."""

from __future__ import annotations

import math

import pytest
import torch

from seqlong.metrics import Accuracy, BitsPerToken, RunningSums


def test_bits_count_each_position_once_and_only_those_that_count() -> None:
    metric = BitsPerToken()
    metric.update(torch.tensor([[1.0, 5.0], [2.0, float("nan")]]), torch.tensor([[True, False], [True, False]]))
    metric.update(torch.tensor([[6.0]]), torch.tensor([[True]]))
    assert metric.compute().item() == pytest.approx(3.0 / math.log(2))
    metric.reset()
    metric.update(torch.ones(1, 1), torch.tensor([[False]]))
    assert math.isnan(metric.compute().item())


def test_sums_do_not_stop_growing() -> None:
    """In float32, 2^24 + 1 = 2^24; and half precision of the model does not reach the metric."""
    metric = BitsPerToken().half()
    one = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    metric.update(*one)
    metric.nats += 2**24 - 1
    metric.update(*one)
    assert metric.nats.item() == 2**24 + 1
    sums = RunningSums()
    sums.add(x=torch.tensor(2.0**24))
    sums.add(x=torch.tensor(1.0))
    assert sums.read()["x"].item() == 2**24 + 1


def test_accuracy() -> None:
    metric = Accuracy()
    counted = torch.tensor([[True, True, False, True]])
    metric.update(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 0, 3, 4]]), counted)
    assert metric.compute().item() == pytest.approx(2 / 3)


def test_running_sums_go_on_from_what_was_read() -> None:
    sums = RunningSums()
    assert sums.read() == {}
    sums.add(loss=torch.tensor(1.5, requires_grad=True), batches=1.0)
    sums.add(loss=torch.tensor([2.0]), batches=1.0)
    read = sums.read()
    assert {name: value.item() for name, value in read.items()} == {"loss": 3.5, "batches": 2.0}
    assert not any(value.requires_grad for value in read.values())
    again = RunningSums()
    again.load(read)
    again.add(loss=torch.tensor(1.0), batches=1.0)
    assert {name: value.item() for name, value in again.read().items()} == {"loss": 4.5, "batches": 3.0}
    assert sums.read()["loss"].item() == 3.5  # not changed by the one that went on from it
    again.reset()
    assert again.read() == {}
