"""VideoClassification: which class is a clip, or each of its frames, of?"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from seqlong.backbone import BackboneConfig, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.heads import LanguageHead
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask, check_patches
from seqlong.tasks.finetune import freeze_blocks, load_backbone, scale_by_depth
from seqlong.tasks.masking import draw

_HIDE = 1 << 40  # names the draw of hidden patches


class VideoClassification(SequenceTask):
    """``-ln p(label | clip)`` where the data has a label: at the last patch of a clip, or of each frame.

    Logs what every task does (bits of a label, accuracy). Where a video is seen in several clips or crops
    (``data.views``), the probabilities of all are averaged: ``val/video_accuracy``.

    Args:
        backbone: the architecture; its ``patches`` must be as large as the data's.
        classes: labels are below this.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        pool: ``mean`` of the hidden states of the clip, or the ``last`` one, which has seen all of it where mixers are
            causal. Labels of frames need ``last``.
        drop: share of patches that training hides (replaced by nothing: zeros), a cheap augmentation.
        carry_state: start each row from the state that its window before left, without gradients across. The data must
            be ordered for it, as data.order=stream is.
        init_from: checkpoint file or run folder of any task of ours, whose backbone training starts from; null: from
            nothing.
        freeze: first blocks that stay as they are, the embedding with them; -1: the whole backbone.
        layer_decay: learning rate of a block as a share of that of the block above it.
        backbone_lr: learning rate of the backbone as a share of ``optimizer.lr``, which the head has.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.

    Raises:
        ConfigError: a setting is out of its range, or the model reads no patches.
    """

    targets = "label"  # type: ignore[assignment]

    def __init__(
        self,
        backbone: BackboneConfig,
        classes: int,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        pool: Literal["mean", "last"] = "mean",
        drop: float = 0.0,
        carry_state: bool = False,
        init_from: str | None = None,
        freeze: int = 0,
        layer_decay: float = 1.0,
        backbone_lr: float = 1.0,
        compile: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, False, 0.0, carry_state, compile)
        if classes < 2:
            raise ConfigError(f"task.classes must be 2 or more, found {classes}")
        if not 0 <= drop < 1:
            raise ConfigError(f"task.drop must be 0 or more and below 1, found {drop}")
        needs_patches(self)
        self.head = LanguageHead(self.backbone.embedding.embedding_dim, classes)
        self.classes, self.pool, self.drop = classes, pool, drop
        # Patches alone are read, and a parameter without a gradient would stop several ranks.
        self.backbone.embedding.requires_grad_(False)
        freeze_blocks(self.backbone, freeze)
        if freeze:
            self.backbone.patch_embedding.requires_grad_(False)  # type: ignore[union-attr]
        self.init_from, self.layer_decay, self.backbone_lr = init_from, layer_decay, backbone_lr
        for part in ("val", "test"):
            self.add_module(f"{part}_videos", VideoAccuracy(classes))
        self.views = 1

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        if batch.patches is None or batch.targets is None:
            raise ConfigError(f"{type(self).__name__} needs batches with patches and labels; use a data group of video")
        if not self.training or not self.drop:
            return batch
        assert batch.index is not None
        steps = torch.arange(batch.shape[1], device=batch.patches.device)
        hidden = draw(_HIDE, 0, batch.index, steps) < round(self.drop * (1 << 53))
        return dataclasses.replace(batch, patches=batch.patches.masked_fill(hidden[..., None], 0))

    def setup(self, stage: str) -> None:
        """Check that the data has labels, and as many classes as the model; take the weights of ``init_from``.

        Raises:
            ConfigError: it has not.
            CheckpointError: ``init_from`` does not fit.
        """
        if stage == "fit" and self.init_from and not self.trainer.ckpt_path:
            load_backbone(self.backbone, self.init_from)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        if getattr(data, "kind", "class") != "class":
            raise ConfigError("VideoClassification learns classes, but data.values gives numbers; use VideoRegression")
        found, classes = getattr(data, "targets", None), getattr(data, "classes", self.classes)
        if found != "label":
            raise ConfigError(f"{type(self).__name__} learns labels of videos, but the data's targets are '{found}'")
        if classes > self.classes:
            raise ConfigError(
                f"the data has {classes} classes, but the model {self.classes}; set task.classes={classes}"
            )
        check_patches(self, data)
        self.views = int(getattr(data, "views", 1))

    def configure_optimizers(self) -> Any:
        """AdamW with a learning rate for each depth, and its schedule."""
        made = super().configure_optimizers()
        if self.layer_decay == 1 and self.backbone_lr == 1:
            return made
        optimizer = made["optimizer"]
        for group in optimizer.param_groups:
            group["lr"] = self.optimizer_settings.lr  # which the schedule has multiplied already
            group.pop("initial_lr", None)
        scale_by_depth(optimizer, self.backbone, self.layer_decay, self.backbone_lr)
        schedule = self.schedule.build(optimizer, self.trainer.max_steps if self.trainer.max_steps > 0 else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _run(self, batch: SequenceBatch) -> BackboneOutput:
        output = super()._run(batch)
        output.hidden = self.pooled(output.hidden, batch)
        return output

    def pooled(self, hidden: Float[Tensor, "b t d"], batch: SequenceBatch) -> Float[Tensor, "b t d"]:
        """Hidden states with the mean of each clip where its label stands."""
        if self.pool == "last":
            return hidden
        assert batch.targets is not None
        if batch.segment_ids is None and batch.fragment is None:
            mean = hidden.mean(dim=1, keepdim=True)
        else:
            real = torch.ones_like(batch.targets) if batch.segment_ids is None else (batch.segment_ids != 0).long()
            total, count = (hidden * real[..., None]).sum(dim=1), real.sum(dim=1).to(hidden.dtype)
            if batch.fragment is not None:  # the clip goes on with other processes
                total, count = (batch.fragment.gather(value).sum(dim=0) for value in (total, count))
            mean = (total / count.clamp(min=1)[:, None])[:, None]
        return torch.where((batch.targets >= 0)[..., None], mean, hidden)

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "b t y"]:
        """Logits of every position, float32; those of a clip stand where its label does."""
        return self.head.logits(self.pooled(self.backbone(batch).hidden, batch))

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """Log-probabilities of each clip's classes.

        Returns:
            ``log_probabilities`` ``(b y)`` float32, of the clip, whether its label is known or not; ``label`` ``(b)``,
            -1 where unknown; ``index`` ``(b)``; ``source``. All on the CPU, without rows that only fill up a batch.
        """
        rows, length = batch.shape
        if self._sequence is not None:
            raise ConfigError("predict writes rows that one process holds; set trainer.strategy=auto or ddp")
        assert batch.targets is not None
        last = torch.full((rows,), length - 1) if batch.segment_ids is None else (batch.segment_ids != 0).sum(1) - 1
        last = last.to(batch.targets.device).clamp(min=0)[:, None]
        asked = torch.zeros_like(batch.targets).scatter(1, last, 1)
        known = batch.targets.gather(1, last)[:, 0]
        logits = self(dataclasses.replace(batch, targets=asked - 1))
        chosen = logits.gather(1, last[..., None].expand(-1, -1, logits.shape[-1]))[:, 0].log_softmax(dim=-1)
        index = torch.arange(rows) if batch.index is None else batch.index.cpu()
        kept = index >= 0
        source = batch.source or [""] * rows
        return {
            "log_probabilities": chosen.cpu()[kept],
            "label": known.cpu()[kept],
            "index": index[kept],
            "source": [text for text, keep in zip(source, kept.tolist(), strict=True) if keep],
        }

    def _evaluate(self, batch: SequenceBatch, part: str) -> dict[str, Tensor]:
        batch = self._own(self.prepare(batch))
        assert batch.targets is not None
        hidden = self.pooled(self.backbone(batch).hidden, batch)
        counted = batch.targets >= 0
        bits, accuracy = self.get_submodule(f"{part}_bits"), self.get_submodule(f"{part}_accuracy")
        nll, predicted = self.head.loss(hidden, batch.targets), self.head.most_likely(hidden)
        bits.update(nll, counted)  # type: ignore[operator]
        accuracy.update(predicted, batch.targets, counted)  # type: ignore[operator]
        figures = [("bits", bits), ("accuracy", accuracy)]
        if self.views > 1 and batch.index is not None:
            videos = self.get_submodule(f"{part}_videos")
            place = batch.targets.argmax(dim=1, keepdim=True)
            chosen = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
            label = batch.targets.gather(1, place)[:, 0]
            videos.update(  # type: ignore[operator]
                self.head.logits(chosen)[:, 0].softmax(dim=-1),
                label,
                torch.where(label >= 0, batch.index // self.views, -1),
            )
            figures.append(("video_accuracy", videos))
        for name, metric in figures:
            self.log(f"{part}/{name}", metric, on_step=False, on_epoch=True, batch_size=batch.shape[0])  # type: ignore[arg-type]
        said = {"nll": nll, "right": predicted == batch.targets, "counted": counted, "targets": batch.targets}
        return said if batch.fragment is None else {name: batch.fragment.join(value) for name, value in said.items()}


class VideoAccuracy(Metric):
    """Share of videos whose class is the most likely one by the mean probability of all their clips, over all ranks."""

    full_state_update = False
    higher_is_better = True
    probabilities: list[Tensor]
    labels: list[Tensor]
    videos: list[Tensor]

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        for name in ("probabilities", "labels", "videos"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Float[Tensor, "b y"], labels: Int[Tensor, "b"], videos: Int[Tensor, "b"]) -> None:
        """Add clips.

        Args:
            probabilities: of each class.
            labels: the right ones.
            videos: number of the video that each clip is of; negative for a row that counts for nothing.
        """
        self.probabilities.append(probabilities.float())
        self.labels.append(labels)
        self.videos.append(videos)

    def compute(self) -> Tensor:
        """A share from 0 to 1; NaN when nothing was counted."""
        if isinstance(self.videos, Tensor):
            parts = self.probabilities, self.labels, self.videos
        else:
            parts = torch.cat(self.probabilities), torch.cat(self.labels), torch.cat(self.videos)
        probabilities, labels, videos = parts
        kept = videos >= 0
        if not bool(kept.any()):
            return torch.full((), float("nan"), device=videos.device)
        _, number = videos[kept].unique(return_inverse=True)
        count = int(number.max()) + 1
        sums = probabilities.new_zeros(count, self.classes).index_add_(0, number, probabilities[kept])
        right = labels.new_zeros(count).scatter_(0, number, labels[kept])
        return (sums.argmax(dim=1) == right).float().mean()


def needs_patches(task: SequenceTask) -> None:
    """Raise ConfigError unless the task's model reads patches."""
    if task.backbone.patch_embedding is None:
        raise ConfigError(
            f"{type(task).__name__} reads patches, but the model embeds tokens only; take a model of video (model="
            "video_small), or set model.backbone.patches={class_path: seqlong.embeddings.PatchEmbedding, init_args: "
            "{size: N}}"
        )
