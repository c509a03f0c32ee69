"""SequenceClassification: which class is a sequence of, or which labels has it?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from seqlong.backbone import BackboneConfig
from seqlong.errors import ConfigError
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.labelled import LabelledTask, Strand
from seqlong.tasks.pooling import Pooling


class SequenceClassification(LabelledTask):
    """``-ln p(class | sequence)``, or, with ``several``, ``-ln p(label | sequence)`` of each label alone.

    Args:
        backbone: the architecture.
        classes: classes, or labels; the data must have as many.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        several: whether a sequence may have several labels, or none (data.labels=multilabel).
        pool: from the states of a sequence to one: ``mean``; ``last``, which has seen all where mixers are causal;
            ``max``; ``attentive``, a learnt weighting; ``places``, a learnt weight for each place, for sequences that
            are aligned (around a start or a splice site); ``echo``: the sequence is read twice and the second copy's
            mean taken, so that causal mixers see it whole from everywhere.
        rc: what to do about the other strand. ``none``: nothing, as RNA or codons want. ``augment``: training turns
            half of the sequences. ``average``: that, and answers are means over both strands, at twice the work.
            ``equivariant``: the backbone reads both with the same weights, and answers are the same for either.
        label_smoothing: share of the target that goes to all classes alike, in training.
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

    def __init__(
        self,
        backbone: BackboneConfig,
        classes: int = 2,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        several: bool = False,
        pool: Pooling = "mean",
        rc: Strand = "augment",
        label_smoothing: float = 0.0,
        dropout: float = 0.0,
        init_from: str | None = None,
        freeze: int = 0,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        layer_decay: float = 1.0,
        backbone_lr: float = 1.0,
        compile: bool = False,
    ) -> None:
        self.kind = "multilabel" if several else "class"
        if classes < 2 and not several:
            raise ConfigError(f"task.classes must be 2 or more, found {classes}")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing} must be 0 or more and below 1")
        super().__init__(
            backbone, classes, optimizer, schedule, pool, rc, dropout, init_from, freeze, lora_rank, lora_alpha,
            layer_decay, backbone_lr, compile,
        )  # fmt: skip
        self.label_smoothing = label_smoothing

    def nats(self, outputs: Float[Tensor, "s y"], labels: Tensor) -> tuple[Tensor, Tensor]:
        smooth = self.label_smoothing if self.training else 0.0
        if self.kind == "class":
            target = labels[:, 0]
            loss = functional.cross_entropy(outputs, target, ignore_index=-1, reduction="none", label_smoothing=smooth)
            return loss, (target >= 0).to(outputs.dtype)
        known = labels.isfinite()
        target = torch.where(known, labels, 0).to(outputs.dtype) * (1 - smooth) + smooth / 2
        loss = functional.binary_cross_entropy_with_logits(outputs, target, reduction="none")
        return loss, known.to(outputs.dtype)

    def answers(self, outputs: Float[Tensor, "s y"]) -> Float[Tensor, "s y"]:
        return outputs.softmax(dim=1) if self.kind == "class" else outputs.sigmoid()
