"""SequenceRegression: which value, or values, has a sequence?"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqlong.backbone import BackboneConfig
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.labelled import LabelledTask, Strand
from seqlong.tasks.pooling import Pooling


class SequenceRegression(LabelledTask):
    """Half the squared error of values standardised by their mean and deviation in training.

    That, plus ``ln √(2π)``, is ``-ln`` of a normal density of deviation 1, so that ``bits`` stand beside those of other
    tasks. Answers of ``predict`` are in the units of the data.

    Args:
        backbone: the architecture.
        values: how many a sequence has; the data must have as many columns.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        pool: from the states of a sequence to one: ``mean``, ``last``, ``max``, ``attentive``, ``places`` or ``echo``;
            see SequenceClassification.
        rc: what to do about the other strand: ``none``, ``augment``, ``average`` or ``equivariant``; see
            SequenceClassification.
        dropout: share of the pooled state's channels that training leaves out.
        init_from: checkpoint file or run folder whose backbone training starts from; null: from nothing.
        freeze: first blocks that stay as they are, the embedding with them; -1: the whole backbone.
        lora_rank: train low-rank changes (LoRA) of the linear layers in place of the backbone; 0: the backbone itself.
        lora_alpha: strength of those changes.
        layer_decay: learning rate of a block as a share of that of the block above it.
        backbone_lr: learning rate of the backbone as a share of ``optimizer.lr``, which the readout has.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.

    Raises:
        ConfigError: a setting is out of its range, or contradicts another.
    """

    kind = "value"
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        backbone: BackboneConfig,
        values: int = 1,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        pool: Pooling = "mean",
        rc: Strand = "augment",
        dropout: float = 0.0,
        init_from: str | None = None,
        freeze: int = 0,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        layer_decay: float = 1.0,
        backbone_lr: float = 1.0,
        compile: bool = False,
    ) -> None:
        super().__init__(
            backbone, values, optimizer, schedule, pool, rc, dropout, init_from, freeze, lora_rank, lora_alpha,
            layer_decay, backbone_lr, compile,
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("deviation", torch.ones(values))

    def check_data(self, data: Any) -> None:
        super().check_data(data)
        if self.trainer.state.fn == "fit" and not self.trainer.ckpt_path:
            self.mean.copy_(torch.tensor(data.label_names.mean))
            self.deviation.copy_(torch.tensor(data.label_names.deviation))

    def scaled(self, labels: Tensor) -> Tensor:
        return (labels - self.mean) / self.deviation

    def nats(self, outputs: Float[Tensor, "s y"], labels: Tensor) -> tuple[Tensor, Tensor]:
        known = labels.isfinite()
        target = torch.where(known, labels, 0).to(outputs.dtype)
        return (outputs - target) ** 2 / 2 + math.log(2 * math.pi) / 2, known.to(outputs.dtype)

    def answers(self, outputs: Float[Tensor, "s y"]) -> Float[Tensor, "s y"]:
        return outputs * self.deviation + self.mean
