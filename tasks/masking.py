"""Which positions a masked model must guess, and what it sees there: a pure function of (seed, sample, position).

Nothing is drawn from a generator, so a run that goes on, other ranks, workers or batches draw the same, on any device.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# Streams of random numbers: each kind of decision hashes its own number beside the counters.
_CHOICE, _KIND, _SYMBOL = range(3)
_ONE = 1 << 53


def _signed(value: int) -> int:
    """A 64-bit constant as torch's int64 holds it."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


def _finalise(value: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014) on int64, which wraps; shifts fill with zeros."""
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def draw(seed: int, stream: int, index: Int[Tensor, "b"], position: Int[Tensor, "... t"]) -> Int[Tensor, "b t"]:
    """53 random-looking bits for each sample and position; divided by 2^53 a number in [0, 1)."""
    golden = _signed(0x9E3779B97F4A7C15)
    key = torch.full((), _signed(seed), dtype=torch.int64, device=index.device)
    row = _finalise((_finalise(key + golden) ^ _finalise(index + _signed(golden * (stream + 2)))) + golden)
    state = _finalise((row[:, None] ^ _finalise(position + golden)) + golden)
    return (state >> 11) & (_ONE - 1)


def choose(
    index: Int[Tensor, "b"], length: int, rate: float, span: float = 1.0, seed: int = 0
) -> tuple[Bool[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Choose positions, in spans.

    A chain of two states along the row: with probability ``a`` a position starts a span, with ``b = 1 / span`` it
    starts a gap, else it goes on as the one before; ``a = b rate / (1 - rate)``. A share ``rate`` is chosen and a span
    is ``span`` long on average. ``a + b = 1`` is independent positions, whose runs are 1 / (1 - rate) long: spans
    cannot be shorter. Position 0 is chosen with probability ``rate``.

    Args:
        index: sample numbers.
        length: t.
        rate: share of positions to choose, above 0 and below 1.
        span: mean length of a span, positions.
        seed: names the draw.

    Returns:
        Which positions are chosen, and the position at which each was decided, the same along a span.
    """
    steps = torch.arange(length, device=index.device)
    bits = draw(seed, _CHOICE, index, steps)
    stop = 1 / max(span, 1 / (1 - rate))
    start = stop * rate / (1 - rate)
    begins, ends = bits < round(start * _ONE), bits >= _ONE - round(stop * _ONE)
    if length:
        begins[:, 0] = bits[:, 0] < round(rate * _ONE)
        ends[:, 0] = ~begins[:, 0]
    decided = torch.where(begins | ends, steps, 0).cummax(dim=1).values
    return begins.gather(1, decided), decided


def corrupt(
    tokens: Int[Tensor, "b t"],
    chosen: Bool[Tensor, "b t"],
    decided: Int[Tensor, "b t"],
    index: Int[Tensor, "b"],
    mask_token: int,
    replacements: Int[Tensor, "r"],
    mask_share: float = 0.8,
    random_share: float = 0.1,
    seed: int = 0,
) -> Int[Tensor, "b t"]:
    """What the model sees: the mask at ``mask_share`` of the chosen spans, random tokens at ``random_share``, the
    truth at the rest (arXiv 1810.04805; by spans arXiv 1907.10529).

    Args:
        tokens: the truth.
        chosen: see ``choose``.
        decided: see ``choose``.
        index: sample numbers.
        mask_token: id of the mask.
        replacements: ids that a random token may have, each as likely; the true one is among them.
        mask_share: share of chosen spans.
        random_share: share of chosen spans.
        seed: names the draw.
    """
    kind = draw(seed, _KIND, index, decided)
    masked = chosen & (kind < round(mask_share * _ONE))
    random = chosen & ~masked & (kind < round((mask_share + random_share) * _ONE))
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    symbols = replacements[draw(seed, _SYMBOL, index, steps) % len(replacements)]
    return torch.where(masked, mask_token, torch.where(random, symbols, tokens))
