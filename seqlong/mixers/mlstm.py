"""mLSTM: a matrix memory with an input and a forget gate a head, both made from the token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.linear import LinearMixer, LinearState, precise, split_heads, still
from seqlong.mixers.recurrences import scalar_decay


class MLSTM(LinearMixer):
    """``C_t = σ(f_t) C_{t-1} + i_t k_tᵀ v_t``, ``h_t = q_t C_t / √k``, RMSNorm of each head, times a sigmoid gate.

    ``input_gate="sigmoid"``: ``i = σ(W x + b)``. ``"exponential"``: ``i = exp(W x + b)``, and h is divided by
    ``max(|q_t n_t| / √k, 1)``, where n is the same sum of keys alone. Sums are kept divided by e^m,
    ``m_t = max(log σ(f_t) + m_{t-1}, log i_t)``, so nothing overflows; h does not depend on m, which has no gradient.
    The source adds 1e-6 to the divisor, which would make it depend. The state is ``C``; the exponential form's has two
    more columns, n and m. Gates start with weights of zero, forget biases from 3 to 6, head by head, input biases at
    -10 (xLSTM-7B's, as in transformers; the code of the first paper draws these from N(0, 0.1)). Source: arXiv
    2405.04517; the sigmoid gate arXiv 2503.14376, the widths and the biases arXiv 2503.13427.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        expand_k: width of all keys over d_model.
        expand_v: width of all values over d_model.
        input_gate: as above.
        input_bias: b at first.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        input_gate: Literal["sigmoid", "exponential"] = "exponential",
        input_bias: float = -10.0,
        norm_eps: float = 1e-6,
    ) -> None:
        if input_gate not in ("sigmoid", "exponential"):
            raise ValueError(f"MLSTM has input gates sigmoid and exponential, found '{input_gate}'")
        key, value = (split_heads("MLSTM", int(d_model * expand), heads) for expand in (expand_k, expand_v))
        super().__init__(d_model, heads, key, value, gate="sigmoid", norm_eps=norm_eps)
        self.exponential = input_gate == "exponential"
        self.sequence_parallel = not self.exponential  # whose largest exponent so far is no linear state
        self.gates_proj = nn.Linear(d_model, 2 * heads)  # forget, input
        nn.init.zeros_(self.gates_proj.weight)
        with torch.no_grad():
            self.gates_proj.bias.copy_(torch.cat([torch.linspace(3, 6, heads), torch.full((heads,), input_bias)]))

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        starts = layout.starts
        raw = precise(F.linear(hidden, self.gates_proj.weight), hidden)  # a bias of -10 has few digits in bfloat16
        raw = raw + precise(self.gates_proj.bias, hidden)
        forget, write = raw.chunk(2, dim=-1)
        forget = still(F.logsigmoid(forget), layout.padding, 0.0)
        q = q * self.key_dim**-0.5
        if not self.exponential:
            k = (k * torch.sigmoid(write)[..., None]).to(k.dtype)
            return scalar_decay(q, k, v, forget, starts=starts, initial_state=memory, fragment=layout.fragment)
        write = still(write, layout.padding, -torch.inf)
        before = write.new_zeros(len(write), self.heads) if memory is None else memory[:, :, 0, -1].detach()
        largest = _running_maximum(forget.detach(), write.detach(), starts, before)
        decay = forget + torch.cat([before[:, None], largest], dim=1)[:, :-1] - largest
        decay = decay - decay.detach().clamp(min=0)  # no more than rounding, but at starts, where nothing is kept
        k = (k * (write - largest).exp()[..., None]).to(k.dtype)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        output, after = scalar_decay(
            q, k, v, decay, starts=starts, initial_state=None if memory is None else memory[..., :-1]
        )
        total, weight = precise(output, hidden).split([self.value_dim, 1], dim=-1)
        least = (-largest).exp().clamp(min=torch.finfo(largest.dtype).tiny)[..., None]
        last = largest[:, -1] if largest.shape[1] else before
        column = last.to(after.dtype)[:, :, None, None].expand(*after.shape[:3], 1)
        return (total / torch.maximum(weight.abs(), least)).to(output.dtype), torch.cat([after, column], dim=-1)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> LinearState:
        memory = super().initial_state(rows, device, dtype).memory
        return LinearState(F.pad(memory, (0, 2)) if self.exponential else memory)


def _running_maximum(
    decay: Float[Tensor, "b t h"], x: Float[Tensor, "b t h"], starts: Bool[Tensor, "b t"] | None,
    before: Float[Tensor, "b h"],
) -> Float[Tensor, "b t h"]:  # fmt: skip
    """``m_t = max(decay_t + m_{t-1}, x_t)``, afresh at starts, in log t steps over all tokens."""
    if starts is not None:
        decay = decay.masked_fill(starts[..., None], -torch.inf)
    x = torch.cat([torch.maximum(x[:, :1], decay[:, :1] + before[:, None]), x[:, 1:]], dim=1)
    step = 1
    while step < x.shape[1]:
        x = torch.cat([x[:, :step], torch.maximum(x[:, step:], decay[:, step:] + x[:, :-step])], dim=1)
        decay = torch.cat([decay[:, :step], decay[:, step:] + decay[:, :-step]], dim=1)
        step *= 2
    return x
