"""The definition of block_attention: a loop over queries in float64."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def block_attention_reference(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    chosen: Int[Tensor, "b t j c"],
    block: int,
) -> Float[Tensor, "b t h v"]:
    """Each query over its own block, up to itself, and its chosen earlier blocks (``op.py``)."""
    length, heads, width = q.shape[1:]
    keys = k.shape[1]
    k64, v64 = (x.double().repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    index = torch.arange(keys, device=q.device)
    outputs = []
    for step in range(length):
        place = keys - length + step
        picked = (index // block)[:, None] == chosen[:, step, :, None, :]  # (b j s c)
        seen = picked.any(-1) & (index // block < place // block)
        seen = seen | ((index // block == place // block) & (index <= place))
        seen = seen.repeat_interleave(heads // chosen.shape[2], dim=1)
        scores = torch.einsum("bhk,bshk->bhs", q[:, step].double(), k64) / width**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, v64))
    return torch.stack(outputs, dim=1).to(v.dtype)
