"""The definition of vector_decay: a loop over tokens in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.vector_decay.gates import activated


def vector_decay_reference(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"] | None,
    v: Float[Tensor, "b t h v"],
    gate: Float[Tensor, "b t h k"],
    activation: str = "log_decay",
    divisor: float = 1.0,
    lower_bound: Float[Tensor, "h k"] | None = None,
    bonus: Float[Tensor, "h k"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """``S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``, token by token; shapes are in the README.

    With ``bonus`` u: ``o_t = q_t (S_{t-1} + diag(u) k_tᵀ v_t)``. With ``reverse`` the state runs from the last token to
    the first, and a start marks the token before which, in that order, it starts afresh.
    """
    rows, length, heads, width = q.shape
    q64, v64 = q.double(), v.double()
    bound = None if lower_bound is None else lower_bound.double()
    decay, made = activated(gate.double(), activation, divisor, bound)
    k64 = made if k is None else k.double()
    assert k64 is not None
    state = v64.new_zeros(rows, heads, width, v.shape[3]) if initial_state is None else initial_state.double()
    outputs: list[Tensor] = []
    for step in reversed(range(length)) if reverse else range(length):
        if starts is not None:
            state = torch.where(starts[:, step, None, None, None], torch.zeros_like(state), state)
        update = k64[:, step, :, :, None] * v64[:, step, :, None, :]
        seen = state if bonus is None else state + bonus.double()[..., None] * update
        state = decay[:, step, :, :, None] * state + update
        outputs.append((q64[:, step, :, :, None] * (state if bonus is None else seen)).sum(dim=2))
    if reverse:
        outputs.reverse()
    output = torch.stack(outputs, dim=1) if outputs else v64
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    return output.to(v.dtype), state.to(kept)
