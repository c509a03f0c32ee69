"""summary_attention: each query sees one key for every stretch of tokens behind it, and perhaps its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqlong.kernels.attention.op import BLOCK, _fused
from seqlong.kernels.dispatch import choose

OFFERED = {
    "blocks": "torch's fused attention over blocks of queries, masks built per block",
    "reference": "float64 loop over queries",
}


def summary_attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b n g k"],
    v: Float[Tensor, "b n g v"],
    every: int,
    offset: int = 0,
    own_k: Float[Tensor, "b t g k"] | None = None,
    own_v: Float[Tensor, "b t g v"] | None = None,
    implementation: str | None = None,
) -> Float[Tensor, "b t h v"]:
    """``o_i = Σ_m softmax_m(q_i·k_m / √k) v_m`` over summaries m with ``(m + 1) every <= offset + i``, and i's own key.

    Args:
        q, k, v: h query heads share g key and value heads; k and v are n summaries, one for ``every`` tokens.
        every: tokens a summary.
        offset: tokens before the first query.
        own_k, own_v: a key and value of each query itself, which only it sees; None for none. Give both or neither.
        implementation: ``blocks`` or ``reference``; None lets dispatch choose.

    Returns:
        The mixed values, in v's type; 0 where a query sees nothing. Time O(t (n + 512)); memory O(t).

    Raises:
        ValueError: one of own_k and own_v without the other, or there is no such implementation.
    """
    if (own_k is None) != (own_v is None):
        raise ValueError("summary_attention needs own_k and own_v, or neither, found one alone")
    choice = choose("summary_attention", OFFERED, "blocks", implementation).implementation
    if choice == "reference":
        return summary_attention_reference(q, k, v, every, offset, own_k, own_v)
    rows, length = q.shape[:2]
    if not length:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    if own_k is None or own_v is None:  # one key of nothing, for queries that see nothing else
        own_k, own_v = (x.new_zeros(rows, length, *x.shape[2:]) for x in (k, v))
        alone = True
    else:
        alone = False
    outputs = []

    def mix(qb: Tensor, kb: Tensor, vb: Tensor, start: int) -> Tensor:
        place = torch.arange(start, start + qb.shape[1], device=qb.device) + offset
        count = kb.shape[1] - qb.shape[1]
        behind = (torch.arange(1, count + 1, device=qb.device) * every) <= place[:, None]
        own = torch.eye(qb.shape[1], dtype=torch.bool, device=qb.device)
        if alone:
            own = own & ~behind.any(dim=1)[:, None]
        return _fused(qb, kb, vb, causal=False, mask=torch.cat([behind, own], dim=1)[None, None])

    own_keys, own_values = own_k.split(BLOCK, dim=1), own_v.split(BLOCK, dim=1)
    for number, qb in enumerate(q.split(BLOCK, dim=1)):
        start = number * BLOCK
        count = min(k.shape[1], (offset + start + qb.shape[1] - 1) // every)
        pairs = ((k, own_keys[number]), (v, own_values[number]))
        kb, vb = (torch.cat([x[:, :count], own.to(x.dtype)], dim=1) for x, own in pairs)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(mix, qb, kb, vb, start, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(mix(qb, kb, vb, start))
    return torch.cat(outputs, dim=1)


def summary_attention_reference(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b n g k"],
    v: Float[Tensor, "b n g v"],
    every: int,
    offset: int,
    own_k: Float[Tensor, "b t g k"] | None,
    own_v: Float[Tensor, "b t g v"] | None,
) -> Float[Tensor, "b t h v"]:
    """The definition: a loop over queries in float64."""
    repeat, outputs = q.shape[2] // k.shape[2], []
    for step in range(q.shape[1]):
        count = min(k.shape[1], (offset + step) // every)
        keys, values = k[:, :count], v[:, :count]
        if own_k is not None and own_v is not None:
            keys, values = (
                torch.cat([keys, own_k[:, step, None]], dim=1),
                torch.cat([values, own_v[:, step, None]], dim=1),
            )
        keys, values = (x.double().repeat_interleave(repeat, dim=2) for x in (keys, values))
        scores = torch.einsum("bhk,bnhk->bhn", q[:, step].double(), keys) / q.shape[3] ** 0.5
        outputs.append(torch.einsum("bhn,bnhv->bhv", scores.softmax(-1), values))
    if not outputs:
        return v.new_zeros(*q.shape[:3], v.shape[3])
    return torch.stack(outputs, dim=1).to(v.dtype)
