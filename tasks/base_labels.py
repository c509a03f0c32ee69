"""BaseLabelling: what each base of a genome is, read on both strands."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAveragePrecision, MulticlassConfusionMatrix

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.metrics import world
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.experts import PREFIX
from seqlong.tasks.finetune import load_backbone
from seqlong.tasks.tracks import Strands, TrackPrediction

_LOWEST = 1e-30  # of a probability whose logarithm is taken
#: Probabilities at which precision and recall are measured: close to 0 and 1 closer together, for rare labels.
_THRESHOLDS = torch.sigmoid(torch.linspace(-12, 12, 121))


class BaseLabelling(TrackPrediction):
    """Tell for each base which label it has: ``p = softmax(z)``.

    With ``strands=both`` the backbone reads the other strand too, and ``z_j = (r_j(h, h') + r_swap(j)(h', h)) / 2``, as
    in TrackPrediction: the other strand gives the same answer by construction, plus and minus swapped.

    The loss is the mean of ``-w_y ln p_y`` over bases with a label y, with ``w_y ∝ share_y ** -balance``, whose mean
    over training is 1. Logs ``bits`` (without weights), ``accuracy``, and for each label ``f1`` (of the likeliest one)
    and ``auprc`` (average precision, at 121 thresholds); ``f1`` and ``auprc`` alone are means over labels that are
    there, bases without a feature left out.

    Args:
        backbone: the architecture.
        labels: as ``data.labels``.
        stranded: as ``data.stranded``; then a label is two.
        balance: 0 to 1: how far rare labels weigh more; 1 gives all labels the same weight together.
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

    targets = "label"  # type: ignore[assignment]
    weights: Tensor

    def __init__(
        self,
        backbone: BackboneConfig,
        labels: list[str],
        stranded: bool = True,
        balance: float = 0.5,
        strands: Strands = "both",
        width: int = 128,
        dropout: float = 0.0,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        init_from: str | None = None,
        freeze: int = 0,
        compile: bool = False,
    ) -> None:
        if not 0 <= balance <= 1 or not labels:
            raise ConfigError(f"task.balance={balance} must be 0 to 1, task.labels={list(labels)} one or more")
        count = 1 + len(labels) * (2 if stranded else 1)
        super().__init__(
            backbone, count, 1, "squared", 1.0, strands, width, dropout, optimizer, schedule, init_from, freeze, compile
        )
        self.balance = balance
        self.register_buffer("weights", torch.ones(count))
        for part in ("val", "test"):
            self.add_module(f"{part}_scores", LabelScores(count))

    def answers(
        self, forth: Float[Tensor, "b n d"], back: Float[Tensor, "b n d"] | None = None
    ) -> Float[Tensor, "b n k"]:
        """Probabilities of the labels, from the states of bases on both strands."""
        return super().answers(forth, back).softmax(-1)

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:  # type: ignore[override]
        """The batch, which must have labels."""
        if batch.targets is None:
            raise ConfigError("this task learns labels of bases, but the batch has none; use data=genes")
        return batch

    def objective(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class; ``nats`` without weights, ``count`` bases with a label."""
        given = self.prepare(batch)
        assert given.targets is not None
        said, output = self._read(given)
        nats, known = surprise(said, given.targets)
        ranks = world()[1]
        total = torch.stack([known.sum().float(), torch.full((), float(given.shape[0]), device=said.device)])
        if ranks > 1:
            dist.all_reduce(total)
        count, rows = total.clamp(min=1)
        loss = (nats * self.weights[given.targets.clamp(min=0)]).sum() * ranks / count
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
        return loss, {"nats": nats.detach().sum(dtype=torch.float64), "count": known.sum(), **aux}

    # --- Lightning -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take shares and pairs of labels from the data, weights of the backbone from ``init_from``.

        Raises:
            ConfigError: data without labels of bases, or with others.
            CheckpointError: ``init_from`` does not fit.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.check_data(data)
            if stage == "fit" and not self.trainer.ckpt_path:
                self.start_from(torch.tensor(data.prior), torch.tensor(data.labels.swap))
        # The rest of what TrackPrediction does there is about the scale of its tracks.
        if stage == "fit" and self.init_from and not self.trainer.ckpt_path:
            load_backbone(self.backbone, self.init_from)

    def start_from(self, share: Float[Tensor, "k"], swap: Int[Tensor, "k"]) -> None:
        """Weights of the labels from their shares in training; the readout starts at what the loss makes of those."""
        self.swap.copy_(swap)
        weight = torch.where(share > 0, share.clamp(min=1e-12) ** -self.balance, 0)
        self.weights.copy_(weight / (share * weight).sum())
        with torch.no_grad():
            readout: Any = self.head
            readout.last.bias.copy_((share * self.weights).clamp(min=1e-6).log())

    def check_data(self, data: Any) -> None:
        """Raise unless the data's labels are what this task learns."""
        if getattr(data, "targets", None) != "label":
            raise ConfigError("BaseLabelling learns labels of bases; use data=genes")
        if len(data.names) != self.head.vocab_size:
            raise ConfigError(
                f"the data has {len(data.names)} labels ({', '.join(data.names)}), the task {self.head.vocab_size}; "
                "give task.labels and task.stranded as data.labels and data.stranded"
            )

    def _evaluate(self, batch: SequenceBatch, part: str) -> dict[str, Tensor]:
        given = self.prepare(batch)
        assert given.targets is not None
        said = self(given)
        self.get_submodule(f"{part}_scores").update(said, given.targets)  # type: ignore[operator]
        return {"outputs": said, "labels": given.targets}

    def _log_scores(self, part: str) -> None:
        metric = self.get_submodule(f"{part}_scores")
        found = metric.compute()  # type: ignore[operator]
        self.log(f"{part}/bits", found["bits"])
        self.log(f"{part}/accuracy", found["accuracy"])
        for score in ("f1", "auprc"):
            self.log(f"{part}/{score}", found[score][1:].nanmean())
            for name, value in zip(self._names(), found[score].tolist(), strict=True):
                if not math.isnan(value):
                    self.log(f"{part}/{name}/{score}", value)
        metric.reset()  # type: ignore[operator]

    def on_test_end(self) -> None:
        """Print the scores of the test beside those of the floors."""
        trainer = self.trainer
        floors = getattr(getattr(trainer, "datamodule", None), "floors", None)
        if not callable(floors) or not trainer.is_global_zero:
            return
        listed = [floor for floor in floors() if "test" in floor]
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        table = Table("label", "score", "this model", *(str(floor["name"]) for floor in listed), title="Held-out bases")
        for number, name in enumerate(self._names()):
            for score in ("f1", "auprc"):
                cells = [f"{floor['test'][score][number]:.4f}" for floor in listed]
                value = found.get(f"test/{name}/{score}")
                if value is not None:
                    table.add_row(name, score, f"{value:.4f}", *cells)
        Console().print(table)

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """Probabilities of rows.

        Returns:
            ``answers`` ``(b t k)``, ``labels`` ``(b t)`` (-1 where there is none); ``source``.
        """
        given = self.prepare(batch)
        assert given.targets is not None
        index = torch.arange(batch.shape[0]) if batch.index is None else batch.index.cpu()
        kept = index >= 0
        source = batch.source or [""] * batch.shape[0]
        return {
            "answers": self(given).cpu()[kept],
            "labels": given.targets.cpu()[kept],
            "source": [text for text, keep in zip(source, kept.tolist(), strict=True) if keep],
        }

    def describe(self) -> dict[str, Any]:
        """The model, for people and for JSON."""
        said = super().describe()
        return said | {"head": said["head"] | {"name": f"{self.head.vocab_size} labels of bases"}}


def surprise(said: Float[Tensor, "b t k"], targets: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b t"], Tensor]:
    """``-ln p`` of the labels, 0 where there is none (-1); and where there is one."""
    known = targets >= 0
    chosen = said.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(known, -chosen.clamp(min=_LOWEST).log(), 0), known


class LabelScores(nn.Module):
    """Bits, accuracy, and F1 and average precision of each label, over all ranks, in the memory of a table.

    Args:
        labels: k.
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.confusion = MulticlassConfusionMatrix(labels, ignore_index=-1)
        self.precision = MulticlassAveragePrecision(labels, average=None, thresholds=_THRESHOLDS, ignore_index=-1)
        self.nats, self.count = SumMetric(), SumMetric()

    def update(self, said: Float[Tensor, "b t k"], targets: Int[Tensor, "b t"]) -> None:
        """Add bases; those of label -1 do not count."""
        nats, known = surprise(said, targets)
        self.nats.update(nats.double().sum())
        self.count.update(known.sum())
        self.confusion.update(said[known], targets[known])
        self.precision.update(said[known].float(), targets[known])

    def compute(self) -> dict[str, Tensor]:
        """``bits``, ``accuracy``; ``f1`` and ``auprc`` ``(k)``, NaN for labels that no base has."""
        table = self.confusion.compute().double()
        right, there = table.diagonal(), table.sum(1)
        nothing = torch.full_like(right, torch.nan)
        auprc = self.precision.compute().double()
        return {
            "bits": (self.nats.compute() / self.count.compute().clamp(min=1) / math.log(2)).float(),
            "accuracy": (right.sum() / there.sum().clamp(min=1)).float(),
            "f1": torch.where(there > 0, 2 * right / (there + table.sum(0)).clamp(min=1), nothing).float(),
            "auprc": torch.where(there > 0, auprc, nothing).float(),
        }

    def reset(self) -> None:
        """Start afresh."""
        for metric in (self.confusion, self.precision, self.nats, self.count):
            metric.reset()
