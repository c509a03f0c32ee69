"""VideoTokenizer: patches of a video to whole numbers and back, by finite scalar quantisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from seqlong.batch import SequenceBatch
from seqlong.embeddings import PatchEmbedding
from seqlong.errors import ConfigError
from seqlong.optim import Optimizer, Schedule

#: Steps of time behind it that each block sees.
BEHIND = 2
FLOORS = ("mean_frame", "patch_mean")


class FSQ(nn.Module):
    """Finite scalar quantisation: ``y = tanh z``; ``q = ⌊L (y + 1) / 2⌋``, one of L numbers; ``ŷ = (2 q + 1) / L - 1``.

    Gradients go through as if ŷ were y. There is no codebook to collapse: the code is ``Σ_i q_i Π_{j<i} L_j``.
    (arXiv 2309.15505, which rounds to integers; here all L stretches of y are equally wide, for odd and even L.)

    Args:
        levels: L of each channel.

    Raises:
        ConfigError: no levels, fewer than 2 of one, or more codes than four bytes tell apart.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2 or math.prod(levels) >= 1 << 32:
            raise ConfigError(f"task.levels {list(levels)}: expected numbers of 2 or more, whose product is below 2^32")
        self.levels, self.codes = tuple(levels), math.prod(levels)
        basis = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("steps", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        self.steps: Tensor
        self.basis: Tensor

    def forward(self, z: Float[Tensor, "*s l"]) -> tuple[Float[Tensor, "*s l"], Int[Tensor, "*s"]]:
        """Quantised values and codes."""
        y = z.float().tanh()
        q = (self.steps * (y + 1) / 2).floor().clamp(min=0).minimum(self.steps - 1)
        near = (2 * q + 1) / self.steps - 1
        return y + (near - y).detach(), (q.detach().long() * self.basis).sum(dim=-1)

    def values(self, codes: Int[Tensor, "*s"]) -> Float[Tensor, "*s l"]:
        """The quantised values that codes stand for."""
        q = codes[..., None] // self.basis % self.steps
        return (2 * q + 1).float() / self.steps - 1


class GridBlock(nn.Module):
    """``x + conv(norm x)``, then ``x + W_down gelu(W_up norm x)``.

    The convolution is depthwise: 3 x 3 in each picture, then ``Σ_k w_k x_{n-k}`` over a step and the two before it.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.picture = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.times = nn.Parameter(torch.randn(BEHIND + 1, width) / math.sqrt(BEHIND + 1))
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Float[Tensor, "b n y x d"]) -> Float[Tensor, "b n y x d"]:
        rows, steps = x.shape[:2]
        seen = self.picture(self.before(x).flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, (rows, steps))
        behind = F.pad(seen, (0, 0, 0, 0, 0, 0, BEHIND, 0))
        x = x + sum(weight * behind[:, BEHIND - k : BEHIND - k + steps] for k, weight in enumerate(self.times))
        return x + self.feed(self.after(x))


class VideoTokenizer(LightningModule):
    """``x̂ = decode(FSQ(encode(x)))`` on the grid of a clip's patches: one code a patch; mean square error of pixels.

    Encoder and decoder are ``blocks`` blocks between linear maps; they look ``2 blocks`` steps of time back and none
    ahead, so that a video in pieces, each with that many steps before it, has the codes of the whole.

    Logs ``train/loss``; in evaluation ``val/loss`` (mean square error of normalised pixels) and ``val/psnr`` (decibels,
    ``-10 lg`` of the mean square error in parts of 255). Beside it stand two floors, ``val/psnr_mean_frame`` (each
    clip's mean frame) and ``val/psnr_patch_mean`` (each patch's mean colour, 24 bits a patch), what a code costs
    (``val/bits_a_patch``), and the share of the codes that came up (``val/codes_used``).

    Args:
        size: numbers of a patch: frames x height x width x 3 of data.tubelets.
        levels: of FSQ: ``[8, 5, 5, 5]`` has 1,000 codes, 10 bits.
        width: channels.
        blocks: of the encoder, and of the decoder.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.

    Raises:
        ConfigError: a setting is out of its range.
    """

    targets = "label"

    def __init__(
        self,
        size: int,
        levels: list[int] | None = None,
        width: int = 64,
        blocks: int = 2,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if size < 1 or width < 1 or blocks < 1:
            raise ConfigError(f"task.size {size}, task.width {width} and task.blocks {blocks} must be 1 or more")
        self.size, self.blocks = size, blocks
        self.fsq = FSQ([8, 5, 5, 5] if levels is None else levels)
        count = len(self.fsq.levels)
        self.enter, self.leave = PatchEmbedding(width, size), nn.Linear(width, size)
        self.encoder = nn.ModuleList(GridBlock(width) for _ in range(blocks))
        self.decoder = nn.ModuleList(GridBlock(width) for _ in range(blocks))
        self.narrow = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, count))
        self.widen, self.last = nn.Linear(count, width), nn.RMSNorm(width)
        self.optimizer_settings, self.schedule = optimizer, schedule
        self.deviation, self.mean = 0.25, 0.45  # of pixels; the data's own, from ``setup``
        for part in ("val", "test"):
            for name in ("error", "pixel", *FLOORS):
                self.add_module(f"{part}_{name}", MeanMetric())
        self.register_buffer("used", torch.zeros(self.fsq.codes, dtype=torch.bool), persistent=False)
        self.used: Tensor

    @property
    def context(self) -> int:
        """Steps of time before a patch that its code depends on."""
        return BEHIND * self.blocks

    # --- the model -----------------------------------------------------------------------------------------------

    def encode(self, grid: Float[Tensor, "b n y x p"]) -> tuple[Float[Tensor, "b n y x l"], Int[Tensor, "b n y x"]]:
        """Quantised values and codes of patches on their grid of time, height and width."""
        x = self.enter(grid.flatten(1, 3)).unflatten(1, grid.shape[1:4])
        for block in self.encoder:
            x = block(x)
        return self.fsq(self.narrow(x))

    def decode(self, values: Float[Tensor, "b n y x l"]) -> Float[Tensor, "b n y x p"]:
        """Patches of quantised values."""
        x = self.widen(values)
        for block in self.decoder:
            x = block(x)
        return self.leave(self.last(x)).float()

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "b n y x p"]:
        """Patches as they come back."""
        return self.decode(self.encode(on_grid(batch))[0])

    def setup(self, stage: str) -> None:
        """Check that the data's patches are the model's.

        Raises:
            ConfigError: they are not, or rows are shared among processes.
        """
        data = getattr(self.trainer, "datamodule", None)
        tubelets = getattr(data, "tubelets", None)
        if getattr(self.trainer.strategy, "sequence", None) is not None:
            raise ConfigError("VideoTokenizer reads whole clips; set trainer.strategy=auto or ddp")
        if data is not None and tubelets is None:
            raise ConfigError("VideoTokenizer needs a data group of video, whose clips are cut into patches")
        if tubelets is not None and tubelets.size != self.size:
            raise ConfigError(
                f"data.tubelets of {tubelets.time} x {tubelets.height} x {tubelets.width} x 3 are patches of "
                f"{tubelets.size} numbers, but the tokenizer's are of {self.size}; set task.size={tubelets.size}"
            )
        if tubelets is not None and tubelets.order != "space":
            raise ConfigError("VideoTokenizer reads patches picture by picture; set data.tubelets.order=space")
        if tubelets is not None:
            self.mean, self.deviation = tubelets.mean, tubelets.deviation

    # --- training ------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Make Lightning write its rows at the right steps: the count that it decides by is wrong after a resume."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Mean square error of the patches of a batch."""
        grid, real = on_grid(batch), real_steps(batch)
        error = (self.decode(self.encode(grid)[0]) - grid).square().mean(dim=(2, 3, 4))
        loss = (error * real).sum() / real.sum().clamp(min=1)
        self.log("train/loss", loss.detach(), batch_size=batch.shape[0])
        self.log("train/length", float(batch.shape[1]), batch_size=batch.shape[0])
        self.log("lr", float(self.trainer.optimizers[0].param_groups[0]["lr"]), batch_size=batch.shape[0])
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, and its schedule, which moves on with each optimiser step."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = self.optimizer_settings.build(self, fused=self.device.type == "cuda" and not scaled)
        schedule = self.schedule.build(optimizer, self.trainer.max_steps if self.trainer.max_steps > 0 else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- evaluation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Errors of a batch, and of the floors."""
        self._evaluate(batch, "val")

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Errors of a batch, and of the floors."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: SequenceBatch, part: Literal["val", "test"]) -> None:
        grid, real = on_grid(batch), real_steps(batch)
        values, codes = self.encode(grid)
        made = self.decode(values)
        self.used[codes[real]] = True
        weight = real.float()
        count = weight.sum(dim=1).clamp(min=1)[:, None, None, None, None]
        frame = (grid * weight[..., None, None, None]).sum(dim=1, keepdim=True) / count
        patch = grid.unflatten(-1, (-1, 3)).mean(dim=-2, keepdim=True)
        guesses = {
            "pixel": made,
            "mean_frame": frame.expand_as(grid),
            "patch_mean": patch.expand(*grid.shape[:-1], grid.shape[-1] // 3, 3).flatten(-2),
        }
        self.get_submodule(f"{part}_error").update((made - grid).square().mean(dim=(2, 3, 4)), weight)  # type: ignore[operator]
        for name, guess in guesses.items():
            error = (self._bytes(guess) - self._bytes(grid)).square().mean(dim=(2, 3, 4))
            self.get_submodule(f"{part}_{name}").update(error, weight)  # type: ignore[operator]

    def _bytes(self, patches: Tensor) -> Tensor:
        """Pixels in parts of 1, as eight bits tell them."""
        return (patches.float() * self.deviation + self.mean).mul(255).round().clamp(0, 255) / 255

    def on_validation_epoch_end(self) -> None:
        """PSNR beside the floors."""
        self._log_figures("val")

    def on_test_epoch_end(self) -> None:
        """PSNR beside the floors."""
        self._log_figures("test")

    def _log_figures(self, part: str) -> None:
        for name, said in (("error", "loss"), ("pixel", "psnr"), *((name, f"psnr_{name}") for name in FLOORS)):
            metric = self.get_submodule(f"{part}_{name}")
            value = metric.compute()  # type: ignore[operator]
            self.log(f"{part}/{said}", value if said == "loss" else psnr(value))
            metric.reset()  # type: ignore[operator]
        self.log(f"{part}/bits_a_patch", math.log2(self.fsq.codes))
        self.log(f"{part}/codes_used", self.used.float().mean(), sync_dist=True, reduce_fx="max")
        self.used.zero_()

    def describe(self) -> dict[str, Any]:
        """The model, for people and for JSON."""
        return {
            "name": type(self).__name__,
            "parameters": sum(weight.numel() for weight in self.parameters()),
            "levels": list(self.fsq.levels),
            "codes": self.fsq.codes,
            "context": self.context,
        }


def on_grid(batch: SequenceBatch) -> Float[Tensor, "b n y x p"]:
    """The patches of a batch on their grid.

    Raises:
        ConfigError: it has none.
    """
    if batch.patches is None or batch.positions is None or batch.positions.dim() != 3:
        raise ConfigError("VideoTokenizer needs batches of patches with positions; use a data group of video")
    _, high, wide = (int(n) + 1 for n in batch.positions.flatten(0, 1).max(dim=0).values)
    return batch.patches.unflatten(1, (-1, high, wide))


def real_steps(batch: SequenceBatch) -> Tensor:
    """``(b n)`` which steps of time are no padding."""
    grid = on_grid(batch)
    if batch.segment_ids is None:
        return torch.ones(grid.shape[:2], dtype=torch.bool, device=grid.device)
    return batch.segment_ids.unflatten(1, grid.shape[1:4])[..., 0, 0] != 0


def psnr(error: Tensor) -> Tensor:
    """Decibels of a mean square error of pixels from 0 to 1."""
    return -10 * error.clamp(min=1e-10).log10()
