"""What attention carries from window to window: a cache of keys and values, of one length for all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import MixerState


@dataclass
class AttentionState(MixerState):
    """The keys and values that later tokens may still see, the most recent last.

    Shapes: keys ``(b s g k)`` (already rotated), values ``(b s r v)``, valid ``(b s)``: whether the entry belongs to
    the segment that goes on; None if all do. Values have as many heads as keys in most mixers.
    """

    keys: Float[Tensor, "b s g k"]
    values: Float[Tensor, "b s r v"]
    valid: Bool[Tensor, "b s"] | None = None

    def keep(self, rows: Bool[Tensor, "b"]) -> AttentionState:
        kept = rows[:, None].expand(self.keys.shape[:2])
        keys, values = (value.where(rows[:, None, None, None], 0) for value in (self.keys, self.values))
        return AttentionState(keys, values, kept if self.valid is None else self.valid & kept)


@dataclass
class SinkState(MixerState):
    """A window's cache, and the first tokens of the segment that goes on, which stay.

    Shapes: keys ``(b s g k)``, values ``(b s g v)``: the window's, the most recent last; sink_keys ``(b n g k)``,
    sink_values ``(b n g v)``: the first n tokens'; count ``(b)`` int64: tokens of the segment so far, which tells
    what of all this there is.
    """

    keys: Float[Tensor, "b s g k"]
    values: Float[Tensor, "b s g v"]
    sink_keys: Float[Tensor, "b n g k"]
    sink_values: Float[Tensor, "b n g v"]
    count: Int[Tensor, "b"]


@dataclass
class Seen:
    """Keys and values of the cache and the window behind one another, and what tells which query sees which.

    Attributes:
        query_ids: ``(b t)``; None where every query may see every key before it.
        key_ids: ``(b s)``, -1 for what nobody sees.
        carried: ``(b s)`` which keys belong to the segment that goes on after this window; None where all do.
        always: ``(b s)`` which keys are sinks; None where there are none.
    """

    keys: Tensor
    values: Tensor
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    carried: Tensor | None = None
    always: Tensor | None = None


def join(k: Tensor, v: Tensor, layout: SequenceLayout, state: AttentionState) -> Seen:
    """The cache, then this window."""
    k = torch.cat([state.keys.to(k.dtype), k], dim=1)
    v = torch.cat([state.values.to(v.dtype), v], dim=1)
    rows, length = layout.shape
    if layout.segment_ids is None or layout.starts is None:
        if state.valid is None:
            return Seen(k, v)
        query_ids = torch.ones(rows, length, dtype=torch.int32, device=k.device)
        key_ids = torch.cat([torch.where(state.valid, 1, -1).to(torch.int32), query_ids], dim=1)
        return Seen(k, v, query_ids, key_ids, key_ids == 1)
    first, last = _ends(layout)
    cached = first[:, None].expand(state.keys.shape[:2])
    if state.valid is not None:
        cached = torch.where(state.valid, cached, -1)
    ids = layout.segment_ids
    key_ids = torch.cat([cached.to(ids.dtype), ids.masked_fill(ids == 0, -1)], dim=1)
    return Seen(k, v, ids, key_ids, key_ids == last[:, None])


def carry(seen: Seen, layout: SequenceLayout, window: int | None = None) -> AttentionState:
    """Keep what the tokens after this window may see, moved so that each row's last token stands last."""
    k, v, carried = seen.keys, seen.values, seen.carried
    keep = k.shape[1] if window is None else min(k.shape[1], window - 1)
    if layout.segment_ids is None or carried is None:
        first = k.shape[1] - keep
        return AttentionState(k[:, first:], v[:, first:], None if carried is None else carried[:, first:])
    index = _last_columns(keep, k.shape[1], layout)
    valid = carried.gather(1, index.clamp(min=0)) & (index >= 0)
    return AttentionState(_pick(k, index), _pick(v, index), valid)


def places(count: Int[Tensor, "b"], layout: SequenceLayout) -> Int[Tensor, "b t"]:
    """Each token's place in its segment, where ``count`` tokens of the first one passed before this window."""
    steps = torch.arange(layout.shape[1], device=count.device)
    if layout.starts is None:
        return count[:, None] + steps
    begun = torch.where(layout.starts, steps, -1).cummax(dim=1).values
    return torch.where(begun >= 0, steps - begun, count[:, None] + steps)


def each_segment(
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t g v"],
    width: int,
    layout: SequenceLayout,
    state: AttentionState | None,
) -> tuple[Float[Tensor, "b t h w"], AttentionState | None]:
    """``run(q, k, v)`` over every segment by itself, the cache's keys before its own; and the cache after.

    Rows of one segment run together. Others are cut at their boundaries, which the host has to know (one
    synchronisation a batch, one more with a cache).

    Args:
        run: mixes queries, the last of as many or more keys, to the ``width`` of w.
    """
    seen = None if state is None else join(k, v, layout, state)
    after = None if seen is None else carry(seen, layout)
    if not layout.shape[1]:
        return q.new_zeros(*q.shape[:3], width), after
    if layout.segment_ids is None and (state is None or state.valid is None):
        return run(q, *((k, v) if seen is None else (seen.keys, seen.values))), after
    outputs, past = [], [0] * layout.shape[0]
    if state is not None:
        count = q.new_full((q.shape[0],), state.keys.shape[1]) if state.valid is None else state.valid.sum(dim=1)
        past = (count if layout.starts is None else count * ~layout.starts[:, 0]).int().tolist()
    for row, parts in enumerate(cut((q, k, v), layout)):
        pieces = []
        for number, (qs, ks, vs) in enumerate(parts[:-1]):
            if number == 0 and state is not None and past[row]:
                ks, vs = (
                    torch.cat([kept[row : row + 1, kept.shape[1] - past[row] :].to(new.dtype), new], dim=1)
                    for kept, new in ((state.keys, ks), (state.values, vs))
                )
            pieces.append(run(qs, ks, vs))
        pieces.append(q.new_zeros(1, parts[-1][0].shape[1], q.shape[2], width))  # padding
        outputs.append(torch.cat(pieces, dim=1))
    return torch.cat(outputs), after


def cut(tensors: tuple[Tensor, ...], layout: SequenceLayout) -> list[list[tuple[Tensor, ...]]]:
    """For each row, its segments of every tensor, and its padding last. By split, whose backward joins the gradients
    once; that of a slice is as long as the whole row, each time."""
    rows = []
    for row, segments in enumerate(layout.boundaries):
        sizes = [z - a for a, z in segments]
        sizes.append(layout.shape[1] - sum(sizes))
        rows.append(list(zip(*(x[row : row + 1].split(sizes, dim=1) for x in tensors), strict=True)))
    return rows


def join_sinks(k: Tensor, v: Tensor, layout: SequenceLayout, state: SinkState) -> tuple[Seen, Tensor]:
    """The sinks, the window's cache, then this window; and ``(b t)`` each token's place in its segment.

    A sink has one column: its own, or that in this window; in the window's cache it does not count.
    """
    sinks, cache = state.sink_keys.shape[1], state.keys.shape[1]
    ids, place = layout.segment_ids, places(state.count, layout)
    if ids is None:
        ids = torch.ones(layout.shape, dtype=torch.int32, device=k.device)
        first = ids.new_ones(layout.shape[0])
    else:
        first, _ = _ends(layout)
    number = torch.arange(sinks, device=k.device)
    there = number < state.count[:, None]
    number = torch.arange(-cache, 0, device=k.device)
    there = torch.cat([there, state.count[:, None] + number >= sinks], dim=1)
    key_ids = torch.cat([torch.where(there, first[:, None], -1).to(ids.dtype), ids.masked_fill(ids == 0, -1)], dim=1)
    always = torch.cat([torch.ones_like(there[:, :sinks]), torch.zeros_like(there[:, sinks:]), place < sinks], dim=1)
    k = torch.cat([state.sink_keys.to(k.dtype), state.keys.to(k.dtype), k], dim=1)
    v = torch.cat([state.sink_values.to(v.dtype), state.values.to(v.dtype), v], dim=1)
    return Seen(k, v, ids, key_ids, always=always), place


def carry_sinks(seen: Seen, place: Tensor, layout: SequenceLayout, state: SinkState, window: int) -> SinkState:
    """Keep a window of each row's last segment, and its first tokens."""
    rows, length = layout.shape
    sinks, total = state.sink_keys.shape[1], seen.keys.shape[1]
    if not length:
        return state
    lengths = layout.lengths
    count = place.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] + 1
    count = torch.where(lengths > 0, count, state.count)
    number = torch.arange(sinks, device=place.device).expand(rows, sinks)
    step = lengths[:, None] - count[:, None] + number  # of token `number` in this window; before it: where it was
    first = torch.where(step >= 0, (total - length + step).clamp(max=total - 1), number)
    index = _last_columns(min(total - sinks, window - 1), total, layout)
    keys, values = ((_pick(x, index), _pick(x, first)) for x in (seen.keys, seen.values))
    return SinkState(keys[0], values[0], keys[1], values[1], count)


def _ends(layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """``(b)`` the id that the cache's tokens have in this window (-1: none), and that of the segment that goes on after
    it. A row that is all padding leaves its cache as it is; id 1 stands for the segment it would go on with."""
    assert layout.segment_ids is not None and layout.starts is not None
    ids, occupied = layout.segment_ids, layout.lengths > 0
    if not ids.shape[1]:
        return ids.new_ones(ids.shape[0]), ids.new_ones(ids.shape[0])
    first = torch.where(occupied & ~layout.starts[:, 0], ids[:, 0], torch.where(occupied, -1, 1))
    last = torch.where(occupied, ids.gather(1, (layout.lengths - 1).clamp(min=0)[:, None])[:, 0], 1)
    return first, last


def _last_columns(keep: int, total: int, layout: SequenceLayout) -> Int[Tensor, "b s"]:
    """The last ``keep`` columns before the padding of each row; below 0 where there are not as many."""
    padding = layout.shape[1] - layout.lengths
    return torch.arange(total - keep, total, device=padding.device) - padding[:, None]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Columns of ``x`` ``(b s g k)``, some for each row."""
    return x.gather(1, index.clamp(min=0)[..., None, None].expand(-1, -1, *x.shape[2:]))
