"""Heads: from hidden states to predictions and losses."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqlong.kernels.cross_entropy import linear_cross_entropy
from seqlong.kernels.cross_entropy.op import SMALL
from seqlong.strands import Strands

#: Logits held at a time by ``most_likely``, in elements.
_BUDGET = 1 << 24


class LanguageHead(nn.Module):
    """``logits = hidden Wᵀ``, one for each token of the vocabulary, in float32.

    W is the embedding's weight where one is given, so that it is stored, saved and trained once. With ``strands``,
    hidden states are those of both strands (``seqlong.strands``), and are read with ``[W, W c]``: the other strand's
    half speaks of complements. Then logits of the reverse complement are those of the row turned around, each symbol's
    that of its complement.

    Args:
        d_model: width of the hidden states, or of one strand's.
        vocab_size: tokens.
        embedding: share its weight (arXiv 1608.05859); None makes a weight of its own, normal with deviation 0.02.
        strands: those of the backbone, ``backbone.strands``, if its hidden states are of both.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        embedding: nn.Embedding | None = None,
        strands: Strands | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self._strands = () if strands is None else (strands,)
        self._shared = () if embedding is None else (embedding,)  # in a tuple: it is no submodule of this one
        if embedding is None:
            self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
            nn.init.normal_(self.weight, std=0.02)
        else:
            self.register_parameter("weight", None)

    @property
    def tied(self) -> bool:
        """Whether the weight is the embedding's."""
        return bool(self._shared)

    @property
    def matrix(self) -> Float[Tensor, "y d"]:
        """W, wherever it is kept; ``[W, W c]`` for two strands. (Asked for anew each time: a sharded embedding replaces
        its weight.)"""
        weight = self._shared[0].weight if self.weight is None else self.weight
        return torch.cat([weight, weight[self._strands[0].complement]], dim=1) if self._strands else weight

    def logits(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t y"]:
        """Logits of every position, float32 (float64 if hidden is). All at once: for long rows ask for the ``loss``."""
        hidden = self._operand(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden @ self.matrix.to(hidden.dtype).T
        return logits if logits.dtype == torch.float64 else logits.float()

    def most_likely(self, hidden: Float[Tensor, "b t d"]) -> Int[Tensor, "b t"]:
        """The token with the highest logit at each position, without holding the logits of all."""
        rows = hidden.flatten(0, 1)
        step = max(1, _BUDGET // self.vocab_size)
        parts = [self.logits(rows[None, a : a + step])[0].argmax(dim=-1) for a in range(0, len(rows), step)]
        return torch.cat(parts).view(hidden.shape[:2]) if parts else rows.new_zeros(hidden.shape[:2], dtype=torch.int64)

    def loss(
        self, hidden: Float[Tensor, "b t d"], targets: Int[Tensor, "b t"], z_loss: float = 0.0
    ) -> Float[Tensor, "b t"]:
        """Negative log-likelihood of each target, nats; 0 where the target is -1. Logits are held a part at a time.

        Args:
            hidden: last hidden states.
            targets: token of each position, or -1.
            z_loss: adds ``z_loss · logsumexp²``, see ``linear_cross_entropy``.
        """
        return linear_cross_entropy(self._operand(hidden), self.matrix, targets, z_loss=z_loss)

    def _operand(self, hidden: Tensor) -> Tensor:
        """Hidden states in the type that the product with W is to have: float32 for a small vocabulary, where it costs
        next to nothing, else what autocast says."""
        if self.vocab_size <= SMALL:
            return hidden if hidden.dtype == torch.float64 else hidden.float()
        device = hidden.device.type
        return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
