"""What a part of the model costs: FLOPs of a token going forward, and the state that a row carries.

Counted from the equations, an addition and a multiplication one each. Left out is what is a small multiple of the width
a token: norms, activations, rotations, softmax.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from seqlong.ffn.experts import ExpertLinear
from seqlong.ffn.moe import MoE
from seqlong.ffn.router import Router
from seqlong.mixers.attention import Attention
from seqlong.mixers.base import Mixer
from seqlong.mixers.switch_head import SwitchHead

#: FLOPs a token of each number of a recurrent state ``(h k v)``: what ``kernels/*/reference.py`` does to it. Classes by
#: name, their bases too; a mixer that is not here counts as one with a decay.
OPERATIONS = {
    "Mixer": (5, "decay 1, write kᵀv 2, read qS 2 (kernels/scalar_decay, vector_decay)"),
    "LinearAttention": (4, "write kᵀv 2, read qS 2 (kernels/scalar_decay, without its decay)"),
    "CosFormer2": (4, "write kᵀv 2, read qS 2 (kernels/scalar_decay, without its decay)"),
    "Based": (4, "write kᵀv 2, read qS 2 (kernels/scalar_decay, without its decay)"),
    "Hedgehog": (4, "write kᵀv 2, read qS 2 (kernels/scalar_decay, without its decay)"),
    "Mamba1": (6, "dt A 1, decay 1, write 2, read 2 (kernels/selective_scan)"),
    "S4D": (7, "decay 3, write 2, read 2, a complex number being two (kernels/selective_scan)"),
    "DeltaNet": (6, "recall kS 2, write 2, read qS 2 (kernels/delta_rule)"),
    "GatedDeltaNet": (7, "decay 1, recall kS 2, write 2, read qS 2 (kernels/delta_rule)"),
    "KDA": (7, "decay 1, recall kS 2, write 2, read qS 2 (kernels/delta_rule)"),
    "RWKV7": (9, "decay 1, recall aS 2, replace bᵀ 2, write kᵀv 2, read qS 2 (kernels/dplr)"),
}


@dataclass(frozen=True)
class Term:
    """A part of the work on one token.

    Attributes:
        what: in a word or two.
        flops: additions and multiplications, the mean over the tokens of a row.
        formula: how it was counted, and where the formula is from.
        grows: whether a longer row makes it larger.
    """

    what: str
    flops: float
    formula: str
    grows: bool = False


@dataclass(frozen=True)
class Cost:
    """What a mixer or a feed-forward costs.

    Attributes:
        terms: of the FLOPs a token.
        state: bytes that a row carries after ``length`` tokens; None for a mixer that needs the whole row at once.
        growth: how the state grows with the length.
    """

    terms: tuple[Term, ...]
    state: int | None = 0
    growth: str = "none"

    @property
    def flops(self) -> float:
        """A token, forward."""
        return float(sum(term.flops for term in self.terms))


def mixer_cost(mixer: Mixer, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """What ``mixer`` costs in a row of ``length`` tokens.

    A mixer that no formula here fits offers a method ``cost(length) -> Cost``, which is taken at its word; or
    ``cost(length, dtype)``, where its state is kept in the type of activations.

    Args:
        mixer: on any device; nothing is computed.
        length: tokens of the row.
        dtype: of activations, in which caches are kept (recurrent states are float32).
    """
    own = getattr(mixer, "cost", None)
    if callable(own):
        cost = own(length, dtype) if "dtype" in inspect.signature(own).parameters else own(length)
        assert isinstance(cost, Cost)
        return cost
    if isinstance(mixer, Attention):
        return _attention(mixer, length, dtype)
    tensors = list(_tensors(mixer.initial_state(1, "meta", dtype)))
    each, formula = next(OPERATIONS[base.__name__] for base in type(mixer).__mro__ if base.__name__ in OPERATIONS)
    memory = sum(x.numel() for x in tensors if x.dim() == 4)
    ran = [Term("recurrence", float(each * memory), f"{each} a number of the state: {formula}")] if memory else []
    for stack in (x for x in tensors if x.dim() == 5):  # (b h m k v)
        ran.append(_log_linear(stack.shape[2], stack[:, :, 0].numel(), each, length))
    return Cost((*products(mixer), *ran), sum(x.numel() * x.element_size() for x in tensors), "constant")


def beside(costs: Sequence[Cost]) -> Cost:
    """What mixers cost together; terms of one kind and formula are added up."""
    merged: dict[tuple[str, str], Term] = {}
    for term in (term for cost in costs for term in cost.terms):
        known = merged.get((term.what, term.formula))
        flops, grows = (0.0, False) if known is None else (known.flops, known.grows)
        merged[term.what, term.formula] = replace(term, flops=flops + term.flops, grows=grows or term.grows)
    states = [cost.state for cost in costs if cost.state is not None]
    growth = dict.fromkeys(cost.growth for cost in costs if cost.growth not in ("none", "constant"))
    still = "constant" if sum(states) else "none"
    state = sum(states) if len(states) == len(costs) else None
    return Cost(tuple(merged.values()), state, " + ".join(growth) or still)


def feed_forward_cost(ffn: nn.Module) -> Cost:
    """What a feed-forward layer costs."""
    return Cost(tuple(products(ffn)))


def head_term(d_model: int, vocab_size: int) -> Term:
    """Logits of one position."""
    return Term("head", 2.0 * d_model * vocab_size, "2 a weight of W (d y)")


def products(module: nn.Module) -> list[Term]:
    """2 FLOPs a weight and token: of linear layers, of convolutions along the row, of the experts in use.

    Matrices that are no ``nn.Linear`` are known by names that end in ``down``, ``up`` (low-rank gates), ``map`` or, in
    blocks, ``_weight``.
    """
    linear = convolved = routed = 0.0
    share: dict[int, float] = {}
    for part in module.modules():
        if isinstance(part, MoE):
            share.update({id(inner): used_experts(part) for inner in part.experts.modules()})
        elif isinstance(part, SwitchHead):
            share.update({id(inner): part.used_experts for inner in (part.value_experts, part.out_experts)})
        if isinstance(part, nn.Linear):
            linear += 2 * part.weight.numel()
        elif isinstance(part, nn.Conv1d):
            convolved += 2 * part.weight.numel()
        elif isinstance(part, Router):
            routed += 2 * part.weight.numel()
        elif isinstance(part, ExpertLinear):
            routed += 2 * part.weight[0].numel() * share[id(part)]
        for name, matrix in part.named_parameters(recurse=False):
            if (matrix.dim() >= 2 and name.rpartition("_")[2] in ("down", "up", "map")) or (
                matrix.dim() > 2 and name.endswith("_weight")
            ):
                linear += 2 * matrix.numel()
    terms = [
        Term("products", linear, "2 a weight of every linear layer"),
        Term("convolution", convolved, "2 a tap and channel"),
        Term("experts", routed, "2 a weight of the router and of the experts that a token uses"),
    ]
    return [term for term in terms if term.flops]


def used_experts(moe: MoE) -> float:
    """How many experts compute for a position, on average; shared ones and those that do nothing not counted."""
    if not moe.identity:
        return float(moe.router.active)
    idle = moe.identity / (moe.experts.count + moe.identity) if moe.identity_share is None else moe.identity_share
    return moe.router.active * (1 - idle)


def seen(length: int, window: int | None, causal: bool = True) -> float:
    """How many tokens a token attends to, itself included: the mean over a row."""
    reach = length if window is None else min(window, length)
    behind = (reach * (reach - 1) / 2 + (length - reach) * (reach - 1)) / length
    return 1 + behind * (1 if causal else 2)


def _attention(mixer: Attention, length: int, dtype: torch.dtype) -> Cost:
    width = mixer.heads * mixer.head_dim
    far = max(0, length - (mixer.window or length))  # tokens that have some behind their window
    sinks = sum(min(mixer.sinks, place) for place in range(1, min(far, mixer.sinks) + 1))
    sinks += max(0, far - mixer.sinks) * mixer.sinks
    scores = 4 * width * (seen(length, mixer.window, mixer.causal) + sinks / length)
    formula = "4 · heads · head_dim · tokens seen, for qkᵀ and the mean of v (arXiv 2204.02311, appendix B)"
    term = Term("attention", scores, formula, grows=mixer.window is None or length < mixer.window)
    each = 2 * mixer.kv_heads * mixer.head_dim * dtype.itemsize
    if not mixer.causal:
        return Cost((*products(mixer), term), None, "needs the whole row")
    if mixer.window is None:
        return Cost((*products(mixer), term), each * length, f"{each:,} B a token")
    kept = min(length, mixer.window - 1)
    state = each * (kept + mixer.sinks) + (8 if mixer.sinks else 0)
    return Cost((*products(mixer), term), state, f"{each:,} B a token, to {mixer.window - 1 + mixer.sinks:,}")


def cached(
    mixer: Mixer,
    flops: float,
    formula: str,
    each: int,
    length: int,
    window: int | None = None,
    grows: bool | None = None,
    others: tuple[Term, ...] = (),
) -> Cost:
    """The cost of a mixer with a cache of keys and values.

    Args:
        mixer: the linear layers of which are counted too.
        flops: of a token, in its attention.
        formula: how they were counted.
        each: bytes of a token in the cache.
        length: tokens of the row.
        window: the cache keeps one token less than this; all if not given.
        grows: whether a longer row takes more FLOPs; as with a full or sliding window if not given.
        others: further terms.
    """
    if grows is None:
        grows = window is None or length < window
    kept = length if window is None else min(length, window - 1)
    growth = f"{each:,} B a token" + ("" if window is None else f", to {window - 1:,}")
    return Cost((*products(mixer), Term("attention", flops, formula, grows), *others), each * kept, growth)


def buckets_in_use(length: int, buckets: int) -> float:
    """How many states of a Fenwick stack are not empty: the mean over the tokens of a row.

    Before token t, bucket m holds tokens if bit m of t is set; the last one takes all that higher ones would hold.
    """
    used = sum((length >> bit + 1 << bit) + max(0, length % (2 << bit) - (1 << bit)) for bit in range(buckets - 1))
    return (used + max(0, length - (1 << buckets - 1))) / length


def _log_linear(buckets: int, size: int, each: int, length: int) -> Term:
    """``each`` is what a token does to a single state: all but the write, 2, it does to every bucket in use."""
    flops = size * (4 + (each - 2 + (2 if each > 5 else 0)) * buckets_in_use(length, buckets))
    formula = "as if each bucket in use were a state, kᵀv written to one (kernels/log_linear)"
    return Term("recurrence", float(flops), formula, grows=length < 1 << buckets - 1)


def _tensors(state: object) -> Iterator[Tensor]:
    """Every tensor of a state, however nested."""
    if isinstance(state, Tensor):
        yield state
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from _tensors(getattr(state, field.name))
    elif isinstance(state, list | tuple):
        for part in state:
            yield from _tensors(part)
    elif isinstance(state, dict):
        for part in state.values():
            yield from _tensors(part)
