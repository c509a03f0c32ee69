"""The definitions of scalar_decay and bidirectional_decay: loops over tokens in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def scalar_decay_reference(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"],
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Float[Tensor, "b h k v"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """``S_t = exp(g_t) S_{t-1} + k_tᵀ v_t``, ``o_t = q_t S_t``, token by token; see the folder's README for shapes.

    With ``reverse`` the state runs from the last token to the first, and a start marks the last token (in reading
    order) of a segment, the one where the reversed state starts afresh.
    """
    rows, length, groups, width = q.shape
    heads, value_width = v.shape[2:]
    q64, k64 = (x.double().repeat_interleave(heads // groups, dim=2) for x in (q, k))
    v64, decay = v.double(), log_decay.double().exp()
    state = q64.new_zeros(rows, heads, width, value_width) if initial_state is None else initial_state.double()
    outputs: list[Tensor] = []
    for step in reversed(range(length)) if reverse else range(length):
        if starts is not None:
            state = torch.where(starts[:, step, None, None, None], torch.zeros_like(state), state)
        update = k64[:, step, :, :, None] * v64[:, step, :, None, :]
        state = decay[:, step, :, None, None] * state + update
        outputs.append((q64[:, step, :, :, None] * state).sum(dim=2))
    if reverse:
        outputs.reverse()
    output = torch.stack(outputs, dim=1) if outputs else v64
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    return output.to(v.dtype), state.to(kept)


def last_tokens(starts: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Marks of the last token of each segment, from those of the first; the row's own last token needs none."""
    return torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], dim=1)


def bidirectional_decay_reference(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"],
    starts: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t h v"]:
    """The scan from the left and the scan from the right, less the token itself, which both have read."""
    repeat = v.shape[2] // q.shape[2]
    inputs = (q.double(), k.double(), v.double(), log_decay.double())
    rightward, _ = scalar_decay_reference(*inputs, starts)
    ends = None if starts is None else last_tokens(starts)
    leftward, _ = scalar_decay_reference(*inputs, ends, reverse=True)
    itself = (inputs[0] * inputs[1]).sum(-1, keepdim=True).repeat_interleave(repeat, dim=2) * inputs[2]
    return (rightward + leftward - itself).to(v.dtype)
