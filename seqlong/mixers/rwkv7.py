"""RWKV-7 (Goose): a delta rule whose key to erase, key to write and decay differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer, positive
from seqlong.mixers.linear import precise, split_heads, still
from seqlong.mixers.recurrences import dplr
from seqlong.mixers.shift import ShiftState, token_before


class LowRankGate(nn.Module):
    """``f(x A) B + bias``; A starts at zero, B orthogonal times 0.1."""

    def __init__(self, d_model: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(d_model, rank))
        self.up = nn.Parameter(0.1 * nn.init.orthogonal_(torch.empty(rank, d_model)))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Float[Tensor, "b t d"], inner: str) -> Float[Tensor, "b t d"]:
        low = x @ self.down
        low = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[inner](low) if inner else low
        made = low @ self.up
        return made if self.bias is None else precise(made, x) + precise(self.bias, x)


class RWKV7(Mixer):
    """``S_t = (diag(w_t) - (α_t κ_t)ᵀ κ_t) S_{t-1} + k_tᵀ v_t``, ``o_t = r_t S_t``, ``log w = -e^{-1/2} σ(w0 + ...)``.

    κ is the key times a weight a channel, of length one; ``α = σ(...)``; ``k (1 + (α - 1) k_a)`` is written. r, w, k,
    v, α and the gate are each made of ``x + (x' - x) μ`` with x' the token before. LayerNorm of each head, plus
    ``(r · (k r_k)) v``, times the gate. First values are those of the published code (RWKV-LM, RWKV-v7/train_temp):
    those of μ and of the low-rank parts' biases depend on channel and depth, the norm's weight is
    ``((l + 1) / L)^0.7`` in block l; but ``out_proj`` does not start at zero. Later blocks of the source mix in the
    values of the first one; a mixer sees its own block only, so that is left out. Source: arXiv 2503.14456.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        decay_rank: numbers between the two layers that make w; about ``2.5 √d_model`` in steps of 32 if not given.
        erase_rank: the same for α.
        gate_rank: the same for the gate; about ``5 √d_model`` if not given.
        norm_eps: added to the variance in the norm; head width times 1e-5 if not given.
    """

    bounded_state = True
    residual_projections = ("out_proj",)

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        decay_rank: int | None = None,
        erase_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        positive("RWKV7", decay_rank=decay_rank, erase_rank=erase_rank, gate_rank=gate_rank)
        self.heads, self.head_dim = heads, split_heads("RWKV7", d_model, heads)
        self.norm_eps = self.head_dim * 1e-5 if norm_eps is None else norm_eps
        low, wide = (max(32, round(size / 32) * 32) for size in (2.5 * d_model**0.5, 5 * d_model**0.5))
        self.mix = nn.Parameter(torch.empty(6, d_model))  # for r, w, k, v, α and the gate
        self.decay = LowRankGate(d_model, low if decay_rank is None else decay_rank)
        self.erase = LowRankGate(d_model, low if erase_rank is None else erase_rank)
        self.gate = LowRankGate(d_model, wide if gate_rank is None else gate_rank, bias=False)
        self.key_erased = nn.Parameter(torch.empty(d_model))
        self.key_written = nn.Parameter(torch.full((d_model,), 1.02))
        self.bonus = nn.Parameter(torch.full((heads, self.head_dim), -0.04))
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        for linear, scale in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(linear.weight, -scale * d_model**-0.5, scale * d_model**-0.5)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.place(0, 1)

    @torch.no_grad()
    def place(self, layer: int, layers: int) -> None:
        width = self.mix.shape[1]
        channel = torch.arange(width, device=self.mix.device, dtype=torch.float64)
        upward, downward = layer / max(1, layers - 1), 1 - layer / layers
        part, along = channel / width, channel / max(1, width - 1)
        inside = 2 * (channel % self.head_dim) / max(1, self.head_dim - 1) - 1  # -1 to 1 in each head
        zigzag, slope = inside * inside.abs(), along - 0.5
        self.mix.copy_(torch.stack([1 - part ** (power * downward) for power in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)]))
        assert self.decay.bias is not None and self.erase.bias is not None
        self.decay.bias.copy_(-5.5 + 6 * along ** (1 + upward**0.3) + 2.5 * zigzag)
        self.erase.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * slope)
        self.key_erased.copy_(0.71 - 0.1 * slope)
        self.norm_weight.fill_(((layer + 1) / layers) ** 0.7)

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: ShiftState | None = None
    ) -> tuple[Float[Tensor, "b t d"], ShiftState | None]:
        padding, heads = layout.padding, (self.heads, self.head_dim)
        hidden = still(hidden, padding, 0.0)
        before, last = token_before(hidden, layout, None if state is None else state.last)
        change = before - hidden
        x_r, x_w, x_k, x_v, x_a, x_g = (hidden + change * mix for mix in self.mix)
        r, k, v = (x.unflatten(2, heads) for x in (self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)))
        decay = -(torch.e**-0.5) * torch.sigmoid(self.decay(x_w, "tanh")).unflatten(2, heads)
        erase = torch.sigmoid(self.erase(x_a, "")).unflatten(2, heads)
        erased = F.normalize(precise(k, hidden) * precise(self.key_erased, hidden).view(heads), dim=-1)
        k = k * (1 + (erase - 1) * precise(self.key_written, hidden).view(heads)).to(k.dtype)
        k, erased = still(k, padding, 0.0), still(erased, padding, 0.0)
        output, memory = dplr(
            r, k, v, -erased.to(k.dtype), (erased * erase).to(k.dtype), still(decay, padding, 0.0),
            starts=layout.starts, initial_state=None if state is None else state.memory,
        )  # fmt: skip
        normed = F.layer_norm(output, (self.head_dim,), eps=self.norm_eps).flatten(2)
        normed = (normed * self.norm_weight + self.norm_bias).unflatten(2, heads)
        output = (normed + (r * k * self.bonus).sum(-1, keepdim=True) * v).flatten(2) * self.gate(x_g, "sigmoid")
        return self.out_proj(output), None if state is None else ShiftState(memory, last)

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> ShiftState:
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return ShiftState(
            torch.zeros(rows, self.heads, self.head_dim, self.head_dim, device=device, dtype=kept),
            torch.zeros(rows, self.mix.shape[1], device=device, dtype=dtype),
        )
