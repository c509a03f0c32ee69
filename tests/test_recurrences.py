"""One token of decoding: the steps that linear mixers take in the place of their ops, and when they take them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqlong.kernels import delta_rule as deltas
from seqlong.kernels import dplr as low_ranks
from seqlong.kernels import scalar_decay as scalars
from seqlong.kernels import vector_decay as vectors
from seqlong.layout import SequenceLayout
from seqlong.mixers import GLA, KDA, RWKV7, RetNet, recurrences
from seqlong.mixers.base import Mixer

OPS = {"scalar_decay": scalars, "vector_decay": vectors, "delta_rule": deltas, "dplr": low_ranks}


def arguments(name: str, length: int) -> tuple[Tensor, ...]:
    """Three rows, two heads, one group of queries where there may be fewer."""
    torch.manual_seed(1)
    groups = 1 if name in ("scalar_decay", "delta_rule") else 2
    q, k = torch.randn(2, 3, length, groups, 4).unbind()
    v, gate, unit = torch.randn(3, length, 2, 5), -torch.rand(3, length, 2, 4), torch.randn(3, length, 2, 4)
    more = {
        "scalar_decay": (gate[..., 0],),
        "vector_decay": (gate,),
        "delta_rule": (torch.rand(3, length, 2), gate[..., 0]),
        "dplr": (-unit, unit / 2, gate),
    }[name]
    return (q, k, v, *more)


@pytest.mark.parametrize("name", OPS)
def test_a_step_is_the_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, state = arguments(name, 1), torch.randn(3, 2, 4, 5)
    starts = torch.tensor([[False], [True], [False]])
    ours: Callable[..., tuple[Tensor, Tensor]] = getattr(recurrences, name)
    expected = getattr(OPS[name], name)(*given, starts=starts, initial_state=state)
    with torch.no_grad():
        monkeypatch.setattr(OPS[name], name, lambda *a, **k: pytest.fail("the op was called for one token"))
        for found, wanted in zip(ours(*given, starts=starts, initial_state=state), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_else_the_op_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    op = getattr(OPS[name], name)

    def counted(*positional: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(positional[2].shape[1])
        result: tuple[Tensor, Tensor] = op(*positional, **named)
        return result

    monkeypatch.setattr(OPS[name], name, counted)
    ours, state = getattr(recurrences, name), torch.randn(3, 2, 4, 5)
    ours(*arguments(name, 1), initial_state=state)  # gradients are asked for
    with torch.no_grad():
        ours(*arguments(name, 1))  # training has no state
        ours(*arguments(name, 2), initial_state=state)
    assert calls == [1, 1, 2]


@pytest.mark.parametrize("make", [GLA, RetNet, KDA, RWKV7])
def test_mixers_decode_by_steps(make: Callable[[int], Mixer], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in OPS.items():
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("an op was called for one token"))
    mixer = make(32)
    with torch.no_grad():
        mixer(torch.randn(2, 1, 32), SequenceLayout.build(2, 1), mixer.initial_state(2, "cpu", torch.float32))
