"""MaskedLM: guess hidden tokens from both sides."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask
from seqlong.tasks.masking import choose, corrupt

log = logging.getLogger("seqlong")


class MaskedLM(SequenceTask):
    """Masked language modelling: ``Σ -ln p(x_t | the row with some tokens hidden)`` over the hidden t, where the data
    gives the token at each position as its target (data.targets=same).

    Which positions are hidden depends on (seed, sample number, position) only: the same after a restart, on any number
    of ranks, and in every validation. Positions of loss weight 0 (padding, unknown bases) are never hidden. Bits and
    accuracy are over hidden positions.

    Args:
        backbone: the architecture. Its mixers should see both sides (Bidirectional, or attention with causal false).
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        rate: share of positions to hide, above 0 and below 1.
        span: mean length of hidden spans, positions; 1 hides single positions, independent of one another.
        mask_share: share of hidden spans that show the mask.
        random_share: share of hidden spans that show random tokens; the rest shows the truth.
        mask_token: id of the mask.
        replacements: ids that random tokens are drawn from; the default is A, C, G, T. null: all symbols of the data.
        seed: names the draw.
        tie_embeddings: whether the last projection is the embedding's weight, or one of its own.
        z_loss: weight of the squared log-normaliser in the training loss, 0 for none, 1e-4 where logits drift. It then
            counts in train/bits too, never in evaluation.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.

    Raises:
        ConfigError: a setting is out of its range.
    """

    targets = "same"
    replacements: Tensor

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        rate: float = 0.15,
        span: float = 1.0,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        mask_token: int = 1,
        replacements: Sequence[int] | None = (4, 5, 6, 7),
        seed: int = 0,
        tie_embeddings: bool = True,
        z_loss: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tie_embeddings, z_loss, carry_state=False, compile=compile)
        if not 0 < rate < 1 or span < 1:
            raise ConfigError(
                f"MaskedLM: rate {rate} must lie between 0 and 1, span {span} must be 1 or more positions"
            )
        if mask_share < 0 or random_share < 0 or mask_share + random_share > 1:
            raise ConfigError(
                f"MaskedLM: mask_share {mask_share} and random_share {random_share} must be 0 or more and at most 1 "
                "together"
            )
        self._all_symbols = replacements is None
        replacements = () if replacements is None else replacements
        ids = [mask_token, *replacements]
        if (
            not (replacements or self._all_symbols)
            or min(ids) < 0
            or max(ids) >= self.head.vocab_size
            or mask_token in replacements
        ):
            raise ConfigError(
                f"MaskedLM: replacements {list(replacements)} must name tokens below the vocabulary size "
                f"{self.head.vocab_size}, as mask_token {mask_token} must, which is not one of them"
            )
        self.rate, self.span, self.seed = rate, span, seed
        self.mask_share, self.random_share = mask_share, random_share
        self.mask_token = mask_token
        self.register_buffer("replacements", torch.tensor(list(replacements)), persistent=False)
        if all(block.causal for block in self.backbone.blocks):
            log.warning(
                "MaskedLM: every mixer is causal, so hidden tokens are guessed from the left side alone; use "
                "seqlong.mixers.Bidirectional, and attention with causal false"
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        vocabulary = getattr(getattr(self.trainer, "datamodule", None), "vocabulary", None)
        mask = getattr(vocabulary, "mask", self.mask_token)
        symbols = list(getattr(vocabulary, "replacements", self.replacements.tolist()))
        if self._all_symbols:
            if not symbols:
                raise ConfigError("task.replacements=null takes all symbols of the data, which names none; list them")
            self.replacements = torch.tensor(symbols, device=self.replacements.device)
        if mask != self.mask_token or not set(self.replacements.tolist()) <= set(symbols):
            listed = str(symbols) if len(symbols) <= 16 else "null"
            raise ConfigError(
                f"MaskedLM: mask_token {self.mask_token} and replacements {self.replacements.tolist()[:16]} are not of "
                f"the data's vocabulary, whose mask is {mask} and whose symbols are {shortened(symbols)}; set "
                f"task.mask_token={mask} and task.replacements={listed}"
            )

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        """Hide tokens; targets stay at hidden positions only."""
        if batch.tokens is None or batch.targets is None or batch.index is None:
            raise ConfigError("MaskedLM needs batches with tokens, targets and index; set data.targets=same")
        chosen, decided = choose(batch.index, batch.shape[1], self.rate, self.span, self.seed)
        chosen = chosen & (batch.targets >= 0)
        if batch.loss_weight is not None:
            chosen = chosen & (batch.loss_weight > 0)
        tokens = corrupt(
            batch.tokens, chosen, decided, batch.index, self.mask_token, self.replacements, self.mask_share,
            self.random_share, self.seed,
        )  # fmt: skip
        return dataclasses.replace(batch, tokens=tokens, targets=torch.where(chosen, batch.targets, -1))


def shortened(symbols: Sequence[int]) -> str:
    """A list of ids, as its ends where it is long."""
    return str(symbols) if len(symbols) <= 16 else f"[{symbols[0]}, ..., {symbols[-1]}], {len(symbols):,} of them"
