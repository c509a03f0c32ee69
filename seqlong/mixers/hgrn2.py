"""HGRN2: forget gates that double as keys, bounded from below."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlong.layout import SequenceLayout
from seqlong.mixers.linear import LinearMixer, precise, split_heads, still
from seqlong.mixers.recurrences import vector_decay


class HGRN2(LinearMixer):
    """``S_t = diag(f_t) S_{t-1} + (1 - f_t)ᵀ v_t``, ``o_t = silu(q_t) S_t``, ``f = λ + (1 - λ) σ(W x)``.

    RMSNorm over all heads together. The bound λ, a channel each, is learnt; it starts at l / L in block l of L, so that
    upper blocks remember longer, and at 0 in the first, where it stays. In the source the bounds of all blocks are one
    running softmax; here each block has its own. Source: arXiv 2404.07904.

    Args:
        d_model: width of the residual stream.
        heads: heads.
        expand_k: width of all forget gates over d_model: the state is ``(expand_k d_model / heads, d_model / heads)``.
        norm_eps: added to the mean square in the norm.
    """

    def __init__(self, d_model: int, heads: int = 4, expand_k: float = 1.0, norm_eps: float = 1e-5) -> None:
        key, value = (split_heads("HGRN2", int(d_model * expand), heads) for expand in (expand_k, 1.0))
        super().__init__(d_model, heads, key, value, gate="none", norm="row", norm_eps=norm_eps)
        self.bound = nn.Parameter(torch.zeros(heads, self.key_dim))
        self.bounded = True

    def place(self, layer: int, layers: int) -> None:
        self.bounded = layer > 0
        if self.bounded:
            nn.init.constant_(self.bound, math.log(layer / (layers - layer)))  # the logit of layer / layers
        else:
            del self.bound

    def features(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(q), k, v

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, layout: SequenceLayout, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.bounded:
            bound = torch.sigmoid(precise(self.bound, q))
        else:
            bound = torch.zeros(self.heads, self.key_dim, device=q.device, dtype=precise(q, q).dtype)
        gate = still(k, layout.padding, float("inf"))  # forgets nothing, writes nothing
        return vector_decay(
            q,
            None,
            v,
            gate,
            activation="lower_bound",
            lower_bound=bound,
            starts=layout.starts,
            initial_state=memory,
            fragment=layout.fragment,
        )
