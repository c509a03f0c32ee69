"""What ops say of inputs that do not fit, which kernels would read beyond and torch might stretch in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seqlong.kernels.attention import summary_attention
from seqlong.kernels.attention.op import check as check_attention
from seqlong.kernels.block_attention import block_attention
from seqlong.kernels.block_attention.op import check as check_block_attention
from seqlong.kernels.cross_entropy.op import check as check_cross_entropy
from seqlong.kernels.norm.op import check as check_norm
from seqlong.kernels.rotary.op import check as check_rotary
from seqlong.kernels.short_conv.op import check as check_short_conv

IDS = torch.ones(2, 6, dtype=torch.int64)
MARKS = torch.zeros(2, 6, dtype=torch.bool)
CHOSEN = torch.full((2, 6, 2, 1), -1)


def x(*shape: int) -> Tensor:
    return torch.zeros(shape)


# The tests' own shape checks, which users do not have, stand before the public functions: so their checks are asked.
GOOD: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "attention": (check_attention, {"q": x(2, 6, 4, 8), "k": x(2, 6, 2, 8), "v": x(2, 6, 2, 5)}),
    "block_attention": (
        check_block_attention,
        {"q": x(2, 6, 4, 8), "k": x(2, 6, 2, 8), "v": x(2, 6, 2, 5), "chosen": CHOSEN, "block": 2},
    ),
    "linear_cross_entropy": (check_cross_entropy, {"hidden": x(2, 6, 8), "weight": x(5, 8), "targets": IDS}),
    "rms_norm": (check_norm, {"op": "rms_norm", "x": x(2, 6, 8), "weight": x(8)}),
    "rotary": (check_rotary, {"x": x(2, 6, 4, 8), "positions": IDS}),
    "short_conv": (check_short_conv, {"x": x(2, 6, 8), "weight": x(8, 4), "state": x(2, 3, 8), "starts": MARKS}),
}


@pytest.mark.parametrize(
    ("op", "wrong", "said"),
    [
        ("attention", {"k": x(2, 6, 3, 8)}, "4 heads, 3 groups"),
        ("attention", {"v": x(2, 5, 2, 5)}, r"v of shape \(2, 6, 2, 5\), found \(2, 5, 2, 5\)"),
        ("attention", {"k": x(2, 5, 2, 8), "v": x(2, 5, 2, 5)}, "keys for all 6 queries, found 5"),
        ("attention", {"window": 0}, "window of at least 1 position, found 0"),
        ("attention", {"query_ids": IDS}, "found query_ids alone"),
        ("attention", {"key_ids": IDS}, "found key_ids alone"),
        ("attention", {"query_ids": IDS[:1], "key_ids": IDS}, r"query_ids of shape \(2, 6\)"),
        ("attention", {"boundaries": [[(0, 6)], [(0, 6)]]}, "query_ids and key_ids with boundaries"),
        ("attention", {"window": 3, "always": MARKS}, "sinks with always"),
        ("attention", {"sinks": 2}, "sinks are kept beyond a window"),
        ("block_attention", {"block": 0}, "block=0"),
        ("block_attention", {"k": x(2, 6, 3, 8)}, "3 key heads"),
        ("block_attention", {"chosen": CHOSEN[:, :5]}, r"chosen of shape \(2, 6, 2, 1\)"),
        ("block_attention", {"chosen": CHOSEN.float()}, "chosen with four axes, of integers"),
        ("block_attention", {"k": x(2, 5, 2, 8), "v": x(2, 5, 2, 5)}, "keys for all 6 queries, found 5"),
        ("linear_cross_entropy", {"weight": x(5, 7)}, r"weight of shape \(5, 8\)"),
        ("linear_cross_entropy", {"targets": IDS[:, :5]}, r"targets of shape \(2, 6\)"),
        ("linear_cross_entropy", {"targets": IDS.float()}, "targets of integers"),
        ("linear_cross_entropy", {"bias": x(1)}, r"bias of shape \(5,\), found \(1,\)"),
        ("rms_norm", {"weight": x(1)}, r"rms_norm needs weight of shape \(8,\), found \(1,\)"),
        ("rms_norm", {"gate": x(1, 6, 8)}, r"gate of shape \(2, 6, 8\)"),
        ("rms_norm", {"groups": 3}, "divisible by groups, found 8 and 3"),
        ("rotary", {"x": x(2, 6, 4, 7)}, "even head width, found 7"),
        ("rotary", {"positions": IDS[:1]}, r"positions of shape \(2, 6\), found \(1, 6\)"),
        ("short_conv", {"weight": x(1, 4)}, r"weight of shape \(8, 4\)"),
        ("short_conv", {"weight": x(8)}, "weight .d w. with a tap"),
        ("short_conv", {"bias": x(1)}, r"bias of shape \(8,\)"),
        ("short_conv", {"state": x(2, 2, 8)}, r"state of shape \(2, 3, 8\)"),
        ("short_conv", {"starts": MARKS[:1]}, r"starts of shape \(2, 6\)"),
        ("short_conv", {"starts": IDS}, "starts of type bool"),
        ("short_conv", {"lengths": torch.tensor([6])}, r"lengths of shape \(2,\)"),
    ],
)
def test_what_does_not_fit_is_said(op: str, wrong: dict[str, Any], said: str) -> None:
    check, given = GOOD[op]
    check(**given)
    with pytest.raises(ValueError, match=said):
        check(**{**given, **wrong})


def test_a_key_of_its_own_needs_a_value() -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8)
    with pytest.raises(ValueError, match="own_k and own_v, or neither"):
        summary_attention(q, k, k, 2, own_k=torch.randn(1, 4, 2, 8))


def test_block_attention_has_no_second_derivative_and_says_so() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    output = block_attention(q, k, v, torch.full((1, 6, 2, 1), -1), 4)
    (first,) = torch.autograd.grad(output.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
