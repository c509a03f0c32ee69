"""EffectiveContext: how many of the tokens before it does a prediction use?"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.callbacks.loss_split import Bins, LossSplit
from seqlong.errors import ConfigError


class EffectiveContext(LossSplit):
    """Bits of the last tokens of a row, when the model sees only some of the tokens before them: 16, 32, 64, ...

    The same tokens are predicted each time, so that nothing but the context differs. The effective context is the
    shortest with which the bits are within ``tolerance`` of those with the whole row; logged as
    ``val/effective_context``, and all bits are written to losses.csv as the measure ``context``. It runs the model over
    twice the tokens of the rows that it takes. For tasks that predict the next token.

    Args:
        rows: rows that are taken in each evaluation, over all ranks about as many times more.
        scored: tokens at the end of each that are predicted.
        shortest: smallest context, tokens.
        tolerance: bits by which an effective context may be worse than the whole row.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, rows: int = 16, scored: int = 64, shortest: int = 16, tolerance: float = 0.01) -> None:
        super().__init__()
        if min(rows, scored, shortest) < 1 or tolerance <= 0:
            raise ConfigError(
                f"trainer.callbacks.effective_context: rows {rows}, scored {scored} and shortest {shortest} must be 1 "
                f"or more, and tolerance {tolerance} above 0"
            )
        self.rows, self.scored, self.shortest, self.tolerance = rows, scored, shortest, tolerance
        self.bins = {"context": Bins([shortest << i for i in range(31 - shortest.bit_length())])}
        self._taken = 0
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    @torch.no_grad()
    def split(self, module: LightningModule, batch: SequenceBatch, found: dict[str, Tensor]) -> None:
        length, scored = batch.shape[1], self.scored
        predicts_next = getattr(module, "targets", None) == "next" and batch.tokens is not None
        if self._taken >= self.rows or not predicts_next or length < 2 * self.shortest + scored:
            return
        whole = found["counted"][:, -scored:].all(dim=1)
        if batch.segment_ids is not None:
            whole &= (batch.segment_ids == batch.segment_ids[:, -1:]).all(dim=1)
        rows = torch.nonzero(whole)[: self.rows - self._taken, 0]
        if not len(rows):
            return
        self._taken += len(rows)
        tokens, targets = batch.inputs[rows], found["targets"][rows, -scored:]
        model: Any = module
        assert self._trainer is not None
        context = self.shortest
        while context < length - scored:
            with self._trainer.precision_plugin.val_step_context():
                seen = SequenceBatch(tokens=tokens[:, -context - scored :].contiguous())
                nll = model.head.loss(model.backbone(seen).hidden[:, -scored:], targets)
            self._add(context, nll)
            context *= 2
        self._add(length - scored, found["nll"][rows, -scored:])

    def _add(self, context: int, nll: Tensor) -> None:
        # A whole row's context is between two powers of two: it counts as the one above.
        above = self.shortest
        while above < context:
            above *= 2
        self.bins["context"].add(torch.full_like(nll, above, dtype=torch.int64), nll)

    def finished(self, trainer: Trainer, module: LightningModule, part: str) -> None:
        self._taken = 0
        found = self.bins["context"].rows()
        if not found:
            return
        most = max(count for _, _, count, _ in found)
        found = [row for row in found if row[2] == most]  # contexts that all rows have
        limit = found[-1][3] + self.tolerance
        module.log(f"{part}/effective_context", float(next(low for low, _, _, bits in found if bits <= limit)))
