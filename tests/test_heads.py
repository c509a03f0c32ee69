"""The language head: its type under autocast, exact for small vocabularies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqlong.heads import LanguageHead
from seqlong.kernels.cross_entropy.op import SMALL


@pytest.mark.parametrize("size", [16, SMALL + 1])
def test_logits_are_float32_under_autocast_and_exact_for_small_vocabularies(size: int) -> None:
    head = LanguageHead(8, size)
    hidden, targets = torch.randn(2, 5, 8), torch.randint(size, (2, 5))
    exact = hidden @ head.matrix.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, nll = head.logits(hidden), head.loss(hidden, targets)
    assert logits.dtype == nll.dtype == torch.float32
    assert torch.equal(logits, exact) is (size == 16)
    torch.testing.assert_close(logits, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(nll, F.cross_entropy(logits.mT, targets, reduction="none"))
    assert torch.equal(head.most_likely(hidden), head.logits(hidden).argmax(dim=-1))
