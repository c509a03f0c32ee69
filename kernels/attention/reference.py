"""The definition of attention: a loop over queries in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def first_of_segments(sinks: int, rows: int, keys: int, ids: Tensor | None, device: torch.device) -> Tensor:
    """``(b s)`` True at the first ``sinks`` keys of every run of one id; of every row if there are no ids."""
    steps = torch.arange(keys, device=device).expand(rows, keys)
    return steps < sinks if ids is None else steps - run_starts(ids) < sinks


def run_starts(ids: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """Where the run of equal ids begins that a column is in."""
    steps = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    fresh = torch.zeros_like(ids, dtype=torch.bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return torch.where(fresh, steps, 0).cummax(dim=1).values


def attention_reference(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    causal: bool = True,
    window: int | None = None,
    query_ids: Int[Tensor, "b t"] | None = None,
    key_ids: Int[Tensor, "b s"] | None = None,
    slopes: Float[Tensor, "h"] | None = None,
    sinks: int = 0,
    always: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b t h v"]:
    """``o_i = Σ_j softmax_j(q_i·k_j / √k - slope |i - j|) v_j`` over the keys that query i may see (``op.py``)."""
    rows, length, heads, width = q.shape
    keys, offset = k.shape[1], k.shape[1] - length
    repeat = heads // k.shape[2]
    k64, v64 = (x.double().repeat_interleave(repeat, dim=2) for x in (k, v))
    index = torch.arange(keys, device=q.device)
    if always is None:
        always = first_of_segments(sinks, rows, keys, key_ids, q.device)
    outputs = []
    for step in range(length):
        distance = offset + step - index
        seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & ((distance.abs() < window) | always)
        if query_ids is not None and key_ids is not None:
            seen = seen & (key_ids == query_ids[:, step, None])
        logits = torch.einsum("bhk,bshk->bhs", q[:, step].double(), k64) / width**0.5
        if slopes is not None:
            logits = logits - slopes.double()[:, None] * distance.abs()
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, v64))
    return torch.stack(outputs, dim=1).to(v.dtype)
