"""Small models with experts, rows for them, and layouts with padding: for the tests of experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.ffn import MoE
from seqlong.layout import SequenceLayout
from seqlong.mixers import Attention, Mamba2

PADDED = torch.tensor([[1] * 9 + [2] * 4 + [0] * 2, [1] * 15, [1] * 3 + [0] * 12], dtype=torch.int32)


def layout(ids: Tensor | None = PADDED, rows: int = 3, length: int = 15) -> SequenceLayout:
    return SequenceLayout.build(rows, length, ids)


def config(**changes: Any) -> BackboneConfig:
    settings: dict[str, Any] = {
        "d_model": 16, "pattern": "ma", "ffn": partial(MoE, experts=4, active=2, d_hidden=8, z_loss=1e-2),
        "mixers": {"m": partial(Mamba2, d_state=8, head_dim=8), "a": partial(Attention, heads=2, window=6)},
    }  # fmt: skip
    return BackboneConfig(**{**settings, **changes})


def batch(rows: int = 4, length: int = 12, padded: bool = False) -> SequenceBatch:
    tokens = torch.randint(1, 16, (rows, length))
    ids = torch.ones(rows, length, dtype=torch.int32)
    if padded:
        ids[0, 5:] = 0
    targets = torch.where(ids > 0, tokens.roll(-1, 1), -1)
    return SequenceBatch(tokens=tokens, targets=targets, segment_ids=ids if padded else None)
