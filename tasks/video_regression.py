"""VideoRegression: which value, or values, has a video? Also: learn another model's features of it."""

from __future__ import annotations

from typing import Any, Literal

import torch

from seqlong.backbone import BackboneConfig
from seqlong.errors import ConfigError
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.regression import SequenceRegression
from seqlong.tasks.video_classification import check_patches, needs_patches


class VideoRegression(SequenceRegression):
    """Half the squared error of a clip's values, standardised by their mean and deviation in training.

    With a value for each channel of another model's features (``data.values=FOLDER``) this is distillation. Logs what
    SequenceRegression does: ``val/r2``, ``val/pearson``, ``val/spearman``, ``val/mse`` (of standardised values),
    ``val/bits``.

    Args:
        backbone: the architecture; its ``patches`` must be as large as the data's.
        values: how many a video has.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        pool: from the states of a clip to one: ``mean``, ``last``, ``max`` or ``attentive``.
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
        values: int = 1,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        pool: Literal["mean", "last", "max", "attentive"] = "mean",
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
            backbone, values, optimizer, schedule, pool, "none", dropout, init_from, freeze, lora_rank, lora_alpha,
            layer_decay, backbone_lr, compile,
        )  # fmt: skip
        needs_patches(self)
        assert self.backbone.patch_embedding is not None
        # Patches alone are read; a parameter without a gradient would stop several ranks.
        self.backbone.embedding.requires_grad_(False)
        self.backbone.patch_embedding.requires_grad_(not freeze and not lora_rank)

    def check_data(self, data: Any) -> None:
        """Raise ConfigError unless the data have as many values as the model."""
        if self._sequence is not None:
            raise ConfigError("VideoRegression reads whole clips; set trainer.strategy=auto or ddp")
        if getattr(data, "kind", None) != "value" or not hasattr(data, "tubelets"):
            raise ConfigError(
                "VideoRegression learns values of videos; use data=video with data.values=label, or the folder of a "
                ".npy vector for each video"
            )
        if data.classes != self.outputs:
            raise ConfigError(
                f"the data has {data.classes} values, but the model puts out {self.outputs}; set "
                f"task.values={data.classes}"
            )
        check_patches(self, data)
        if self.trainer.state.fn == "fit" and not self.trainer.ckpt_path:
            self.mean.copy_(torch.tensor(data.label_names.mean))
            self.deviation.copy_(torch.tensor(data.label_names.deviation))
