"""upcycle: a dense feed-forward cut into experts, neuron by neuron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqlong.ffn.mlp import SwiGLU
from seqlong.ffn.moe import MoE


def importance_of_neurons(ffn: SwiGLU) -> Float[Tensor, "f"]:
    """How much each inner neuron can matter, by its weights alone: ``|w_gate| · |w_up| · |w_down|``.

    A better measure, with data at hand, is the mean of ``|activation · its gradient|`` (arXiv 2411.15708).
    """
    gate, up = ffn.gate_up_proj.weight.detach().float().chunk(2, dim=0)
    down = ffn.down_proj.weight.detach().float()
    return gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)


def partition(
    importance: Float[Tensor, "f"], experts: int, shared: int = 0
) -> tuple[Int[Tensor, "e n"], Int[Tensor, "s"]]:
    """Which neurons make up each expert, and the shared ones.

    The most important are shared. The others are dealt out in order of importance, to and fro, so that every expert
    gets as many and as good ones. Source: arXiv 2411.15708 (LLaMA-MoE v2).

    Args:
        importance: of each neuron.
        experts: to be chosen from.
        shared: experts of the same size that every position goes to.

    Raises:
        ValueError: the neurons cannot be divided evenly.
    """
    neurons = importance.shape[0]
    if experts < 1 or shared < 0 or neurons % (experts + shared):
        raise ValueError(
            f"{neurons} neurons cannot be divided into {experts} experts and {shared} shared ones of one size; choose "
            f"numbers whose sum divides {neurons}"
        )
    size = neurons // (experts + shared)
    order = importance.argsort(descending=True, stable=True)
    rest = order[shared * size :].view(size, experts).clone()
    rest[1::2] = rest[1::2].flip(1)
    return rest.T.sort(dim=1).values, order[: shared * size].sort().values


def upcycle(
    ffn: SwiGLU,
    experts: int,
    active: int,
    shared: int = 0,
    importance: Float[Tensor, "f"] | None = None,
    router_std: float = 0.02,
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias_rate: float = 1e-3,
) -> MoE:
    """Experts that are parts of ``ffn``, with its weights; together they are ``ffn``.

    Weights of a position's experts add up to their number of all, so that few of them are as strong as all were (arXiv
    2406.16554). With ``active = experts`` and ``router_std = 0`` the result computes what ``ffn`` does.

    Args:
        ffn: the dense layer.
        experts: parts that a position chooses from.
        active: parts that it chooses.
        shared: parts of the same size that every position goes through: the most important neurons.
        importance: of each neuron; ``importance_of_neurons(ffn)`` if None.
        router_std: deviation of the router's first weights.
        score: see ``MoE``.
        bias_rate: see ``MoE``.

    Raises:
        ValueError: the inner width cannot be divided into so many parts.
    """
    gate_up, down = ffn.gate_up_proj.weight.detach(), ffn.down_proj.weight.detach()
    parts, common = partition(importance_of_neurons(ffn) if importance is None else importance, experts, shared)
    width, size = down.shape[1], parts.shape[1]
    moe = MoE(
        down.shape[0], experts, active, d_hidden=size, shared=shared, score=score, scale=float(experts),
        bias_rate=bias_rate,
    ).to(down.device, down.dtype)  # fmt: skip
    with torch.no_grad():
        both = torch.cat([parts, parts + width], dim=1)  # rows of the gate, then of the other projection
        moe.experts.gate_up_proj.weight.copy_(gate_up[both].transpose(1, 2))
        moe.experts.down_proj.weight.copy_(down.T[parts])
        nn.init.normal_(moe.router.weight, std=router_std)
        if moe.shared is not None:
            moe.shared.gate_up_proj.weight.copy_(gate_up[torch.cat([common, common + width])])
            moe.shared.down_proj.weight.copy_(down[:, common])
    return moe


def upcycle_blocks(
    blocks: nn.ModuleList,
    experts: int,
    active: int,
    shared: int = 0,
    importance: Sequence[Tensor] | None = None,
    router_std: float = 0.02,
) -> None:
    """Replace the dense feed-forward of every block of a backbone, in place.

    Args:
        blocks: ``backbone.blocks``.
        experts: see ``upcycle``, as the others.
        active: as above.
        shared: as above.
        importance: of the neurons of each block.
        router_std: as above.

    Raises:
        ValueError: a block has no SwiGLU, or its width cannot be divided.
    """
    for number, block in enumerate(blocks):
        ffn = getattr(block, "ffn", None)
        if not isinstance(ffn, SwiGLU):
            raise ValueError(f"block {number + 1} has {type(ffn).__name__} for a feed-forward; upcycling needs SwiGLU")
        known = None if importance is None else importance[number]
        block.ffn = upcycle(ffn, experts, active, shared, known, router_std)
        block.routed = True  # type: ignore[assignment]
