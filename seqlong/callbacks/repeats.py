"""Repeats: the loss on what stood in the row before, against the rest. A measure of recall that needs no task."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.callbacks.loss_split import Bins, LossSplit, octaves, starts
from seqlong.errors import ConfigError

_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: multiplying by it loses nothing modulo 2**64


class Repeats(LossSplit):
    """Bits of tokens that end a bigram which stood earlier in the same document, against those of all others.

    Where a bigram comes a second time, its first token tells the second to a model that remembers; most of the distance
    between attention and recurrences is in these tokens (arXiv 2312.04927). Logs ``val/bits_repeated`` and
    ``val/bits_new``, and writes to losses.csv the measures ``repeated`` (0 new, 1 repeated) and ``distance`` (of the
    repeated ones: tokens since the last time). One sort a row. For tasks that predict the next token.

    Args:
        n: tokens of what must repeat; where there are few symbols, more, or chance repeats them. Null is by the data's
            vocabulary: 12 of up to 16 symbols, as DNA has, 6 of up to 512, as bytes, else 2.

    Raises:
        ConfigError: n is below 2.
    """

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        if n is not None and n < 2:
            raise ConfigError(f"trainer.callbacks.repeats: n must be 2 or more, found {n}")
        self.n = n
        self.bins = {"repeated": Bins([0, 1]), "distance": Bins(octaves())}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.n is None:
            vocabulary = getattr(getattr(trainer, "datamodule", None), "vocabulary", None)
            size = getattr(vocabulary, "size", 0) or getattr(getattr(pl_module, "head", None), "vocab_size", 512)
            self.n = 12 if size <= 16 else 6 if size <= 512 else 2

    def split(self, module: LightningModule, batch: SequenceBatch, found: dict[str, Tensor]) -> None:
        if getattr(module, "targets", "next") != "next" or batch.tokens is None:
            return
        assert self.n is not None
        known, last = previous(batch.tokens, found["targets"], self.n, batch.segment_ids)
        counted = found["counted"] & known
        distance = torch.arange(last.shape[1], device=last.device) - last
        repeated = counted & (last >= 0)
        self.bins["repeated"].add((last >= 0)[counted].long(), found["nll"][counted])
        self.bins["distance"].add(distance[repeated], found["nll"][repeated])

    def finished(self, trainer: Trainer, module: LightningModule, part: str) -> None:
        for low, _, _, bits in self.bins["repeated"].rows():
            module.log(f"{part}/bits_{'repeated' if low else 'new'}", bits)


def previous(
    tokens: Int[Tensor, "b t"], targets: Int[Tensor, "b t"], n: int, segments: Int[Tensor, "b t"] | None = None
) -> tuple[Bool[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Where the n-gram that each target ends stood last in the same segment.

    The n-gram of position ``i`` is ``tokens[i - n + 2 .. i]`` and ``targets[i]``. They are compared by hashes of 64
    bits, sorted: ``O(t log t)`` a row.

    Returns:
        ``known``: where a position has a target and n - 1 tokens of its segment; ``last``: the position, -1 for none.
    """
    length = tokens.shape[1]
    here = torch.arange(length, device=tokens.device).expand_as(tokens)
    begin = torch.zeros_like(here) if segments is None else starts(segments)
    known = (targets >= 0) & (here - begin >= n - 2)
    code = _mixed(targets + 1)
    for back in range(n - 1):
        earlier = torch.roll(tokens, back, dims=1)
        code = _mixed(code + earlier + 1)
    code = _mixed(code + begin) if segments is not None else code
    # What is no n-gram repeats nothing: hashes of its own place.
    code = torch.where(known, code, _mixed(_mixed(-2 - here)))
    ordered, order = torch.sort(code, dim=1, stable=True)
    same = ordered[:, 1:] == ordered[:, :-1]
    last = torch.full_like(here, -1)
    last.scatter_(1, order[:, 1:], torch.where(same, order[:, :-1], -1))
    return known, torch.where(known, last, -1)


def _mixed(value: Tensor) -> Tensor:
    """A bijection of 64 bits in which low bits move high ones and the other way round."""
    value = value * _FACTOR
    return (value ^ (value >> 29)) * _FACTOR
