"""Strands: both strands of DNA read with one set of weights, so that a model turns around with its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqlong.errors import ConfigError
from seqlong.layout import SequenceLayout

#: What a backbone does about the other strand.
ReverseComplement = Literal["none", "equivariant"]


class Strands(nn.Module):
    """``F(x) = [f(x), R f(C x)]``, C the reverse complement of each row, R its reversal: then ``F(C x) = R swap F(x)``.

    f is any stack of blocks: the two strands share all its weights, and stand one after another in the batch, so that
    a row is turned around once, not in each block. A linear head ``W`` reads both halves as ``[W, W c]``, c the
    complement of its symbols, and logits turn around too (``LanguageHead``). The mean of the halves turns around with
    the row (``fold``), and its mean over a segment is the same for either strand. Source: arXiv 2403.03234 (RCPS in
    Caduceus, there with Mamba only, and two channels' halves in one row).

    Args:
        complement: the token that pairs with each token, from 0 on; ids beyond are their own.
        vocab_size: token ids are below this.

    Raises:
        ConfigError: it is no pairing of tokens.
    """

    complement: Int[Tensor, "y"]

    def __init__(self, complement: Sequence[int], vocab_size: int) -> None:
        super().__init__()
        pairs = list(complement)
        whole = pairs + list(range(len(pairs), vocab_size))
        if len(pairs) > vocab_size or any(not 0 <= a < len(pairs) or whole[a] != n for n, a in enumerate(pairs)):
            raise ConfigError(
                f"backbone.complement must pair the tokens below vocab_size={vocab_size} with one another or with "
                f"themselves, found {pairs}"
            )
        self.pairs = tuple(whole)
        self.register_buffer("complement", torch.tensor(whole), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Strands:
        super()._apply(fn, recurse)
        # Not what an empty tensor held after a model was built on the meta device.
        self.complement = torch.tensor(self.pairs, device=self.complement.device)
        return self

    def both(self, tokens: Int[Tensor, "b t"], layout: SequenceLayout) -> tuple[Int[Tensor, "b2 t"], SequenceLayout]:
        """The rows, then their reverse complements: ``2 b`` rows. Padding stays at the end."""
        other = self.complement[layout.reverse(tokens)]
        turned, ids = layout.reversed, None
        if layout.segment_ids is not None and turned.segment_ids is not None:
            ids = torch.cat([layout.segment_ids, turned.segment_ids])
        positions = torch.cat([layout.positions, turned.positions])
        return torch.cat([tokens, other]), SequenceLayout(ids, positions)

    def join(self, hidden: Float[Tensor, "b2 t d"], layout: SequenceLayout) -> Float[Tensor, "b t e"]:
        """The two strands' states of each position side by side: ``e = 2 d``."""
        given, other = hidden.chunk(2)
        return torch.cat([given, layout.reverse(other)], dim=-1)


def fold(hidden: Float[Tensor, "*b e"]) -> Float[Tensor, "*b d"]:
    """The mean of the strands: features that do not tell which one was read. ``e = 2 d``.

    Those of ``C x`` are those of x from right to left, so a mean or a maximum over a segment is the same for both.
    """
    given, other = hidden.chunk(2, dim=-1)
    return (given + other) / 2
