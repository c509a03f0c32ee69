"""Which bases a model's opinion hangs on: by changing each of them, and by gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.alphabet import A, T
from seqlong.inference.model import Model
from seqlong.inference.strands import Strand, targets_of, tokens_of
from seqlong.inference.variants import Variant, Window, score

_BASES = b"ACGT"


def mutagenesis(
    model: Model,
    strand: Strand,
    start: int,
    stop: int,
    window: Window,
    batch_tokens: int = 65536,
    advance: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float64]:
    """``(t 4)`` the log-likelihood ratio of every base A, C, G, T at every position, the mean of both strands.

    0 for the base that is there; NaN where it is not known. See ``seqlong.inference.variants.score``.

    Args:
        model: a causal or masked language model.
        strand: the forward strand of a contig.
        start: first position.
        stop: position after the last.
        window: what is scored around each.
        batch_tokens: positions to run at once.
        advance: told how many positions more are done.
    """
    letters = strand.read(start, stop).tobytes().upper().replace(b"U", b"T")
    found = np.full((stop - start, 4), np.nan)
    other = Strand(strand.genome, strand.contig, not strand.reverse)
    for first in range(0, stop - start, window.grid):
        part = range(first, min(first + window.grid, stop - start))
        places = [(place, base) for place in part if letters[place] in _BASES for base in range(4)]
        changed = [(place, base) for place, base in places if letters[place] != _BASES[base]]
        variants = [
            Variant(start + place, letters[place : place + 1], _BASES[base : base + 1]) for place, base in changed
        ]
        if variants:
            both = [
                score(model, one, [variant.on(one) for variant in variants], window, batch_tokens=batch_tokens)
                for one in (strand, other)
            ]
            for place, base in places:
                found[place, base] = 0.0
            rows, columns = zip(*changed, strict=True)
            found[rows, columns] = np.mean(both, axis=0)
        advance(len(part))
    return found


def gradients(model: Model, strand: Strand, start: int, stop: int, window: Window) -> NDArray[np.float64]:
    """``(t 4)`` how the likelihood of what follows would change with each base, to first order.

    ``g_tb = (E_b - E_x) · d/dh_t Σ ln p``, where ``h_t`` is the embedding that is read at t, ``E_x`` that of the base
    that is there and the sum is over the bases of the window (for a masked model, over one in eight, hidden, at a
    time). The mean of both strands. What it leaves out is the likelihood of base t itself.

    Args:
        model: a causal or masked language model.
        strand: the forward strand of a contig.
        start: first position.
        stop: position after the last; the window is around the middle of both.
        window: its length; at least ``stop - start``.
    """
    middle = (start + stop) // 2
    total = np.zeros((stop - start, 4))
    for reverse in (False, True):
        own = Strand(strand.genome, strand.contig, reverse)
        size = min(window.length, own.length)
        begin = max(0, min(own.place(middle, 0) - size // 2, own.length - size))
        letters = own.read(begin, begin + size)
        found = _gradient(model, tokens_of(letters), targets_of(letters))
        low = own.place(start, stop - start) - begin
        part = found[low : low + stop - start]
        total += part[::-1, ::-1] if reverse else part  # the complement of A, C, G, T is T, G, C, A
    letters = strand.read(start, stop)
    total[(targets_of(letters) < 0).numpy()] = np.nan
    return total / 2


def _gradient(model: Model, tokens: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """``(t 4)`` of a whole row."""
    if model.kind == "causal":
        inputs, wanted = [tokens], [torch.cat([targets[1:], targets.new_full((1,), -1)])]
    else:
        steps = torch.arange(len(tokens)) % 8
        inputs = [tokens.masked_fill(steps == shift, model.mask_token) for shift in range(8)]
        wanted = [targets.where(steps == shift, -1) for shift in range(8)]
    total = torch.zeros(len(tokens), 4, dtype=torch.float64)
    table: Float[Tensor, "4 d"] = model.backbone.embedding.weight[A : T + 1].double()
    for row, asked in zip(inputs, wanted, strict=True):
        gradient = _embedding_gradient(model, row, asked)
        scores = gradient.double() @ table.T
        own = (gradient.double() * model.backbone.embedding(row.to(model.device)).double()).sum(dim=-1, keepdim=True)
        hidden = (row == model.mask_token).to(model.device) if model.kind == "masked" else None
        change = scores - own
        total += (change if hidden is None else change.masked_fill(hidden[:, None], 0)).cpu()
    return total.numpy() / (len(inputs) - 1 if len(inputs) > 1 else 1)


def _embedding_gradient(model: Model, tokens: Tensor, targets: Tensor) -> Float[Tensor, "t d"]:
    """The gradient of the sum of ``ln p(target)`` for what the embedding gave."""
    kept: list[Tensor] = []

    def catch(module: torch.nn.Module, given: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.backbone.embedding.register_forward_hook(catch)
    try:
        with torch.enable_grad(), model.products():
            hidden = model.backbone(SequenceBatch(tokens=tokens[None].to(model.device))).hidden
            nll = model.task.head.loss(hidden, targets[None].to(model.device))
            (gradient,) = torch.autograd.grad(-nll.sum(), kept[0])
    finally:
        handle.remove()
    return gradient[0]
