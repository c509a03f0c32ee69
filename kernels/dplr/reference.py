"""The definition of dplr: a loop over tokens in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def dplr_reference(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    a: Float[Tensor, "b t h k"],
    b: Float[Tensor, "b t h k"],
    log_decay: Float[Tensor, "b t h k"],
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """``S_t = (diag(e^{g_t}) + b_tᵀ a_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``, token by token.

    With ``reverse`` the state runs from the last token to the first, and a start marks the last token (in reading
    order) of a segment, the one where the reversed state starts afresh.
    """
    rows, length, heads, width = q.shape
    q64, k64, v64, a64, b64 = (x.double() for x in (q, k, v, a, b))
    decay = log_decay.double().exp()
    state = q64.new_zeros(rows, heads, width, v.shape[3]) if initial_state is None else initial_state.double()
    outputs: list[Tensor] = []
    for step in reversed(range(length)) if reverse else range(length):
        if starts is not None:
            state = torch.where(starts[:, step, None, None, None], torch.zeros_like(state), state)
        read = (a64[:, step, :, :, None] * state).sum(dim=2, keepdim=True)
        write = b64[:, step, :, :, None] * read + k64[:, step, :, :, None] * v64[:, step, :, None, :]
        state = decay[:, step, :, :, None] * state + write
        outputs.append((q64[:, step, :, :, None] * state).sum(dim=2))
    if reverse:
        outputs.reverse()
    output = torch.stack(outputs, dim=1) if outputs else v64
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    return output.to(v.dtype), state.to(kept)
