"""What vector_decay's Triton kernels do not hold, made of what they do: wide heads, and RWKV-6's bonus.

Channels of keys do not mix, and outputs are sums over them; columns of values do not mix either. So a wide head is the
sum, and the row, of narrow ones. The bonus asks for what stood in the state before the token was written, which is what
the query of the token before it would have read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlong.kernels.plans import parts
from seqlong.kernels.precision import as_written

#: Widest head that the kernels hold on chip.
WIDEST = 128


def run(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    lower_bound: Tensor | None,
    bonus: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """As ``vector_decay``, of heads of any width."""
    settings = (gate, activation, divisor, lower_bound, starts, initial_state, reverse)
    if bonus is None:
        return _sliced(q, k, v, *settings)
    assert k is not None
    first, last = (slice(-1, None), slice(None, -1)) if reverse else (slice(0, 1), slice(1, None))
    read, final = _sliced(_shifted(q, -1, reverse), k, v, *settings)
    output = _shifted(read, 1, reverse)
    if starts is not None:
        output = output.masked_fill(starts[:, :, None, None], 0)
    if initial_state is not None:
        output = torch.cat(_in_order(_first_read(q[:, first], output[:, first], initial_state, starts, first),
                                     output[:, last], reverse), dim=1)  # fmt: skip
    itself = (q * bonus.to(q.dtype) * k).sum(dim=-1, keepdim=True)
    return torch.addcmul(output, itself.to(v.dtype), v), final


def _shifted(x: Tensor, by: int, reverse: bool) -> Tensor:
    """x (b t h d) moved on by one token (1) or back by one (-1) in the order of reading, zeros behind."""
    by = -by if reverse else by
    return F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0)) if by > 0 else F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1))


def _in_order(first: Tensor, others: Tensor, reverse: bool) -> list[Tensor]:
    return [others, first] if reverse else [first, others]


@as_written
def _first_read(q: Tensor, output: Tensor, state: Tensor, starts: Tensor | None, first: slice) -> Tensor:
    """What the first token read finds in the state that was handed in; one token of q and output."""
    read = torch.einsum("bthk,bhkv->bthv", q.float(), state.float()).to(output.dtype)
    return read if starts is None else torch.where(starts[:, first, None, None], output, read)


def _sliced(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    bound: Tensor | None,
    starts: Tensor | None,
    state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Without a bonus: one call for each part of the keys with each part of the values."""
    from seqlong.kernels.vector_decay.triton import run as narrow

    outputs, finals = [], []
    for columns in parts(v.shape[3], WIDEST):
        total: Any = None
        states = []
        for channels in parts(q.shape[3], WIDEST):
            read, final = narrow(
                q[..., channels], None if k is None else k[..., channels], v[..., columns], gate[..., channels],
                activation, divisor, None if bound is None else bound[:, channels], starts,
                None if state is None else state[:, :, channels, columns], reverse,
            )  # fmt: skip
            total = read if total is None else total + read
            states.append(final)
        outputs.append(total)
        finals.append(states[0] if len(states) == 1 else torch.cat(states, dim=2))
    if len(outputs) == 1:
        return outputs[0], finals[0]
    return torch.cat(outputs, dim=3), torch.cat(finals, dim=3)
