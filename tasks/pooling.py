"""Pooling: from the hidden states of a record's positions to one, in the layout that the batch has."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seqlong.batch import SequenceBatch

#: How the states of a record become one.
Pooling = Literal["mean", "last", "max", "attentive", "places", "echo"]

#: Places that ``places`` tells apart; longer records are cut into so many stretches.
PLACES = 512


@dataclass(frozen=True)
class Spans:
    """Records that lie in a batch of rows, positions counted through all rows.

    Attributes:
        starts: ``(s)`` first position of each.
        ends: ``(s)`` last position of each.
        rows: b.
        length: t.
    """

    starts: Int[Tensor, "s"]
    ends: Int[Tensor, "s"]
    rows: int
    length: int

    @property
    def owner(self) -> Int[Tensor, "b t"]:
        """The record of each position; s where there is none."""
        count = self.starts.numel()
        marks = torch.zeros(self.rows * self.length + 1, dtype=torch.int64, device=self.starts.device)
        marks.scatter_(0, self.starts, 1)
        number = marks.cumsum(0)[:-1] - 1
        if not count:
            return torch.zeros_like(number).view(self.rows, self.length)
        known = number.clamp(min=0)
        place = torch.arange(number.numel(), device=number.device)
        inside = (number >= 0) & (place <= self.ends[known])
        return torch.where(inside, known, count).view(self.rows, self.length)

    def turned(self, owner: Int[Tensor, "b t"], which: Bool[Tensor, "s"] | None = None) -> Int[Tensor, "b t"]:
        """The position that each one is read from when records (or those of ``which``) are reversed where they lie."""
        place = torch.arange(owner.numel(), device=owner.device).view_as(owner)
        count = self.starts.numel()
        if not count:
            return place
        known = owner.clamp(max=count - 1)
        swap = owner < count
        if which is not None:
            swap = swap & which[known]
        return torch.where(swap, self.starts[known] + self.ends[known] - place, place)


def other_strand(
    tokens: Int[Tensor, "b t"],
    spans: Spans,
    complement: Int[Tensor, "y"],
    which: Bool[Tensor, "s"] | None = None,
) -> Int[Tensor, "b t"]:
    """The tokens with each record (or those of ``which``) read from the other strand, in its place."""
    owner = spans.owner
    turned = complement[tokens.flatten()[spans.turned(owner, which)]]
    count = spans.starts.numel()
    if which is None:
        return torch.where(owner < count, turned, tokens)
    if not count:
        return tokens
    return torch.where((owner < count) & which[owner.clamp(max=count - 1)], turned, tokens)


def repeated(batch: SequenceBatch, spans: Spans) -> tuple[SequenceBatch, Spans]:
    """Every record twice, one after the other, as one record: rows of ``2 t``.

    (Echo embeddings: what a causal model thinks of the second copy knows the whole of the first. arXiv 2402.15449)
    """
    assert batch.tokens is not None
    owner = spans.owner
    count, length = spans.starts.numel(), spans.length
    device = owner.device
    tokens = batch.tokens.new_zeros(spans.rows, 2 * length)
    ids = torch.zeros(spans.rows, 2 * length, dtype=torch.int32, device=device)
    new_starts = spans.starts.clone()
    if count:
        # A record at offset p of row r begins at offset 2p there.
        row, offset = spans.starts // length, spans.starts % length
        new_starts = row * 2 * length + 2 * offset
        sizes = spans.ends - spans.starts + 1
        inside = (owner < count).flatten()
        known = owner.flatten().clamp(max=count - 1)
        place = torch.arange(owner.numel(), device=device)
        first = new_starts[known] + (place - spans.starts[known])
        given = torch.ones_like(owner, dtype=torch.int32) if batch.segment_ids is None else batch.segment_ids
        spare = tokens.numel()  # where what is no record goes
        for copy in (first, first + sizes[known]):
            target = torch.where(inside, copy, spare)
            tokens = _written(tokens, target, batch.tokens)
            ids = _written(ids, target, given)
        new_ends = new_starts + 2 * sizes - 1
    else:
        new_ends = new_starts.clone()
    doubled = dataclasses.replace(batch, tokens=tokens, segment_ids=ids, positions=None, targets=None, loss_weight=None)
    return doubled, Spans(new_starts, new_ends, spans.rows, 2 * length)


def _written(into: Tensor, target: Tensor, values: Tensor) -> Tensor:
    flat = torch.cat([into.flatten(), into.new_zeros(1)])
    flat[target] = values.flatten().to(into.dtype)
    return flat[:-1].view_as(into)


class Pool(nn.Module):
    """One state a record from those of its positions.

    - ``mean``: ``Σ h_t / n``.
    - ``last``: that of the last position, which has seen the whole record where mixers are causal.
    - ``max``: the largest of each channel.
    - ``attentive``: ``Σ a_t h_t``, ``a = softmax(w·h_t / √d)`` over the record, w learnt, 0 at first (the mean).
    - ``places``: ``Σ p_i(t) h_t / √n``, a learnt weight for each place and channel, normal at first. For records
      that are aligned, as around a start or a splice site. Place ``i(t) = t``; beyond 512 bases, its stretch. (Were all
      weights 1 at first, the sum would tell no place from another until each weight had moved by its own size, which
      took a thousand steps of Adam.)
    - ``echo``: the mean over the second copy of a record that was read twice (``repeated``).

    Args:
        width: channels d of the hidden states.
        how: which of these.
    """

    def __init__(self, width: int, how: Pooling = "mean") -> None:
        super().__init__()
        self.how = how
        self.query = nn.Parameter(torch.zeros(width)) if how == "attentive" else None
        if self.query is not None:
            self.query._no_weight_decay = True  # type: ignore[attr-defined]
        self.places = nn.Parameter(torch.randn(PLACES, width)) if how == "places" else None
        if self.places is not None:
            self.places._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, hidden: Float[Tensor, "b t d"], spans: Spans, turned: bool = False) -> Float[Tensor, "s d"]:
        """States of the records, float32 (float64 if hidden is).

        Args:
            hidden: of every position.
            spans: where the records lie.
            turned: the states are those of a model that read each record from its end.
        """
        states = hidden if hidden.dtype == torch.float64 else hidden.float()
        flat, count = states.flatten(0, 1), spans.starts.numel()
        if self.how == "last":
            return flat[spans.starts if turned else spans.ends]
        owner = spans.owner.flatten()
        if self.how == "echo" and count:
            place = torch.arange(owner.numel(), device=owner.device)
            middle = ((spans.starts + spans.ends + 1) // 2)[owner.clamp(max=count - 1)]
            owner = torch.where((place < middle) if turned else (place >= middle), owner, count)
        wide = owner[:, None].expand_as(flat)
        if self.how == "max":
            empty = flat.new_full((count + 1, flat.shape[1]), -math.inf)
            return empty.scatter_reduce(0, wide, flat, "amax")[:count]
        if self.places is not None and count:
            known = owner.clamp(max=count - 1)
            steps = torch.arange(owner.numel(), device=owner.device)
            place = (spans.ends[known] - steps) if turned else (steps - spans.starts[known])
            sizes = (spans.ends - spans.starts + 1)[known]
            index = torch.where(sizes > PLACES, place * PLACES // sizes, place).clamp(0, PLACES - 1)
            flat = flat * self.places.to(flat.dtype)[index] * sizes.to(flat.dtype).sqrt()[:, None]
        weight = torch.ones_like(flat[:, 0])
        if self.query is not None:
            score = flat @ self.query.to(flat.dtype) / math.sqrt(flat.shape[1])
            top = score.new_full((count + 1,), -math.inf).scatter_reduce(0, owner, score.detach(), "amax")
            weight = (score - top[owner]).exp()
        total = weight.new_zeros(count + 1).scatter_add(0, owner, weight)
        summed = flat.new_zeros(count + 1, flat.shape[1]).scatter_add(0, wide, flat * weight[:, None])
        return summed[:count] / total[:count, None].clamp(min=1e-30)


class Readout(nn.Module):
    """``y = W drop(h) + b``: from a record's state to its outputs. W starts normal with deviation 0.02, b at 0.

    Args:
        width: channels of the state.
        outputs: classes, labels or values.
        dropout: share of channels that training leaves out.
    """

    tied = False

    def __init__(self, width: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.vocab_size = outputs
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Float[Tensor, "*s d"]) -> Float[Tensor, "*s y"]:
        """Outputs, in the type of the states."""
        with torch.autocast(states.device.type, enabled=False):
            weight, bias = self.linear.weight.to(states.dtype), self.linear.bias.to(states.dtype)
            return nn.functional.linear(self.dropout(states), weight, bias)
