"""Attention that chooses, or that sees summaries: memory is linear in the row."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from peak_memory import grown

from seqlong.layout import SequenceLayout
from seqlong.mixers import Attention, MoBA, NativeSparseAttention, Rat, Scout


@pytest.mark.parametrize(
    "build",
    [
        partial(MoBA, heads=1, head_dim=2, block=256),
        partial(NativeSparseAttention, heads=2, head_dim=2, block=64),
        partial(Rat, heads=1),
        partial(Scout, mixer=partial(Attention, heads=1, window=8), heads=1),
    ],
)
def test_choosing_takes_memory_linear_in_the_row(build: Any) -> None:
    """Forward and backward over 16,384 tokens; which of them see which would be 256 MiB in bool alone."""
    mixer, hidden = build(4), torch.randn(1, 16384, 4, requires_grad=True)
    layout = SequenceLayout.build(1, 16384)
    mixer(hidden[:, :600], layout.slice(0, 600))[0].sum().backward()  # what torch keeps for itself
    assert grown(lambda: mixer(hidden, layout)[0].sum().backward()) < 160 << 20
