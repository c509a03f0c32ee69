"""MixedObjectives: train on several objectives, a row each, with shares that may follow what is learnt."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError, nearest
from seqlong.mixers import PrefixAttention, PrefixMixer
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.bandit import Bandit, Reward
from seqlong.tasks.causal_lm import CausalLM
from seqlong.tasks.masking import draw
from seqlong.tasks.objectives import Objective
from seqlong.tasks.rearranging import Arrangement, Segments, arranged

log = logging.getLogger("seqlong")

#: Where a checkpoint holds what the bandit knows.
BANDIT_KEY = "seqlong_objectives"
_CHOICE = 20  # a stream of random numbers; others: ``masking``, ``rearranging``


class MixedObjectives(CausalLM):
    """Each row of training follows one objective: the next token, a prefix, the middle last, holes, copies, questions.

    Which one is drawn for each row, by (seed, sample number) and the shares; how the row is rearranged depends on
    (seed, sample number) only. Segments of a packed row (documents, contigs) are rearranged one by one. Data are made
    as for CausalLM (data.targets=next), text or DNA. Evaluation is of ``evaluate``, the next token if it is not given,
    so that ``val/bits`` can be compared with those of other models; train/bits is over what is asked.

    Signs between parts are tokens of their own, from ``first_sign`` on, as many as the objectives use;
    ``model.backbone.vocab_size`` must hold them.

    Logs ``train/share_<name>`` and ``train/bits_<name>``, the latter of the last period of the reward.

    Args:
        backbone: the architecture. Every mixer must be causal; PrefixAttention and PrefixMixer read prefixes both ways.
        objectives: by name; each given as class_path and init_args, with its weight.
        first_sign: id of the first sign: the data's vocabulary ends below. 260 for bytes, 9 for DNA.
        reward: how shares follow what is learnt; null: they are the weights.
        evaluate: the objective that is measured in evaluation; null: the next token.
        seed: names the draws.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        tie_embeddings: whether the last projection is the embedding's weight, or one of its own.
        z_loss: weight of the squared log-normaliser in the training loss, 0 for none, 1e-4 where logits drift. It then
            counts in train/bits too, never in evaluation.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.

    Raises:
        ConfigError: no objective, one to evaluate that there is not, a vocabulary without room for the signs.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        objectives: dict[str, Objective],
        first_sign: int = 260,
        reward: Reward | None = None,
        evaluate: str | None = None,
        seed: int = 0,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        tie_embeddings: bool = True,
        z_loss: float = 0.0,
        compile: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tie_embeddings=tie_embeddings, z_loss=z_loss, compile=compile)
        if not objectives:
            raise ConfigError("task.objectives is empty; name one or more, such as seqlong.tasks.objectives.FillMiddle")
        if evaluate is not None and evaluate not in objectives:
            raise ConfigError(
                f"task.evaluate is '{evaluate}', but task.objectives has {', '.join(objectives)}"
                f"{nearest(evaluate, objectives)}"
            )
        self.objectives, self.evaluate, self.seed = objectives, evaluate, seed
        self.signs = signs_of(objectives)
        self.first_sign = first_sign
        if self.signs and first_sign + len(self.signs) > self.head.vocab_size:
            needed = first_sign + len(self.signs)
            raise ConfigError(
                f"the objectives use {len(self.signs)} signs ({', '.join(self.signs)}), ids {first_sign} to "
                f"{needed - 1}, but the vocabulary has {self.head.vocab_size}; set model.backbone.vocab_size={needed}"
            )
        self.bandit = Bandit([one.weight for one in objectives.values()], reward)
        self._chosen: Tensor | None = None
        reads = any(isinstance(part, PrefixAttention | PrefixMixer) for part in self.backbone.modules())
        if any(one.reads_prefix for one in objectives.values()) and not reads:
            log.info(
                "no mixer reads prefixes in both directions, so they are read as any text; PrefixAttention and "
                "PrefixMixer do (docs/objectives.md)"
            )
        self._prefixed = reads

    def setup(self, stage: str) -> None:
        super().setup(stage)
        size = getattr(getattr(getattr(self.trainer, "datamodule", None), "vocabulary", None), "size", 0)
        if self.signs and size > self.first_sign:
            raise ConfigError(
                f"task.first_sign is {self.first_sign}, but the data has {size} symbols; set task.first_sign={size} "
                f"and model.backbone.vocab_size={size + len(self.signs)}"
            )

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        """The rows, rearranged; in evaluation by ``evaluate``."""
        batch = super().prepare(batch)
        if batch.tokens is None or batch.index is None or batch.patches is not None or batch.positions is not None:
            raise ConfigError("MixedObjectives needs batches of tokens with index, without positions of their own")
        if not self.training:
            if self.evaluate is None:
                return batch
            number = list(self.objectives).index(self.evaluate)
            return self._rearranged(batch, torch.full_like(batch.index, number))
        edges = self.bandit.shares.cumsum(0).to(batch.index.device)
        place = torch.zeros(1, dtype=torch.int64, device=batch.index.device)
        drawn = draw(self.seed, _CHOICE, batch.index, place)[:, 0].double() / (1 << 53)
        self._chosen = torch.searchsorted(edges, drawn, right=True).clamp(max=len(edges) - 1)
        return self._rearranged(batch, self._chosen)

    def _rearranged(self, batch: SequenceBatch, chosen: Int[Tensor, "b"]) -> SequenceBatch:
        parts = Segments.of(batch, self.seed)
        causal = arranged(batch, parts, Arrangement(None, parts.offset >= 0), parts.index[:0])
        tokens, targets, weight = causal
        prefix = torch.zeros_like(tokens, dtype=torch.bool)
        for number, objective in enumerate(self.objectives.values()):
            made = objective.arrange(parts)
            ids = [self.first_sign + self.signs.index(name) for name in objective.signs]
            found = arranged(batch, parts, made, torch.tensor(ids, dtype=torch.int64, device=tokens.device))
            here = (chosen == number)[:, None] & (parts.size >= objective.shortest)
            tokens, targets, weight = (
                torch.where(here, new, old) for new, old in zip(found, (tokens, targets, weight), strict=True)
            )
            if made.prefix is not None:
                prefix = torch.where(here, made.prefix, prefix)
        if batch.index is not None:  # rows that only fill a batch stay silent
            targets = torch.where(batch.index[:, None] < 0, -1, targets)
        return dataclasses.replace(
            batch, tokens=tokens, targets=targets, loss_weight=weight, prefix=prefix if self._prefixed else None
        )

    def _own(self, batch: SequenceBatch) -> SequenceBatch:
        if self._sequence is not None and batch.prefix is not None:
            raise ConfigError(
                "sequence parallelism cuts rows, and a prefix is read at once: take Attention and plain mixers instead "
                "of PrefixAttention and PrefixMixer, or set trainer.strategy=auto"
            )
        return super()._own(batch)

    def observe(self, nll: Float[Tensor, "b t"], weight: Float[Tensor, "b t"]) -> None:
        if self.training and self._chosen is not None:
            asked = weight > 0
            self.bandit.add(self._chosen, torch.where(asked, nll, 0).sum(1, dtype=torch.float64), asked.sum(1).double())

    def _log_training(self, shape: tuple[int, int]) -> None:
        super()._log_training(shape)
        for name, share, bits in zip(self.objectives, self.bandit.shares, self.bandit.bits, strict=True):
            self.log(f"train/share_{name}", share.float())
            if bits.isfinite():
                self.log(f"train/bits_{name}", bits.float())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[BANDIT_KEY] = self.bandit.saved()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.bandit.load(checkpoint.get(BANDIT_KEY, {}))

    def describe(self) -> dict[str, Any]:
        named = {name: type(one).__name__ for name, one in self.objectives.items()}
        signs = {name: self.first_sign + place for place, name in enumerate(self.signs)}
        return {**super().describe(), "objectives": named, "signs": signs}


def signs_of(objectives: Mapping[str, Objective]) -> list[str]:
    """The signs that objectives use, once each, in the order of their ids."""
    return list(dict.fromkeys(name for one in objectives.values() for name in one.signs))
