"""Attention that keeps one key and value for every so many tokens: what RAT and SCOUT share, and their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.kernels.attention import summary_attention
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import MixerState
from seqlong.mixers.cache import cut


@dataclass
class SummaryState(MixerState):
    """One key and value for every chunk that ended, the most recent last, and what is known of the chunk that goes on.

    Shapes: keys ``(b n g k)``, values ``(b n g v)``; inside ``(b r w)``: w numbers for each token of the chunk that
    goes on. There are r < chunk of them, so that lengths tell how many tokens passed; where rows differ, ended
    ``(b n)`` and begun ``(b r)`` say which entries a row has, the last ones; None where every row has them all.
    """

    keys: Float[Tensor, "b n g k"]
    values: Float[Tensor, "b n g v"]
    inside: Float[Tensor, "b r w"]
    ended: Bool[Tensor, "b n"] | None = None
    begun: Bool[Tensor, "b r"] | None = None

    def keep(self, rows: Bool[Tensor, "b"]) -> SummaryState:
        kept = super().keep(rows)
        assert isinstance(kept, SummaryState)
        if kept.ended is None or kept.begun is None:
            kept.ended, kept.begun = (rows[:, None].expand(x.shape[:2]) for x in (self.keys, self.inside))
        return kept

    def count(self, chunk: int) -> Int[Tensor, "b"]:
        """Tokens of each row's segment so far."""
        if self.ended is None or self.begun is None:
            rows, ended, begun = self.keys.shape[0], self.keys.shape[1], self.inside.shape[1]
            return torch.full((rows,), ended * chunk + begun, device=self.keys.device)
        return self.ended.sum(dim=1) * chunk + self.begun.sum(dim=1)


def attend_summaries(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t g v"],
    inside: Float[Tensor, "b t w"],
    chunk: int,
    layout: SequenceLayout,
    state: SummaryState | None,
) -> tuple[Float[Tensor, "b t h v"], SummaryState | None]:
    """Each token over itself and the last token of every chunk of its segment that ended before it.

    Rows of one segment run together. Others are cut at their boundaries, which the host has to know (one
    synchronisation a batch, one more with a state).

    Args:
        inside: what the state keeps of the tokens of a chunk that has not ended.
        chunk: tokens a chunk, counted from the beginning of a segment.
    """
    if layout.segment_ids is None and (state is None or state.ended is None):
        mixed, keys, values, inside = _segment(q, k, v, inside, chunk, state)
        return mixed, None if state is None else SummaryState(keys, values, inside)
    counts, began = [0] * q.shape[0], [False] * q.shape[0]
    if state is not None:
        counts = state.count(chunk).tolist()
        if layout.starts is not None and layout.shape[1]:
            began = layout.starts[:, 0].tolist()
    outputs, left = [], []
    for row, parts in enumerate(cut((q, k, v, inside), layout)):
        before = None if state is None else _row(state, row, counts[row], chunk)
        pieces = []
        for number, (qs, ks, vs, kept) in enumerate(parts[:-1]):
            goes_on = before is not None and number == 0 and not began[row]
            mixed, *after = _segment(qs, ks, vs, kept, chunk, before if goes_on else None)
            before = SummaryState(*after)
            pieces.append(mixed)
        padding = parts[-1][0].shape[1]
        outputs.append(torch.cat([*pieces, v.new_zeros(1, padding, q.shape[2], v.shape[3])], dim=1))
        left.append(before)
    return torch.cat(outputs), None if state is None else _gather([one for one in left if one is not None])


def _segment(
    q: Tensor, k: Tensor, v: Tensor, inside: Tensor, chunk: int, state: SummaryState | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of one segment, all as far in it: mixed, then what they leave."""
    ended, begun = (0, 0) if state is None else (state.keys.shape[1], state.inside.shape[1])
    first = chunk - 1 - begun  # the token that ends the chunk; ones after it, every chunk
    keys, values = k[:, first::chunk], v[:, first::chunk]
    if state is not None:
        keys, values, inside = (
            torch.cat([old.to(new.dtype), new], dim=1)
            for old, new in ((state.keys, keys), (state.values, values), (state.inside, inside))
        )
    mixed = summary_attention(q, keys, values, chunk, ended * chunk + begun, k, v)
    rest = (begun + q.shape[1]) % chunk
    return mixed, keys, values, inside[:, inside.shape[1] - rest :]


def _row(state: SummaryState, row: int, count: int, chunk: int) -> SummaryState:
    """A row's own entries, of ``count`` tokens."""
    ended, begun = divmod(count, chunk)
    keys, values, inside = (
        x[row : row + 1, x.shape[1] - kept :]
        for x, kept in ((state.keys, ended), (state.values, ended), (state.inside, begun))
    )
    return SummaryState(keys, values, inside)


def _gather(rows: list[SummaryState]) -> SummaryState:
    """Rows behind one another, filled up on the left."""
    ended, begun = [one.keys.shape[1] for one in rows], [one.inside.shape[1] for one in rows]
    device = rows[0].keys.device

    def filled(parts: Sequence[Tensor]) -> Tensor:
        most = max(x.shape[1] for x in parts)
        return torch.cat([torch.cat([x.new_zeros(1, most - x.shape[1], *x.shape[2:]), x], dim=1) for x in parts])

    def there(counts: list[int]) -> Tensor:
        most = max(counts)
        return torch.arange(most, device=device) >= most - torch.tensor(counts, device=device)[:, None]

    keys, values, inside = (filled(x) for x in zip(*((one.keys, one.values, one.inside) for one in rows), strict=True))
    return SummaryState(keys, values, inside, there(ended), there(begun))
