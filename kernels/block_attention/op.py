"""block_attention: each query sees its own block and a few earlier ones that were chosen for it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.kernels.block_attention.gathered import block_attention_gathered
from seqlong.kernels.block_attention.reference import block_attention_reference
from seqlong.kernels.dispatch import choose
from seqlong.kernels.inputs import four_axes, said, shaped

OFFERED = {
    "gathered": "torch, any device: the chosen keys are gathered for some queries at a time",
    "reference": "float64 loop over queries",
}


def check(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int) -> None:
    """Raise a ValueError that names what does not fit, what was expected and what was found."""
    four_axes("block_attention", {"q": q, "k": k, "v": v})
    (rows, length, heads, width), (keys, shared) = q.shape, k.shape[1:3]
    if chosen.dim() != 4 or chosen.is_floating_point():
        raise ValueError(f"block_attention needs chosen with four axes, of integers, found {said(chosen)}")
    groups = chosen.shape[2]
    if block < 1 or not groups or not shared or heads % groups or groups % shared:
        raise ValueError(
            f"block_attention needs a block of at least 1 position, heads divisible by the groups that choose, and "
            f"these by the key heads; found block={block}, {heads} heads, {groups} groups, {shared} key heads"
        )
    if keys < length:
        raise ValueError(f"block_attention needs keys for all {length} queries, found {keys}")
    expected = {
        "k": (k, (rows, keys, shared, width)),
        "v": (v, (rows, keys, shared, v.shape[3])),
        "chosen": (chosen, (rows, length, groups, chosen.shape[3])),
    }
    shaped("block_attention", expected)


def block_attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    chosen: Int[Tensor, "b t j c"],
    block: int,
    implementation: str | None = None,
) -> Float[Tensor, "b t h v"]:
    """``o_i = Σ_j softmax_j(q_i·k_j / √k) v_j`` over the keys j <= i of i's own block and of the blocks ``chosen_i``.

    Queries are the last t of the s positions; block m has the positions ``m · block`` to ``(m + 1) · block - 1``.

    Args:
        q, k, v: h query heads share g key and value heads.
        chosen: blocks for each of j groups of heads (g divides j, j divides h), none twice for a query. What is not
            before the query's own block counts as none; -1 is usual for none.
        block: positions a block.
        implementation: ``gathered`` or ``reference``; None lets dispatch choose.

    Returns:
        The mixed values, in v's type. Time O(t h (c + 1) block k); memory O(t).

    Raises:
        ValueError: shapes do not fit, heads or groups do not divide, or there is no such implementation.
    """
    check(q, k, v, chosen, block)
    choice = choose("block_attention", OFFERED, "gathered", implementation).implementation
    run = block_attention_reference if choice == "reference" else block_attention_gathered
    return run(q, k, v, chosen, block)


def choose_blocks(scores: Float[Tensor, "... n"], count: int) -> Int[Tensor, "... c"]:
    """The ``count`` blocks with the largest scores, the earlier of two that are equal; -1 for those of score -inf."""
    scores, blocks = scores.sort(dim=-1, descending=True, stable=True)
    return blocks[..., :count].masked_fill(scores[..., :count] == -torch.inf, -1)
