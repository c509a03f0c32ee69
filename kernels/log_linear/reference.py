"""The definition of log-linear attention: a loop over tokens in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def log_linear_reference(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"],
    levels: Float[Tensor, "b t h l"],
    beta: Float[Tensor, "b t h"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    states: Float[Tensor, "b h m k v"] | None = None,
    count: Int[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h m k v"], Int[Tensor, "b"]]:
    """Every level's state goes through the recurrence, the token enters level 0, and carries move states up.

    The carry is made after each token rather than before the next one, so that the stack is that of the count.
    """
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    stack, top = max(levels.shape[3] - 1, 1), levels.shape[3] - 1
    q64, k64 = (x.double().repeat_interleave(heads // groups, dim=2) for x in (q, k))
    v64, weights, decay = v.double(), levels.double(), log_decay.double().exp()
    state = q64.new_zeros(rows, heads, stack, width, value_width) if states is None else states.double()
    number = [0] * rows if count is None else count.tolist()
    outputs: list[Tensor] = []
    for step in range(length):
        if starts is not None:
            state = torch.where(starts[:, step, None, None, None, None], torch.zeros_like(state), state)
            number = [0 if starts[row, step] else number[row] for row in range(rows)]
        key = k64[:, step, :, None, :, None]  # (b h 1 k 1)
        state = decay[:, step, :, None, None, None] * state
        update = key[:, :, 0] * v64[:, step, :, None, :]
        if beta is not None:
            strength = beta.double()[:, step, :, None, None, None]
            state = state - strength * key * (key * state).sum(dim=3, keepdim=True)
            update = strength[:, :, 0] * update
        query = q64[:, step, :, None, :, None]
        read = (query * torch.cat([update[:, :, None], state], dim=2)).sum(dim=3)  # (b h 1+m v)
        level = [0] + [min(bucket + 1, top) for bucket in range(stack)]
        outputs.append((weights[:, step][:, :, level, None] * read).sum(dim=2))
        carried = []
        for row in range(rows):
            number[row] += 1
            into = min((number[row] & -number[row]).bit_length() - 1, stack - 1)
            low = update[row] + state[row, :, : into + 1].sum(dim=1)
            empty = torch.zeros_like(state[row, :, :into])
            carried.append(torch.cat([empty, low[:, None], state[row, :, into + 1 :]], dim=1))
        state = torch.stack(carried)
    output = torch.stack(outputs, dim=1) if outputs else v64
    kept = torch.float64 if v.dtype == torch.float64 else torch.float32
    return output.to(v.dtype), state.to(kept), torch.tensor(number, device=q.device)
