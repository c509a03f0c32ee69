"""The definition of delta_rule: a loop over tokens in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

#: Added to the sum of squares before its root, as fla and the papers' code do.
EPS = 1e-6


def delta_rule_reference(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    beta: Float[Tensor, "b t h"],
    gate: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None = None,
    *,
    normalize: bool = False,
    beta_activation: str = "none",
    gate_activation: str = "log_decay",
    rate: Float[Tensor, "h"] | None = None,
    gate_bias: Float[Tensor, "h"] | Float[Tensor, "h k"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """``S~ = e^g S``, ``S = S~ + beta kᵀ (v - k S~)``, ``o = q S``, token by token; see the folder's README.

    With ``reverse`` the state runs from the last token to the first, and a start marks the last token (in reading
    order) of a segment, the one where the reversed state starts afresh.
    """
    rows, length, groups, width = q.shape
    heads, value_width = v.shape[2:]
    q64, k64 = q.double(), k.double()
    if normalize:
        q64, k64 = (x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt() for x in (q64, k64))
    q64, k64 = (x.repeat_interleave(heads // groups, dim=2) for x in (q64, k64))
    v64, weight = v.double(), beta.double()
    if beta_activation != "none":
        weight = weight.sigmoid() * (2 if beta_activation == "double_sigmoid" else 1)
    decay = v64.new_ones(rows, length, heads, 1)
    if gate is not None:
        log_decay = gate.double()
        if gate_activation == "softplus":
            if rate is None:
                raise ValueError("gate_activation='softplus' needs rate, found None")
            by_head = (-1,) if gate.dim() == 3 else (-1, 1)
            raw = log_decay
            if gate_bias is not None:
                raw = raw + (gate_bias.double() if gate_bias.dim() == 2 else gate_bias.double().view(by_head))
            log_decay = rate.double().view(by_head) * F.softplus(raw)
        decay = (log_decay if gate.dim() == 4 else log_decay[..., None]).exp()
    state = v64.new_zeros(rows, heads, width, value_width) if initial_state is None else initial_state.double()
    outputs: list[Tensor] = []
    for step in reversed(range(length)) if reverse else range(length):
        if starts is not None:
            state = torch.where(starts[:, step, None, None, None], torch.zeros_like(state), state)
        state = decay[:, step, :, :, None] * state
        key = k64[:, step, :, :, None]
        missing = v64[:, step] - (key * state).sum(dim=2)
        state = state + key * (weight[:, step, :, None] * missing)[:, :, None, :]
        outputs.append((q64[:, step, :, :, None] * state).sum(dim=2))
    if reverse:
        outputs.reverse()
    output = torch.stack(outputs, dim=1) if outputs else v64
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    return output.to(v.dtype), state.to(kept)
