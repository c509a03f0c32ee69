"""Tasks that predict patches of a video from others: masked, or the ones that come next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchmetrics import MeanMetric

from seqlong.backbone import BackboneConfig, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.fragment import Fragment
from seqlong.metrics import world
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask, check_patches
from seqlong.tasks.experts import PREFIX
from seqlong.tasks.masking import draw
from seqlong.tasks.video_classification import needs_patches

Mask = Literal["row", "clip_row", "tube", "random"]
_MASK = 1 << 41  # names the draw of masks
_MASK_TOKEN = 0  # stands where a patch is hidden


class PatchTask(SequenceTask):
    """Predict patches: ``Σ_i m_i |x_i - f(h_i)|² / (p Σ_i m_i)``, over the positions that count, of all ranks.

    Logs ``train/loss`` and ``val/loss`` (the mean square error of a number of a patch), and ``val/explained``, the part
    of the variance that is explained: 0 where the mean of the patches seen would do as well, 1 where all is right.

    Args:
        backbone: the architecture; its ``patches`` must be as large as the data's.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        normalise: predict each patch less its mean and over its deviation (arXiv 2203.12602): flat patches then count
            as much as rich ones.
        carry_state: start each row from the state that its window before left, without gradients across.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.
    """

    targets = "label"  # type: ignore[assignment]

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: Optimizer,
        schedule: Schedule,
        normalise: bool,
        carry_state: bool,
        compile: bool,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, True, 0.0, carry_state, compile)
        needs_patches(self)
        self.normalise = normalise
        width = self.backbone.embedding.embedding_dim
        size = int(self.backbone.patch_embedding.size)  # type: ignore[union-attr, arg-type]
        self.to_patch = nn.Linear(width, size)
        # The first guess is the mean of all patches; see PatchEmbedding for why the scale is small.
        nn.init.zeros_(self.to_patch.bias)
        nn.init.normal_(self.to_patch.weight, std=0.02)
        for part in ("val", "test"):
            for name in ("error", "power"):
                self.add_module(f"{part}_{name}", MeanMetric())

    def aims(self, batch: SequenceBatch) -> tuple[SequenceBatch, Float[Tensor, "b t p"], Bool[Tensor, "b t"]]:
        """What the model sees, what each position is to predict, and which positions count."""
        raise NotImplementedError(f"{type(self).__name__} must define aims(batch)")

    def setup(self, stage: str) -> None:
        """Check that the data's patches are the model's."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_patches(self, data)

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        if batch.patches is None or batch.positions is None or batch.index is None:
            raise ConfigError(
                f"{type(self).__name__} needs batches of patches with positions; use a data group of video"
            )
        return batch

    def predicted(self, batch: SequenceBatch) -> Float[Tensor, "b t p"]:
        """What the model makes of a batch as it is to see it."""
        return self.to_patch(self.backbone(batch).hidden).float()

    def _errors(self, batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor, BackboneOutput, Fragment | None]:
        """Squared error and power of what is predicted, per position ``(b t)``, which count, what the backbone gave,
        and of which part of the rows all of it is."""
        shown, aim, counted = self.aims(self.prepare(batch))  # of whole rows: what comes next may be another's part
        shown = self._own(shown)
        if shown.fragment is not None:
            aim, counted = shown.fragment.own(aim), shown.fragment.own(counted)
        aim = aim.float()
        if self.normalise:
            mean, variance = aim.mean(dim=-1, keepdim=True), aim.var(dim=-1, keepdim=True)
            aim = (aim - mean) / (variance + 1e-6).sqrt()
        output = self._run(shown) if self.training else self.backbone(shown)  # a carried state is training's
        guess = self.to_patch(output.hidden).float()
        return (guess - aim).square().mean(-1), aim.square().mean(-1), counted, output, shown.fragment

    def objective(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to go backwards from, and the figures of this rank."""
        error, _, counted, output, _ = self._errors(batch)
        ranks = world()[1]
        totals = torch.stack([counted.sum().float(), torch.full((), float(counted.numel()), device=error.device)])
        if ranks > 1:
            dist.all_reduce(totals)
        total, positions = totals.clamp(min=1)
        loss = (error * counted).sum() * ranks / total
        aux = {}
        for name, value in output.aux.items():
            if name.endswith("_sum"):
                name, value = name.removesuffix("_sum"), value * ranks / positions
            if not name.startswith(PREFIX):
                aux[f"aux_{name}"] = value.detach()
            if name.endswith("_loss"):
                loss = loss + value
        if self.training:
            self.experts.add(output.aux)
        # In bits of a normal distribution of deviation 1 about the guess, so that curves of tasks look alike.
        nats = ((error.detach() + math.log(2 * math.pi)) / 2 * counted).sum(dtype=torch.float64)
        return loss, {"nats": nats, "count": counted.sum(), **aux}

    def _evaluate(self, batch: SequenceBatch, part: str) -> dict[str, Tensor]:
        error, power, counted, _, here = self._errors(batch)
        of_error, of_power = self.get_submodule(f"{part}_error"), self.get_submodule(f"{part}_power")
        weight = counted.float()
        of_error.update(error, weight)  # type: ignore[operator]
        of_power.update(power, weight)  # type: ignore[operator]
        self.log(f"{part}/loss", of_error, on_step=False, on_epoch=True, batch_size=batch.shape[0])  # type: ignore[arg-type]
        said = {"error": error, "power": power, "counted": counted}
        return said if here is None else {name: here.join(value) for name, value in said.items()}

    def on_validation_epoch_end(self) -> None:
        """The share of the variance that is explained."""
        self._log_explained("val")

    def on_test_epoch_end(self) -> None:
        """The share of the variance that is explained."""
        self._log_explained("test")

    def _log_explained(self, part: str) -> None:
        error, power = (self.get_submodule(f"{part}_{name}").compute() for name in ("error", "power"))  # type: ignore[operator]
        self.log(f"{part}/explained", 1 - error / power.clamp(min=1e-9))
        self.get_submodule(f"{part}_power").reset()  # type: ignore[operator]

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """Predicted patches.

        Returns:
            ``patches`` ``(b t p)``, ``counted`` ``(b t)``: where the task asked for them; ``index``, ``source``.
        """
        if self._sequence is not None:
            raise ConfigError("predict writes rows that one process holds; set trainer.strategy=auto or ddp")
        shown, _, counted = self.aims(self.prepare(batch))
        assert batch.index is not None
        return {
            "patches": self.predicted(shown).cpu(),
            "counted": counted.cpu(),
            "index": batch.index.cpu(),
            "source": batch.source or [""] * batch.shape[0],
        }


class MaskedVideo(PatchTask):
    """Guess hidden patches from those that are seen: their pixels, with the mean square error.

    Which are hidden depends on (seed, sample number, place) only. ``row`` hides whole rows of a picture, others
    in each step of time: what is left keeps a one-dimensional model's neighbours together. In VideoMamba's ablation
    (arXiv 2403.06977) tubes, a Transformer's usual choice, served a state space worst of all.

    Args:
        backbone: the architecture; mixers should see both sides (Bidirectional, or attention with causal false).
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        mask: ``row``: rows of each picture; ``clip_row``: the same rows in all pictures of a clip; ``tube``: the same
            places in all; ``random``: single patches.
        rate: share of patches to hide, above 0 and below 1.
        normalise: predict each patch less its mean and over its deviation.
        seed: names the draw.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        mask: Mask = "row",
        rate: float = 0.6,
        normalise: bool = False,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, normalise, False, compile)
        if not 0 < rate < 1:
            raise ConfigError(f"MaskedVideo: rate {rate} must lie between 0 and 1")
        self.mask, self.rate, self.seed = mask, rate, seed

    def aims(self, batch: SequenceBatch) -> tuple[SequenceBatch, Float[Tensor, "b t p"], Bool[Tensor, "b t"]]:
        assert batch.patches is not None and batch.positions is not None and batch.index is not None
        hidden = hide(batch.index, batch.positions, self.mask, self.rate, self.seed)
        if batch.segment_ids is not None:
            hidden = hidden & (batch.segment_ids != 0)
        tokens = torch.where(hidden, _MASK_TOKEN, -1)
        return dataclasses.replace(batch, tokens=tokens), batch.patches, hidden


def hide(
    index: Int[Tensor, "b"], positions: Int[Tensor, "b t 3"], mask: Mask, rate: float, seed: int = 0
) -> Bool[Tensor, "b t"]:
    """Which patches are hidden: a pure function of (seed, sample, place).

    Args:
        index: sample numbers.
        positions: time, height and width of each patch.
        mask: what is hidden together; see ``MaskedVideo``.
        rate: share of what is hidden.
        seed: names the draw.
    """
    time, row, column = positions.unbind(-1)
    wide = 1 << 20  # more than any picture has patches along a side
    together: Callable[[], Tensor] = {
        "row": lambda: time * wide + row,
        "clip_row": lambda: row,
        "tube": lambda: row * wide + column,
        "random": lambda: (time * wide + row) * wide + column,
    }[mask]
    # Drawn a row of samples at a time: ``draw`` hashes the sample's number with the place.
    bits = torch.cat([draw(seed, _MASK, index[n : n + 1], place[None]) for n, place in enumerate(together())])
    return bits < round(rate * (1 << 53))


class VideoPrediction(PatchTask):
    """Predict what comes next, from each patch and those before it: the one at its place ``ahead`` steps of time later,
    or the next one of the row.

    Args:
        backbone: the architecture. Every mixer must be causal.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        ahead: steps of time (a step is a tubelet's frames); 0 for the next patch of the row.
        normalise: predict each patch less its mean and over its deviation.
        carry_state: start each row from the state that its window before left, without gradients across. The data must
            be ordered for it, as data.order=stream is.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.

    Raises:
        ConfigError: a setting is out of its range, or a mixer sees later patches.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        ahead: int = 1,
        normalise: bool = False,
        carry_state: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, normalise, carry_state, compile)
        if ahead < 0:
            raise ConfigError(f"VideoPrediction: ahead {ahead} must be 0 or more")
        for number, block in enumerate(self.backbone.blocks, 1):
            if not block.mixer.causal:  # type: ignore[union-attr]
                raise ConfigError(
                    f"VideoPrediction predicts what comes, but block {number} ({type(block.mixer).__name__}) sees it; "
                    "make every mixer causal, or use task=masked_video"
                )
        self.ahead = ahead
        self.backbone.embedding.requires_grad_(False)  # patches alone are read

    def aims(self, batch: SequenceBatch) -> tuple[SequenceBatch, Float[Tensor, "b t p"], Bool[Tensor, "b t"]]:
        assert batch.patches is not None and batch.positions is not None
        length = batch.shape[1]
        real = torch.ones(batch.shape, dtype=torch.bool, device=batch.patches.device)
        if batch.segment_ids is not None:
            real = batch.segment_ids != 0
        by = min(1 if self.ahead == 0 else self._step(batch.positions[real.sum(dim=1).argmax()]) * self.ahead, length)
        aim = torch.cat([batch.patches[:, by:], torch.zeros_like(batch.patches[:, :by])], dim=1)
        there = torch.zeros_like(real)
        there[:, : length - by] = real[:, by:]
        if self.ahead:
            now, then = batch.positions[:, : length - by], batch.positions[:, by:]
            same = (now[..., 1:] == then[..., 1:]).all(dim=-1) & (then[..., 0] - now[..., 0] == self.ahead)
            there[:, : length - by] &= same
        return batch, aim, real & there

    @staticmethod
    def _step(positions: Tensor) -> int:
        """How far apart in a row two patches stand that follow each other at one place."""
        first = positions[0]
        after = ((positions[:, 1:] == first[1:]).all(dim=1) & (positions[:, 0] == first[0] + 1)).nonzero()
        return int(after[0]) if len(after) else len(positions)
