"""RWKV-6 (Finch): a decay a channel, made from the token and the one before it; a bonus for the token itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.linear import precise, split_heads, still
from seqlong.mixers.recurrences import vector_decay
from seqlong.mixers.shift import ShiftState, token_before


class RWKV6(Mixer):
    """``o_t = r_t (S_{t-1} + diag(u) k_tᵀ v_t)``, ``S_t = diag(exp(-exp(w_t))) S_{t-1} + k_tᵀ v_t``.

    r, k, v, the gate and ``w = w0 + tanh(x A) B`` are each made of a mix of the token x and the one before it, x',
    ``x + (x' - x) (μ + tanh((x + (x' - x) μ_x) A_i) B_i)``. LayerNorm of each head, times SiLU of the gate. The first
    values of μ, w0 and u depend on channel and depth as in the published code (RWKV-LM, RWKV-v5/src/model.py, x060), as
    does the norm's weight, ``((l + 1) / L)^0.7`` in block l; A and A_i start at zero, B and B_i within 0.01. Other
    matrices start as ``nn.Linear`` does. Source: arXiv 2404.05892.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        mix_rank: numbers between the two layers that make each mix.
        decay_rank: numbers between the two layers that make the decay.
        norm_eps: added to the variance in the norm; 64e-5 if not given, as for heads of 64.
    """

    bounded_state = True
    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        mix_rank: int = 32,
        decay_rank: int = 64,
        norm_eps: float = 64e-5,
    ) -> None:
        super().__init__()
        positive("RWKV6", mix_rank=mix_rank, decay_rank=decay_rank)
        self.heads, self.head_dim, self.norm_eps = heads, split_heads("RWKV6", d_model, heads), norm_eps
        self.mix_base = nn.Parameter(torch.empty(d_model))
        self.mix = nn.Parameter(torch.empty(5, d_model))  # for w, k, v, r and the gate
        self.mix_down = nn.Parameter(torch.zeros(d_model, 5 * mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, d_model).uniform_(-0.01, 0.01))
        self.decay = nn.Parameter(torch.empty(d_model))
        self.decay_down = nn.Parameter(torch.zeros(d_model, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, d_model).uniform_(-0.01, 0.01))
        self.bonus = nn.Parameter(torch.empty(heads, self.head_dim))
        self.r_proj, self.k_proj, self.v_proj, self.gate_proj, self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(5)
        )
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.place(0, 1)

    @torch.no_grad()
    def place(self, layer: int, layers: int) -> None:
        width = self.decay.shape[0]
        channel = torch.arange(width, device=self.decay.device, dtype=torch.float64)
        upward, downward = layer / max(1, layers - 1), 1 - layer / layers
        part, along = channel / width, channel / max(1, width - 1)
        slow, fast = 1 - part**downward, 1 - part ** (0.5 * downward)
        self.mix_base.copy_(slow)
        self.mix.copy_(torch.stack([slow, slow, slow - 0.3 * upward, fast, fast]))
        self.decay.copy_(-6 + 5 * along ** (0.7 + 1.3 * upward))
        self.bonus.copy_((upward * (1 - along) + 0.1 * ((channel + 1) % 3 - 1)).view_as(self.bonus))
        self.norm_weight.fill_(((layer + 1) / layers) ** 0.7)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: ShiftState | None = None
    ) -> tuple[Float[Tensor, "b t d"], ShiftState | None]:
        padding = layout.padding
        hidden = still(hidden, padding, 0.0)
        before, last = token_before(hidden, layout, None if state is None else state.last)
        change = before - hidden
        low = torch.tanh((hidden + change * self.mix_base) @ self.mix_down).unflatten(2, (5, -1))
        mixes = self.mix + torch.einsum("btir,ird->btid", low, self.mix_up)
        w, k, v, r, gate = (hidden[:, :, None] + change[:, :, None] * mixes).unbind(2)
        decay = precise(torch.tanh(w @ self.decay_down) @ self.decay_up, hidden) + precise(self.decay, hidden)
        r, k, v, decay = (
            x.unflatten(2, (self.heads, self.head_dim))
            for x in (self.r_proj(r), still(self.k_proj(k), padding, 0.0), self.v_proj(v), -decay.exp())
        )
        output, memory = vector_decay(
            r, k, v, still(decay, padding, 0.0), bonus=precise(self.bonus, hidden), starts=layout.starts,
            initial_state=None if state is None else state.memory,
        )  # fmt: skip
        normed = F.layer_norm(output, (self.head_dim,), eps=self.norm_eps).flatten(2)
        normed = normed * self.norm_weight + self.norm_bias
        output = self.out_proj(normed * F.silu(self.gate_proj(gate)))
        return output, None if state is None else ShiftState(memory, last)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> ShiftState:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return ShiftState(
            torch.zeros(rows, self.heads, self.head_dim, self.head_dim, device=device, dtype=kept),
            torch.zeros(rows, self.mix_base.shape[0], device=device, dtype=dtype),
        )
