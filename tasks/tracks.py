"""TrackPrediction: what was measured along a genome, bin by bin, from its bases on both strands."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import Metric

from seqlong.backbone import BackboneConfig, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError, DataError
from seqlong.metrics import world
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask
from seqlong.tasks.experts import PREFIX
from seqlong.tasks.finetune import freeze_blocks, load_backbone
from seqlong.tracks import TrackBatch, correlations, deviance

#: Which strands a model reads.
Strands = Literal["forward", "both"]
Loss = Literal["poisson", "poisson_multinomial", "squared"]

_SHOWN = 24  # tracks that the log has a line of each for


class TrackPrediction(SequenceTask):
    """Predict k tracks in bins: ``ŷ = softplus(readout(mean of the bin's states))``, in units of the training mean.

    With ``strands=both`` the backbone reads the other strand too, and a bin's states of both go into the readout, in
    both orders, whose results are averaged: ``ŷ_j = (r_j(h, h') + r_swap(j)(h', h)) / 2``. So the other strand gives
    the same answer by construction, turned, and paired tracks swapped; and a causal backbone sees both sides of a bin,
    although a contig may still be run in parts.

    Losses, over bins with a value, y the measured value:

    - ``poisson``: the mean of ``ŷ - y ln ŷ`` (Avsec et al. 2021, doi 10.1038/s41592-021-01252-x).
    - ``poisson_multinomial``: for each row and track with n bins,
      ``(total_weight · (Σŷ - Σy ln Σŷ) - Σ y ln(ŷ / Σŷ)) / n``; of weight 1 it is ``poisson`` (Linder et al. 2025,
      doi 10.1038/s41588-024-02053-6).
    - ``squared``: half the squared error, with ``ŷ`` the readout itself; for values below 0.

    Logs ``bits`` (half the Poisson deviance of a bin; of ``squared``, that loss, over ln 2), ``pearson`` and
    ``spearman`` over all bins, the means over tracks, and of each track as ``val/<track>/spearman``.

    Args:
        backbone: the architecture.
        tracks: how many; the data must have as many.
        bin: bases of a bin, as ``data.bin``.
        loss: ``poisson``, ``poisson_multinomial`` or ``squared``.
        total_weight: weight of a row's total beside its shape, in ``poisson_multinomial``; Borzoi has 0.2.
        strands: ``forward`` reads one strand, ``both`` the other one too (twice the work). A backbone with
            ``rc=equivariant`` reads both by itself.
        width: channels of the readout.
        dropout: share of them that training leaves out.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        init_from: checkpoint or run folder whose backbone training starts from; null: from nothing.
        freeze: first blocks that stay as they are, the embedding with them; -1: the whole backbone.
        compile: compile each block with torch.compile.

    Raises:
        ConfigError: a setting is out of its range.
    """

    targets = "track"  # type: ignore[assignment]
    scale: Tensor
    swap: Tensor
    complement: Tensor

    def __init__(
        self,
        backbone: BackboneConfig,
        tracks: int = 1,
        bin: int = 1,
        loss: Loss = "poisson",
        total_weight: float = 0.2,
        strands: Strands = "both",
        width: int = 128,
        dropout: float = 0.0,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        init_from: str | None = None,
        freeze: int = 0,
        compile: bool = False,
    ) -> None:
        if tracks < 1 or bin < 1 or width < 1:
            raise ConfigError(f"task.tracks={tracks}, task.bin={bin} and task.width={width} must be 1 or more")
        if not 0 <= dropout < 1 or total_weight < 0:
            raise ConfigError(f"task.dropout={dropout} must be below 1, task.total_weight={total_weight} 0 or more")
        super().__init__(backbone, optimizer, schedule, True, 0.0, False, compile)
        d = self.backbone.embedding.embedding_dim
        self.both = strands == "both" or self.backbone.strands is not None
        readout = TrackReadout(d * (2 if self.both else 1), width, tracks, dropout)
        if loss != "squared":
            nn.init.constant_(readout.last.bias, math.log(math.e - 1))  # softplus of it is 1, the mean
        self.head = readout  # type: ignore[assignment]
        self.bin, self.loss_kind, self.total_weight, self.init_from = bin, loss, total_weight, init_from
        self.register_buffer("scale", torch.ones(tracks))
        self.register_buffer("swap", torch.arange(tracks))
        table = list(backbone.complement) + list(range(len(backbone.complement), backbone.vocab_size))
        self.register_buffer("complement", torch.tensor(table[: backbone.vocab_size]), persistent=False)
        freeze_blocks(self.backbone, freeze)
        if self.backbone.patch_embedding is not None:
            self.backbone.patch_embedding.requires_grad_(False)
        for part in ("val", "test"):
            self.add_module(f"{part}_scores", TrackScores(tracks, loss == "squared"))

    # --- the model -----------------------------------------------------------------------------------------------

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "b n k"]:
        """Predictions of every bin, float32, in units of the training mean."""
        return self._read(batch)[0]

    def _read(self, batch: SequenceBatch) -> tuple[Float[Tensor, "b n k"], BackboneOutput]:
        output = self.backbone(batch)
        if self.backbone.strands is not None:
            forth, back = (self.pooled(part) for part in output.hidden.chunk(2, dim=-1))
            return self.answers(forth, back), output
        forth = self.pooled(output.hidden)
        if not self.both:
            return self.answers(forth), output
        assert batch.tokens is not None
        place = mirrored(batch.segment_ids, *batch.shape, batch.tokens.device)
        turned = self.complement[batch.tokens.gather(1, place)]
        other = self.backbone(dataclasses.replace(batch, tokens=turned))
        states = other.hidden.gather(1, place[..., None].expand_as(other.hidden))
        aux = {name: (value + other.aux[name]) / 2 for name, value in output.aux.items()}
        return self.answers(forth, self.pooled(states)), dataclasses.replace(output, aux=aux)

    def pooled(self, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
        """The mean of the states of each bin; the last bin may have fewer."""
        states = hidden if hidden.dtype == torch.float64 else hidden.float()
        if self.bin == 1:
            return states
        whole = states.shape[1] // self.bin * self.bin
        parts = [states[:, :whole].unflatten(1, (-1, self.bin)).mean(2)]
        if whole < states.shape[1]:
            parts.append(states[:, whole:].mean(1, keepdim=True))
        return torch.cat(parts, dim=1)

    def answers(
        self, forth: Float[Tensor, "b n d"], back: Float[Tensor, "b n d"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Predictions from the states of bins on the strand that was read, and on the other, in the same order."""
        if back is None:
            return self._link(self.head(forth))
        here, there = self.head(torch.cat([forth, back], -1)), self.head(torch.cat([back, forth], -1))
        return (self._link(here) + self._link(there)[..., self.swap]) / 2

    def _link(self, outputs: Tensor) -> Tensor:
        return outputs if self.loss_kind == "squared" else nn.functional.softplus(outputs).clamp(min=1e-6)

    # --- the loss ------------------------------------------------------------------------------------------------

    def prepare(self, batch: SequenceBatch) -> TrackBatch:
        """The batch, which must have tracks."""
        if not isinstance(batch, TrackBatch) or batch.tracks is None:
            raise ConfigError("this task learns tracks along a genome, but the batch has none; use data=tracks")
        return batch

    def objective(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class; ``nats`` are half the deviance, ``count`` bins with a value."""
        given = self.prepare(batch)
        said, output = self._read(given)
        assert given.tracks is not None
        truth = given.tracks.to(said.dtype) / self.scale
        known = ~truth.isnan()
        ranks = world()[1]
        total = torch.stack([known.sum().float(), torch.full((), float(given.shape[0]), device=said.device)])
        if ranks > 1:
            dist.all_reduce(total)
        count, rows = total.clamp(min=1)
        value = self.nats(said, truth)
        loss = value * ranks / count
        aux = {}
        for name, figure in output.aux.items():
            if name.endswith("_sum"):  # over the positions of this rank
                name, figure = name.removesuffix("_sum"), figure * ranks / (rows * given.shape[1])
            if not name.startswith(PREFIX):
                aux[f"aux_{name}"] = figure.detach()
            if name.endswith("_loss"):
                loss = loss + figure
        if self.training:
            self.experts.add(output.aux)
        nats = misfit(truth, said.detach(), self.loss_kind == "squared").sum(dtype=torch.float64)
        return loss, {"nats": nats, "count": known.sum(), **aux}

    def nats(self, said: Float[Tensor, "b n k"], truth: Float[Tensor, "b n k"]) -> Float[Tensor, ""]:
        """The loss of all bins with a value, summed.

        Args:
            said: predictions, in units of the mean.
            truth: values, in units of the mean; NaN where nothing was measured.
        """
        known = ~truth.isnan()
        y = torch.where(known, truth, 0)
        if self.loss_kind == "squared":
            return torch.where(known, (said - y) ** 2 / 2, 0).sum()
        if self.loss_kind == "poisson":
            return torch.where(known, said - y * said.log(), 0).sum()
        said = torch.where(known, said, 0)
        sums, totals = said.sum(1, keepdim=True).clamp(min=1e-6), y.sum(1, keepdim=True)
        poisson = (sums - totals * sums.log()) * known.any(1, keepdim=True)
        shape = -(y * torch.where(known, said / sums, 1).log()).sum()
        return self.total_weight * poisson.sum() + shape

    # --- Lightning -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that data and task were made for each other; take means from the data, weights from ``init_from``.

        Raises:
            ConfigError: another number of tracks, other bins.
            DataError: values below 0, where the loss is of counts.
            CheckpointError: ``init_from`` does not fit.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.check_data(data)
            if stage == "fit" and not self.trainer.ckpt_path:
                self.scale.copy_(torch.tensor(data.scale))
                self.swap.copy_(torch.tensor(data.swap))
        if stage == "fit" and self.init_from and not self.trainer.ckpt_path:
            load_backbone(self.backbone, self.init_from)

    def check_data(self, data: Any) -> None:
        """Raise unless the data's tracks are what this task learns."""
        if getattr(data, "targets", None) != "track":
            raise ConfigError("TrackPrediction learns tracks along a genome; use data=tracks")
        found, wanted = (len(data.names), data.bin), (self.head.vocab_size, self.bin)
        if found[0] != wanted[0]:
            shown = ", ".join(data.names[:12]) + (", ..." if found[0] > 12 else "")
            raise ConfigError(
                f"the data has {found[0]} tracks ({shown}), task.tracks is {wanted[0]}; set task.tracks={found[0]}"
            )
        if found[1] != wanted[1]:
            raise ConfigError(f"data.bin is {found[1]}, task.bin is {wanted[1]}; give both the same")
        value, where = data.lowest
        if value < 0 and self.loss_kind != "squared":
            raise DataError(
                f"{where}: found the value {value:g}, but task.loss={self.loss_kind} is of counts, which are 0 or "
                "more; give counts, or set task.loss=squared"
            )

    def _evaluate(self, batch: SequenceBatch, part: str) -> dict[str, Tensor]:
        given = self.prepare(batch)
        assert given.tracks is not None
        said = self(given)
        self.get_submodule(f"{part}_scores").update(said.float(), given.tracks.float() / self.scale)  # type: ignore[operator]
        return {"outputs": said, "tracks": given.tracks}

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, part: str) -> None:
        metric = self.get_submodule(f"{part}_scores")
        found = metric.compute()  # type: ignore[operator]
        names = self._names()
        self.log(f"{part}/bits", float(found["bits"]))
        for score in ("pearson", "spearman"):
            each = torch.tensor(found[score])
            self.log(f"{part}/{score}", float(each.nanmean()))
            if 1 < len(each) <= _SHOWN:
                for name, value in zip(names, each.tolist(), strict=True):
                    self.log(f"{part}/{name}/{score}", value)
        metric.reset()  # type: ignore[operator]

    def _names(self) -> list[str]:
        data = getattr(self.trainer, "datamodule", None)
        return list(getattr(data, "names", [])) or [str(number) for number in range(self.head.vocab_size)]

    def on_test_end(self) -> None:
        """Print the scores of the test beside those of the floors."""
        trainer = self.trainer
        floors = getattr(getattr(trainer, "datamodule", None), "floors", None)
        if not callable(floors) or not trainer.is_global_zero:
            return
        listed = [floor for floor in floors() if "test" in floor]
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        names = self._names()
        table = Table("track", "score", "this model", *(str(floor["name"]) for floor in listed), title="Held-out bins")
        for number, name in enumerate(names[:_SHOWN]):
            for score in ("pearson", "spearman"):
                key = f"test/{name}/{score}" if len(names) > 1 else f"test/{score}"
                cells = [f"{floor['test'][score][number]:.4f}" for floor in listed]
                table.add_row(name, score, f"{found.get(key, math.nan):.4f}", *cells)
        Console().print(table)

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """Predictions of rows.

        Returns:
            ``answers`` ``(b n k)`` in the units of the (squashed) data, ``tracks`` ``(b n k)`` as measured; ``source``.
        """
        given = self.prepare(batch)
        assert given.tracks is not None
        index = torch.arange(batch.shape[0]) if batch.index is None else batch.index.cpu()
        kept = index >= 0
        source = batch.source or [""] * batch.shape[0]
        return {
            "answers": (self(given) * self.scale).cpu()[kept],
            "tracks": given.tracks.cpu()[kept],
            "source": [text for text, keep in zip(source, kept.tolist(), strict=True) if keep],
        }

    def describe(self) -> dict[str, Any]:
        """The model, for people and for JSON."""
        said = super().describe()
        name = f"{self.head.vocab_size} tracks in bins of {self.bin}, {self.loss_kind}"
        return said | {
            "head": {"name": name, "parameters": sum(part.numel() for part in self.head.parameters())},
            "strands": "both" if self.both else "forward",
            "init_from": self.init_from,
        }


def misfit(truth: Tensor, said: Tensor, squared: bool) -> Tensor:
    """What ``bits`` sum, in nats: half the deviance, or half the squared error; 0 where nothing was measured."""
    if not squared:
        return deviance(truth, said)
    return torch.where(truth.isnan(), 0, (said - torch.nan_to_num(truth)) ** 2 / 2)


def mirrored(segment_ids: Tensor | None, rows: int, length: int, device: torch.device) -> Int[Tensor, "b t"]:
    """The place that each position of a row goes to when every segment is turned where it lies; padding stays."""
    place = torch.arange(length, device=device).expand(rows, length)
    if segment_ids is None:
        return length - 1 - place
    edge = torch.ones_like(segment_ids[:, :1], dtype=torch.bool)
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = torch.where(torch.cat([edge, change], 1), place, 0).cummax(1).values
    ends = torch.where(torch.cat([change, edge], 1), place, length).flip(1).cummin(1).values.flip(1)
    return torch.where(segment_ids > 0, starts + ends - place, place)


class TrackReadout(nn.Module):
    """``W₂ drop(gelu(W₁ h + b₁)) + b₂``.

    Args:
        states: channels of a bin's states.
        width: channels between.
        tracks: k.
        dropout: share of channels that training leaves out.
    """

    tied = False

    def __init__(self, states: int, width: int, tracks: int, dropout: float) -> None:
        super().__init__()
        self.vocab_size = tracks
        self.first, self.last, self.dropout = nn.Linear(states, width), nn.Linear(width, tracks), nn.Dropout(dropout)
        nn.init.normal_(self.last.weight, std=0.02)
        nn.init.zeros_(self.last.bias)

    def forward(self, states: Float[Tensor, "*s d"]) -> Float[Tensor, "*s k"]:
        """Outputs, in the type of the states."""
        with torch.autocast(states.device.type, enabled=False):
            inner = nn.functional.gelu(self.first(states.to(self.first.weight.dtype)))
            return self.last(self.dropout(inner))


class TrackScores(Metric):
    """Keeps all bins that have a value, on the CPU, and scores them at the end, over all ranks."""

    full_state_update = False
    said: list[Tensor]
    truth: list[Tensor]

    def __init__(self, tracks: int, squared: bool) -> None:
        super().__init__(compute_on_cpu=True)
        self.width, self.squared = tracks, squared
        for name in ("said", "truth"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, said: Float[Tensor, "b n k"], truth: Float[Tensor, "b n k"]) -> None:
        """Add bins, in units of the mean; NaN where nothing was measured."""
        kept = ~truth.isnan().all(-1)
        self.said.append(said[kept])
        self.truth.append(truth[kept])

    def compute(self) -> dict[str, Any]:
        """``bits`` of a bin; ``pearson`` and ``spearman`` of each track, in lists."""
        empty = torch.zeros(0, self.width)
        said, truth = (
            part.cpu() if isinstance(part, Tensor) else torch.cat([empty, *(one.cpu() for one in part)])
            for part in (self.said, self.truth)
        )
        nats = misfit(truth, said, self.squared).sum(dtype=torch.float64)
        return {"bits": nats / (~truth.isnan()).sum() / math.log(2), **correlations(truth, said)}
