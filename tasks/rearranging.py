"""Rows rearranged for objectives other than the next token: what stands where, as arithmetic on positions.

Each segment of a row (document, contig) is rearranged by itself and keeps its length, so packed rows stay packed, and
nothing crosses from one document to another. Signs between parts take the place of its last tokens. All is a function
of (seed, sample number, position), as in ``seqlong.tasks.masking``, without a loop over tokens, segments or rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.tasks.masking import draw

_ONE = float(1 << 53)


@dataclass(frozen=True)
class Segments:
    """The segment of each position.

    Attributes:
        index: ``(b)`` sample numbers.
        start: ``(b t)`` where the segment begins.
        size: ``(b t)`` its positions; 0 for padding.
        offset: ``(b t)`` position in it.
        seed: names all draws.
    """

    index: Int[Tensor, "b"]
    start: Int[Tensor, "b t"]
    size: Int[Tensor, "b t"]
    offset: Int[Tensor, "b t"]
    seed: int

    @staticmethod
    def of(batch: SequenceBatch, seed: int) -> Segments:
        """Those of a batch with tokens and index."""
        rows, length = batch.shape
        assert batch.index is not None
        here = torch.arange(length, device=batch.inputs.device).expand(rows, length)
        ids = batch.segment_ids
        if ids is None:
            return Segments(batch.index, torch.zeros_like(here), torch.full_like(here, length), here, seed)
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        start = torch.where(begins, here, 0).cummax(dim=1).values
        ends = begins.roll(-1, dims=1)
        ends[:, -1:] = True
        stop = torch.where(ends, here + 1, length).flip(1).cummin(dim=1).values.flip(1)
        return Segments(batch.index, start, torch.where(ids == 0, 0, stop - start), here - start, seed)

    def bits(self, stream: int, number: Int[Tensor, "b t"] | int = 0) -> Int[Tensor, "b t"]:
        """53 random-looking bits for each segment, the same all along it; others for another ``number``."""
        return draw(self.seed, stream, self.index, self.start + number)

    def below(self, bound: Int[Tensor, "b t"], stream: int, number: Int[Tensor, "b t"] | int = 0) -> Int[Tensor, "b t"]:
        """A number in ``[0, bound)`` for each segment; 0 where the bound is not above 0."""
        return self.bits(stream, number) % bound.clamp(min=1)

    def share(self, stream: int) -> Float[Tensor, "b t"]:
        """A number in ``[0, 1)`` for each segment."""
        return self.bits(stream).double() / _ONE


@dataclass(frozen=True)
class Arrangement:
    """What stands at each position of a segment.

    Attributes:
        source: ``(b t)`` place in the segment of the token that stands here; ``-1 - n`` for the n-th sign; None: the
            text as it is.
        asked: ``(b t)`` whether what stands here is to be predicted, from what stands before.
        prefix: ``(b t)`` whether it may be read in both directions; None: nowhere.
    """

    source: Int[Tensor, "b t"] | None
    asked: Bool[Tensor, "b t"]
    prefix: Bool[Tensor, "b t"] | None = None


def prefix(parts: Segments, least: float, most: float) -> Arrangement:
    """``[P] S``: a share of the segment between ``least`` and ``most`` is the prefix P; S is asked."""
    cut = _cut(parts, parts.size, least, most)
    return Arrangement(None, parts.offset >= cut, parts.offset < cut)


def again(parts: Segments, least: float, most: float, copies: bool) -> Arrangement:
    """``P <again> P S``: the prefix stands there twice (JRT). Asked is S, and with ``copies`` the second P too."""
    size, at = parts.size, parts.offset
    cut = torch.minimum(_cut(parts, size, least, most), ((size - 1) // 2).clamp(min=1))
    source = torch.where(at < cut, at, torch.where(at == cut, -1, at - cut - 1))
    asked = (at > cut) & (copies | (source >= cut))
    return Arrangement(source, asked)


def middle(parts: Segments, suffix_first: float) -> Arrangement:
    """Fill in the middle: ``<prefix> P <suffix> S <middle> M <end>``, or, for a share ``suffix_first``,
    ``<prefix> <suffix> S <middle> P M <end>``. All is asked. Source: arXiv 2207.14255 (PSM and SPM)."""
    kept, at = parts.size - 4, parts.offset
    one, two = parts.below(kept + 1, _MIDDLE), parts.below(kept + 1, _MIDDLE + 1)
    low, high = torch.minimum(one, two), torch.maximum(one, two)
    tail = kept - high
    psm = _lay(at, [(1, -1), (low, 0), (1, -2), (tail, high), (1, -3), (high - low, low)], -4)
    spm = _lay(at, [(1, -1), (1, -2), (tail, high), (1, -3), (high, 0)], -4)
    source = torch.where(parts.share(_MIDDLE + 2) < suffix_first, spm, psm)
    return Arrangement(source, at > 0)


def infill(parts: Segments, rate: float, span: int) -> Arrangement:
    """``[text with holes <fill>] hole <gap> hole <gap> ...``: what stood in the holes is asked, in order.

    A hole shows ``<gap>``. Holes of one segment are of one length, 1 to ``2 span - 1``, one in each of as many equal
    stretches, and take about a share ``rate`` of it. Source: arXiv 1910.10683, 2411.01030.
    """
    size, at = parts.size, parts.offset
    count = torch.minimum((size * rate / span).round().long(), size // 8).clamp(min=1)
    stretch = (size - 2 * count - 1) // count
    hole = torch.minimum(1 + parts.below(torch.full_like(size, 2 * span - 1), _INFILL), stretch - 1).clamp(min=1)
    shown = stretch - hole + 1
    context = size - 1 - count * (hole + 1)

    def begins(number: Tensor) -> Tensor:
        return parts.below(stretch - hole + 1, _INFILL + 1, number)

    nth = torch.minimum(at // shown.clamp(min=1), count - 1)
    within, gap = at - nth * shown, begins(nth)
    left = nth * stretch + within + torch.where(within > gap, hole - 1, 0)
    left = torch.where(within == gap, -1, left)
    after = (at - context - 1).clamp(min=0)
    asked_nth, step = after // (hole + 1), after % (hole + 1)
    right = torch.where(step == hole, -1, asked_nth * stretch + begins(asked_nth) + step)
    source = torch.where(at < context, left, torch.where(at == context, -2, right))
    return Arrangement(source, at > context, at <= context)


def retrieve(parts: Segments, rate: float, key: int, copied: int) -> Arrangement:
    """``[text] <find> key rest <find> key rest ...``: ``key`` tokens from somewhere in the text, and the ``copied``
    that follow them there, which are asked. Questions take a share ``rate``. Source: arXiv 2411.01030."""
    size, at = parts.size, parts.offset
    each = 1 + key + copied
    count = (size * rate / each).floor().long().clamp(min=1)
    context = size - count * each
    after = (at - context).clamp(min=0)
    nth, step = after // each, after % each
    begins = parts.below(context - key - copied + 1, _RETRIEVE, nth)
    source = torch.where(at < context, at, torch.where(step == 0, -1, begins + step - 1))
    return Arrangement(source, (at >= context) & (step > key), at < context)


def arranged(
    batch: SequenceBatch, parts: Segments, arrangement: Arrangement, signs: Int[Tensor, "n"]
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Tokens, targets and weights of a batch that was made for the next token.

    A token keeps the weight with which it was predicted in the text; the first of a segment had none, and a sign has 1.
    """
    assert batch.tokens is not None and batch.targets is not None
    known = batch.targets >= 0
    weight = known.float() if batch.loss_weight is None else batch.loss_weight * known
    if arrangement.source is None:
        # What the last position of a row predicts stands behind it, where no part of an objective ends.
        asked = arrangement.asked.roll(-1, dims=1) | (parts.offset == parts.size - 1)
        weight = weight * asked
        return batch.tokens, torch.where(weight > 0, batch.targets, -1), weight
    source = arrangement.source
    # What is made of a segment too short for it is thrown away, so it may be anything within the tensors.
    place = (parts.start + source.clamp(min=0)).clamp(max=source.shape[1] - 1)
    sign = signs[(-1 - source).clamp(min=0, max=len(signs) - 1)] if len(signs) else torch.zeros_like(source)
    tokens = torch.where(source >= 0, batch.tokens.gather(1, place), sign)
    before = weight.gather(1, (place - 1).clamp(min=0)) * (source > 0)
    asked = torch.where(source >= 0, before, 1.0) * arrangement.asked
    follows = parts.offset < parts.size - 1
    weight = torch.where(follows, asked.roll(-1, dims=1), 0.0)
    return tokens, torch.where(weight > 0, tokens.roll(-1, dims=1), -1), weight


# Streams of random numbers; those of ``masking`` are below 3.
_CUT, _MIDDLE, _INFILL, _RETRIEVE = 10, 11, 14, 16


def _cut(parts: Segments, size: Int[Tensor, "b t"], least: float, most: float) -> Int[Tensor, "b t"]:
    """A share of a size between ``least`` and ``most``; at least one position, and not all."""
    share = least + (most - least) * parts.share(_CUT)
    return torch.minimum((size * share).long().clamp(min=1), (size - 1).clamp(min=1))


def _lay(at: Int[Tensor, "b t"], pieces: list[tuple[Tensor | int, Tensor | int]], rest: int) -> Int[Tensor, "b t"]:
    """The source at each offset of pieces of ``(size, source of the first)`` behind one another, then ``rest``. A piece
    whose source is below 0 is a sign."""
    source, begin = torch.full_like(at, rest), torch.zeros_like(at)
    for size, first in pieces:
        inside = (at >= begin) & (at < begin + size)
        moved = first if isinstance(first, int) and first < 0 else at - begin + first
        source = torch.where(inside, moved, source)
        begin = begin + size
    return source
