"""attention: softmax attention over long rows without an O(t²) mask, on torch's fastest kernels."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from seqlong.kernels.attention.reference import attention_reference, first_of_segments, run_starts
from seqlong.kernels.dispatch import NOT_HERE, choose
from seqlong.kernels.inputs import four_axes, heads_of_groups, shaped
from seqlong.kernels.precision import accumulation

OFFERED = {
    "sdpa": "one segment a row: torch's fused attention (cuDNN, then flash, then memory-efficient)",
    "varlen": "packed rows or a window on a GPU: torch's variable-length flash attention",
    "segments": "packed rows: torch's fused attention, one call a segment",
    "blocks": "window, bias or cache: torch's fused attention over blocks of queries, masks built per block",
    "reference": "float64 loop over queries",
}

#: cuDNN's kernel is the faster one on Hopper: 285 ms against 416 for a row of 131,072, forward and backward.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
#: Queries handled at a time by ``blocks``.
BLOCK = 512

Boundaries = list[list[tuple[int, int]]]


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """(b t h k) in, (b t h v) out."""
    grouped, width, wide = k.shape[2] != q.shape[2], q.shape[3], v.shape[3]
    if width != wide:  # fused kernels that take two widths are few; without one all scores would be stored
        q, k, v = (F.pad(x, (0, max(width, wide) - x.shape[3])) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"attn_mask": mask, "is_causal": causal, "enable_gqa": grouped, "scale": width**-0.5}
    if not q.is_cuda:
        out = F.scaled_dot_product_attention(q, k, v, **options)
    else:
        with sdpa_kernel(_BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2)[..., :wide]


def _block_mask(
    rows: slice,
    columns: slice,
    offset: int,
    causal: bool,
    window: int | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    slopes: Tensor | None,
    like: Tensor,
    always: Tensor | None = None,
) -> Tensor:
    """What the queries ``rows`` see of the keys ``columns``, as (b h i j): bool, or a float bias with slopes."""
    i = torch.arange(rows.start, rows.stop, device=like.device)[:, None] + offset
    j = torch.arange(columns.start, columns.stop, device=like.device)
    distance = i - j
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    near = seen if window is None else seen & (distance.abs() < window)
    seen = near[None, None] if always is None else near[None, None] | (seen & always[:, None, None, columns])
    if query_ids is not None and key_ids is not None:
        same = query_ids[:, rows, None] == key_ids[:, None, columns]
        # A padded query would see nothing, whose softmax is NaN: let it see itself. Nobody reads it.
        lost = (query_ids[:, rows, None] == 0) & (distance == 0)
        seen = (seen & same[:, None]) | lost[:, None]
    if slopes is None:
        return seen
    kept = accumulation(like.dtype)
    bias = -slopes.to(kept)[:, None, None] * distance.abs()
    return bias.masked_fill(~seen, -torch.inf).to(like.dtype)


def _range(pieces: tuple[Tensor, ...], left: int, right: int) -> Tensor:
    """Positions left to right of a sequence that was split into pieces of ``BLOCK``."""
    first = left // BLOCK
    near = pieces[first : max(first + 1, -(-right // BLOCK))]
    joined = near[0] if len(near) == 1 else torch.cat(near, dim=1)
    return joined[:, left - first * BLOCK : right - first * BLOCK]


class _Sinks:
    """Columns far behind a block of queries that it sees none the less: at most a few a row, the sinks of the segment
    that reaches into the block's window (of later segments they are in the window)."""

    def __init__(self, sinks: int, always: Tensor | None, ids: Tensor | None, left: Tensor, k: Tensor, v: Tensor):
        self.sinks, self.ids = sinks, ids
        if ids is None:
            self.few = (k[:, :sinks], v[:, :sinks])
            return
        rows, keys = ids.shape
        first = torch.arange(sinks, device=k.device)
        at = run_starts(ids)[:, left, None] + first  # (b blocks sinks)
        near = torch.zeros_like(at, dtype=torch.bool) if always is None else at < sinks  # those are in ``carried``
        if always is not None:  # sinks from the cache stand before all others
            carried = first.expand(rows, len(left), sinks)
            at, near = torch.cat([carried, at], dim=2), torch.cat([torch.zeros_like(near), near], dim=2)
        else:
            always = first_of_segments(sinks, rows, keys, ids, k.device)
        at = at.clamp(max=keys - 1)
        flat = at.flatten(1)
        self.there = always.gather(1, flat).view_as(at) & (at < left[:, None]) & ~near
        self.found = ids.gather(1, flat).view_as(at)
        index = flat[..., None, None]
        pick = (x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in (k, v))  # at once: one gradient, not one each
        self.keys, self.values = (x.split(at.shape[2], dim=1) for x in pick)

    def of(self, block: int, left: int) -> tuple[Tensor, Tensor]:
        """Keys and values for a block of queries."""
        if self.ids is None:
            few = min(self.sinks, left)
            return self.few[0][:, :few], self.few[1][:, :few]
        return self.keys[block], self.values[block]

    def seen(self, block: int, left: int, query_ids: Tensor | None, here: slice, mask: Tensor) -> Tensor:
        """``mask`` with the columns of ``of`` before it."""
        if self.ids is None or query_ids is None:
            ahead = mask.new_ones(*mask.shape[:3], min(self.sinks, left))
        else:
            same = query_ids[:, here, None] == self.found[:, block, None]
            ahead = (same & self.there[:, block, None])[:, None]
        return torch.cat([ahead, mask], dim=3)


def _by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    slopes: Tensor | None,
    sinks: int = 0,
    always: Tensor | None = None,
) -> Tensor:
    length, keys = q.shape[1], k.shape[1]
    offset = keys - length
    plain = query_ids is None and slopes is None and window is not None
    lefts = [0 if window is None else max(0, offset + start - window + 1) for start in range(0, length, BLOCK)]
    far = None
    if sinks and lefts and window is not None:
        begins = torch.arange(len(lefts), device=k.device) * BLOCK + (offset - window + 1)  # ``lefts`` on the device
        far = _Sinks(sinks, always, key_ids, begins.clamp(min=0), k, v)
    if far is not None and always is None:
        always = first_of_segments(sinks, q.shape[0] if key_ids is not None else 1, keys, key_ids, q.device)
    masks: dict[tuple[int, int, int], Tensor] = {}
    outputs = []
    # Pieces by split, whose backward joins the gradients once; that of a slice is as long as the whole row, each time.
    queries, pieces = q.split(BLOCK, dim=1), (k.split(BLOCK, dim=1), v.split(BLOCK, dim=1))
    for block, (qb, left) in enumerate(zip(queries, lefts, strict=False)):
        start = block * BLOCK
        stop = min(start + BLOCK, length)
        right = offset + stop if causal else keys if window is None else min(keys, offset + stop + window - 1)
        here, there = slice(start, stop), slice(left, right)

        def masked(qb: Tensor, kb: Tensor, vb: Tensor, block: int = block, there: slice = there) -> Tensor:
            here = slice(block * BLOCK, block * BLOCK + qb.shape[1])
            mask = _block_mask(here, there, offset, causal, window, query_ids, key_ids, slopes, qb, always)
            if far is not None:
                mask = far.seen(block, there.start, query_ids, here, mask)
            return _fused(qb, kb, vb, causal=False, mask=mask)

        kb, vb = (_range(parts, left, right) for parts in pieces)
        if far is not None:
            kb, vb = (torch.cat(pair, dim=1) for pair in zip(far.of(block, left), (kb, vb), strict=True))
        if plain:  # the same few masks serve every block, so they may be kept
            key = (stop - start, kb.shape[1], offset + start - left)
            if key not in masks:
                mask = _block_mask(here, there, offset, causal, window, None, None, None, q, always)
                masks[key] = mask if far is None else far.seen(block, left, None, here, mask)
            outputs.append(_fused(qb, kb, vb, causal=False, mask=masks[key]))
        elif torch.is_grad_enabled():
            outputs.append(checkpoint(masked, qb, kb, vb, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(masked(qb, kb, vb))
    return torch.cat(outputs, dim=1) if outputs else v.new_zeros(*q.shape[:3], v.shape[3])


def _by_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    slopes: Tensor | None,
    boundaries: Boundaries,
    sinks: int = 0,
) -> Tensor:
    outputs = []
    for row, segments in enumerate(boundaries):
        sizes = [z - a for a, z in segments]
        padding = q.shape[1] - sum(sizes)
        split = [x[row : row + 1].split([*sizes, padding], dim=1) for x in (q, k, v)]
        parts = []
        for size, qs, ks, vs in zip(sizes, *split, strict=False):  # without the padding
            if slopes is None and (window is None or window >= size):
                parts.append(_fused(qs, ks, vs, causal=causal))
            else:
                parts.append(_by_blocks(qs, ks, vs, causal, window, None, None, slopes, sinks))
        parts.append(v.new_zeros(1, padding, q.shape[2], v.shape[3]))
        outputs.append(torch.cat(parts, dim=1))
    return torch.cat(outputs)


def _varlen_options(q: Tensor, causal: bool, window: int | None) -> dict[str, Any] | None:
    """How to ask this torch release's variable-length kernel for the wanted mask; None where it cannot be asked."""
    if not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)):
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if "window_size" in known:
        reach = -1 if window is None else window - 1
        return {"window_size": (reach, 0 if causal else reach)}
    return {"is_causal": causal} if "is_causal" in known and window is None else None


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], boundaries: Boundaries) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, length = q.shape[:2]
    spans = [(row * length + a, row * length + z) for row, parts in enumerate(boundaries) for a, z in parts]
    sizes = [z - a for a, z in spans]
    cuts = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=q.device)
    keep = None
    if sum(sizes) < rows * length:
        keep = torch.cat([torch.arange(a, z, device=q.device) for a, z in spans])
    repeat = q.shape[2] // k.shape[2]
    q, k, v = (x.flatten(0, 1) if keep is None else x.flatten(0, 1)[keep] for x in (q, k, v))
    if repeat > 1:  # not every torch release takes fewer key heads here
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    out = cast(Tensor, varlen_attn(q, k, v, cuts, cuts, max(sizes), max(sizes), **options))
    if keep is not None:
        out = out.new_zeros(rows * length, *out.shape[1:]).index_copy(0, keep, out)
    return out.view(rows, length, *out.shape[1:])


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    slopes: Tensor | None = None,
    boundaries: Boundaries | None = None,
    sinks: int = 0,
    always: Tensor | None = None,
) -> None:
    """Raise a ValueError that names what does not fit, what was expected and what was found."""
    four_axes("attention", {"q": q, "k": k, "v": v})
    (rows, length, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    heads_of_groups("attention", heads, groups)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (rows, keys, groups, width)),
        "v": (v, (rows, keys, groups, v.shape[3])),
        "query_ids": (query_ids, (rows, length)),
        "key_ids": (key_ids, (rows, keys)),
        "slopes": (slopes, (heads,)),
        "always": (always, (rows, keys)),
    }
    shaped("attention", expected)
    if (causal or window is not None) and keys < length:
        raise ValueError(f"attention needs keys for all {length} queries, found {keys}")
    if window is not None and window < 1:
        raise ValueError(f"attention needs a window of at least 1 position, found {window}")
    # Documents that share a row would see each other, and nobody would know.
    if (query_ids is None) != (key_ids is None):
        found = "query_ids" if key_ids is None else "key_ids"
        raise ValueError(f"attention needs query_ids and key_ids, or neither, found {found} alone")
    if boundaries is not None and query_ids is None:
        raise ValueError("attention needs query_ids and key_ids with boundaries, which say where they change")
    if sinks and (window is None or not causal or slopes is not None):
        raise ValueError("sinks are kept beyond a window, before a token: they need window, causal=True and no slopes")
    if always is not None and not sinks:
        raise ValueError("attention needs sinks with always, which says where they are")


def attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g v"],
    *,
    causal: bool = True,
    window: int | None = None,
    query_ids: Int[Tensor, "b t"] | None = None,
    key_ids: Int[Tensor, "b s"] | None = None,
    slopes: Float[Tensor, "h"] | None = None,
    boundaries: Boundaries | None = None,
    sinks: int = 0,
    always: Bool[Tensor, "b s"] | None = None,
    implementation: str | None = None,
) -> Float[Tensor, "b t h v"]:
    """``o_i = Σ_j softmax_j(q_i·k_j / √k - slope |i - j|) v_j`` over the keys that query i may see.

    Queries are the last t of the s positions that keys stand at: ``s - t`` keys come from a cache, in order.

    Args:
        q, k, v: h query heads share g key and value heads (g divides h).
        causal: query i sees keys up to its own position.
        window: sees only keys at a distance below this, its own included.
        query_ids, key_ids: a query sees keys with its own id only; queries with id 0 are padding and their output is
            unspecified (finite). Give both or neither.
        slopes: ALiBi's, one a head (arXiv 2108.12409).
        boundaries: the ``(start, stop)`` of each row's segments, for ids without a cache: rows are then run segment
            by segment.
        sinks: how many of the first keys of every run of one id a query sees beyond its window (arXiv 2309.17453);
            needs a window, ``causal`` and no slopes.
        always: ``(b s)`` which keys those are, where a cache does not begin with its segment: its first ``sinks``
            columns hold the cached ones, the others are found among the new keys.
        implementation: one of the names in ``OFFERED``; None lets dispatch choose.

    Returns:
        The mixed values, in v's type. Time O(t s), or O(t window); memory O(t).

    Raises:
        ValueError: shapes do not fit, or settings do not go together, or the implementation asked for cannot serve.
    """
    check(
        q, k, v, causal=causal, window=window, query_ids=query_ids, key_ids=key_ids, slopes=slopes,
        boundaries=boundaries, sinks=sinks, always=always,
    )  # fmt: skip
    cached = k.shape[1] != q.shape[1]
    flash = _varlen_options(q, causal, window)
    possible = ["blocks", "reference"]  # these do everything; what else can serve depends on what is asked
    if boundaries is not None and not cached:
        possible.insert(0, "segments")
    even = slopes is None and not sinks and q.shape[3] == v.shape[3]
    if even and flash is not None and not cached and (query_ids is None or boundaries is not None):
        possible.insert(0, "varlen")
    if query_ids is None and window is None and slopes is None and (not cached or not causal or q.shape[1] == 1):
        possible.insert(0, "sdpa")
    offered = dict.fromkeys(OFFERED, f"{NOT_HERE}it does not serve this device, type, mask or cache")
    offered |= {name: OFFERED[name] for name in possible}
    choice = choose("attention", offered, possible[0], implementation).implementation
    if choice == "reference":
        return attention_reference(q, k, v, causal, window, query_ids, key_ids, slopes, sinks, always)
    if choice == "sdpa":
        return _fused(q, k, v, causal=causal and not cached)
    if choice == "varlen" and flash is not None and any(boundaries or [[(0, 1)]]):
        return _by_varlen(q, k, v, flash, boundaries or [[(0, q.shape[1])]] * q.shape[0])
    if choice == "segments" and boundaries is not None:
        return _by_segments(q, k, v, causal, window, slopes, boundaries, sinks)
    return _by_blocks(q, k, v, causal, window, query_ids, key_ids, slopes, sinks, always)
