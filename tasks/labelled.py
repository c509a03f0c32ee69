"""LabelledTask: one answer a record: pooled states, a readout, both strands, and weights from a pretrained model."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from seqlong.backbone import BackboneConfig, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.labels import LabelledBatch
from seqlong.metrics import world
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask
from seqlong.tasks.experts import PREFIX
from seqlong.tasks.finetune import add_low_rank, freeze_blocks, load_backbone, scale_by_depth
from seqlong.tasks.label_scores import LabelScores
from seqlong.tasks.masking import draw
from seqlong.tasks.pooling import Pool, Pooling, Readout, Spans, other_strand, repeated

log = logging.getLogger("seqlong")

#: What a task does about the other strand.
Strand = Literal["none", "augment", "average", "equivariant"]

_TURN = 1 << 43  # names the draw of strands


class LabelledTask(SequenceTask):
    """Learn the labels of records (``LabelledBatch``): ``readout(pool(backbone(record)))``.

    Loss: the mean over the labels of all ranks of what ``nats`` says of each, plus the auxiliary losses of the blocks.

    Logs what every task does (``train/bits``: bits of a label), and in evaluation ``val/bits`` and the scores of
    ``label_scores``, as ``val/mcc``; those of records that training has not seen as ``val/unseen/mcc``. A subclass says
    what labels are, in ``kind``, ``nats`` and ``answers``.

    Args:
        backbone: the architecture.
        outputs: classes, labels or values.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        pool: see ``Pool``; ``echo`` reads every record twice.
        rc: what to do about the other strand; see ``SequenceClassification``.
        dropout: share of the pooled state's channels that training leaves out.
        init_from: checkpoint or run folder whose backbone training starts from.
        freeze: first blocks that stay as they are, the embedding with them; -1: the whole backbone.
        lora_rank: train low-rank changes of linear layers in place of the backbone; 0 trains the backbone itself.
        lora_alpha: what those changes are multiplied with, times the rank.
        layer_decay: learning rate of a block as a share of that of the block above.
        backbone_lr: learning rate of the backbone as a share of the readout's.
        compile: compile each block with torch.compile.

    Raises:
        ConfigError: a setting is out of its range, or contradicts another.
    """

    targets = "label"  # type: ignore[assignment]
    kind: Literal["class", "multilabel", "value"] = "class"
    complement: Tensor

    def __init__(
        self,
        backbone: BackboneConfig,
        outputs: int,
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
        if outputs < 1:
            raise ConfigError(f"{type(self).__name__} needs one output or more, found {outputs}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"task.dropout={dropout} must be 0 or more and below 1")
        if rc == "equivariant" and backbone.rc != "equivariant":
            backbone = dataclasses.replace(backbone, rc="equivariant")
        elif rc != "equivariant" and backbone.rc == "equivariant":
            raise ConfigError(
                f"model.backbone.rc=equivariant reads both strands always, so task.rc={rc} would do nothing; set "
                "task.rc=equivariant"
            )
        super().__init__(backbone, optimizer, schedule, True, 0.0, False, compile)
        width = self.backbone.embedding.embedding_dim
        self.pool, self.head = Pool(width, pool), Readout(width, outputs, dropout)  # type: ignore[assignment]
        self.outputs, self.rc, self.init_from = outputs, rc, init_from
        self.layer_decay, self.backbone_lr = layer_decay, backbone_lr
        table = list(backbone.complement) + list(range(len(backbone.complement), backbone.vocab_size))
        self.register_buffer("complement", torch.tensor(table[: backbone.vocab_size]), persistent=False)
        if lora_rank and freeze:
            raise ConfigError("task.lora_rank and task.freeze both keep the backbone as it is; give one")
        if lora_rank:
            add_low_rank(self.backbone, lora_rank, lora_alpha)
        freeze_blocks(self.backbone, freeze)
        if self.backbone.patch_embedding is not None:  # not read here: without a gradient it would stop several ranks
            self.backbone.patch_embedding.requires_grad_(False)
        for part in ("val", "test"):
            self.add_module(f"{part}_scores", LabelScores(self.kind, outputs))

    # --- what a subclass says ------------------------------------------------------------------------------------

    def nats(self, outputs: Float[Tensor, "s y"], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each label, and its weight, of one shape; weight 0 where the label is unknown."""
        raise NotImplementedError(f"{type(self).__name__} must define nats(outputs, labels)")

    def answers(self, outputs: Float[Tensor, "s y"]) -> Float[Tensor, "s y"]:
        """What outputs mean: probabilities, or values in their own units."""
        raise NotImplementedError(f"{type(self).__name__} must define answers(outputs)")

    def scaled(self, labels: Tensor) -> Tensor:
        """Labels as outputs are."""
        return labels

    # --- the model -----------------------------------------------------------------------------------------------

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "s y"]:
        """Outputs of every record, float32; with ``rc=average`` the mean over both strands."""
        batch = _labelled(batch)
        outputs = self._read(batch)[0]
        if self.rc == "average":
            spans = _spans(batch)
            assert batch.tokens is not None
            turned = other_strand(batch.tokens, spans, self.complement)
            outputs = (outputs + self._read(dataclasses.replace(batch, tokens=turned))[0]) / 2
        return outputs

    def _read(self, batch: LabelledBatch) -> tuple[Float[Tensor, "s y"], BackboneOutput]:
        spans = _spans(batch)
        if self.pool.how == "echo":
            given, spans = repeated(batch, spans)
        else:
            given = batch
        output = self.backbone(given)
        if self.backbone.strands is None:
            states = self.pool(output.hidden, spans)
        else:
            forth, back = output.hidden.chunk(2, dim=-1)
            states = (self.pool(forth, spans) + self.pool(back, spans, turned=True)) / 2
        return self.head(states), output

    def prepare(self, batch: SequenceBatch) -> LabelledBatch:
        """The batch; in training half of its records are turned, for ``augment`` and ``average``."""
        batch = _labelled(batch)
        if not self.training or self.rc not in ("augment", "average"):
            return batch
        assert batch.index is not None and batch.tokens is not None
        spans = _spans(batch)
        steps = torch.arange(batch.shape[1], device=batch.tokens.device)
        which = (draw(_TURN, 0, batch.index, steps) < (1 << 52)).flatten()[spans.starts]
        return dataclasses.replace(batch, tokens=other_strand(batch.tokens, spans, self.complement, which))

    def objective(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``SequenceTask``; ``nats`` and ``count`` are of labels."""
        prepared = self.prepare(batch)
        outputs, output = self._read(prepared)
        assert prepared.labels is not None
        nats, weight = self.nats(outputs, self.scaled(prepared.labels))
        ranks = world()[1]
        positions = (prepared.ends - prepared.starts + 1).sum() if prepared.ends is not None else weight.sum()  # type: ignore[operator]
        totals = torch.stack([weight.sum(), positions.to(weight.dtype)])
        if ranks > 1:
            dist.all_reduce(totals)
        total, seen = torch.where(totals > 0, totals, 1)
        loss = (nats * weight).sum() * ranks / total
        aux = {}
        for name, value in output.aux.items():
            if name.endswith("_sum"):  # over the positions of this rank
                name, value = name.removesuffix("_sum"), value * ranks / seen
            if not name.startswith(PREFIX):
                aux[f"aux_{name}"] = value.detach()
            if name.endswith("_loss"):
                loss = loss + value
        if self.training:
            self.experts.add(output.aux)
        counted = weight > 0
        return loss, {
            "nats": torch.where(counted, nats.detach(), 0).sum(dtype=torch.float64),
            "count": counted.sum(),
            **aux,
        }

    # --- Lightning -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that data and task were made for each other, and take the weights of ``init_from``.

        Raises:
            ConfigError: other labels, another number of classes.
            CheckpointError: ``init_from`` does not fit.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.check_data(data)
        if stage == "fit" and self.init_from and not self.trainer.ckpt_path:
            load_backbone(self.backbone, self.init_from)

    def check_data(self, data: Any) -> None:
        """Raise ConfigError unless the data's labels are what this task learns."""
        found = getattr(data, "targets", None)
        if found != "label" or not hasattr(data, "kind"):
            raise ConfigError(
                f"{type(self).__name__} learns labels of sequences; use data=labelled (data has targets '{found}')"
            )
        if data.kind != self.kind:
            raise ConfigError(
                f"{type(self).__name__} learns labels of kind '{self.kind}', but data.labels={data.kind}; set "
                f"data.labels={self.kind}"
            )
        if data.classes != self.outputs:
            what = "values" if self.kind == "value" else "classes"
            shown = ", ".join(data.label_names.names[:12]) + (", ..." if data.classes > 12 else "")
            raise ConfigError(
                f"the data has {data.classes} {what} ({shown}), but the model puts out {self.outputs}; set "
                f"task.{what}={data.classes}"
            )
        symbols, size = data.vocabulary.size, self.backbone.embedding.num_embeddings
        if symbols > size:
            raise ConfigError(
                f"the data has {symbols} symbols, but the model's vocabulary {size}; set "
                f"model.backbone.vocab_size={symbols}"
            )
        if self.rc != "none" and hasattr(data, "check_strands"):
            data.check_strands(self.complement.tolist())

    def configure_optimizers(self) -> Any:
        """AdamW with a learning rate for each depth, and its schedule."""
        made = super().configure_optimizers()
        optimizer = made["optimizer"]
        if self.layer_decay == 1 and self.backbone_lr == 1:
            return made
        for group in optimizer.param_groups:
            group["lr"] = self.optimizer_settings.lr  # which the schedule has multiplied already
            group.pop("initial_lr", None)
        scale_by_depth(optimizer, self.backbone, self.layer_decay, self.backbone_lr)
        steps = self.trainer.max_steps
        schedule = self.schedule.build(optimizer, steps if steps > 0 else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(self, batch: SequenceBatch, part: str) -> dict[str, Tensor]:
        batch = self.prepare(batch)
        assert batch.labels is not None
        outputs, labels = self(batch), self.scaled(batch.labels)
        self.get_submodule(f"{part}_scores").update(outputs, labels, batch.seen)  # type: ignore[operator]
        return {"outputs": outputs, "labels": labels}

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, part: str) -> None:
        metric = self.get_submodule(f"{part}_scores")
        for name, value in metric.compute().items():  # type: ignore[operator]
            self.log(f"{part}/{name}", value)
        metric.reset()  # type: ignore[operator]

    def on_test_end(self) -> None:
        """Print the scores of the test beside those of the floors."""
        trainer = self.trainer
        floors = getattr(getattr(trainer, "datamodule", None), "floors", None)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        listed = [floor for floor in floors() if "test" in floor] if callable(floors) and trainer.is_global_zero else []
        if not listed:
            return
        table = Table("test", "this model", *(str(floor["name"]) for floor in listed), title="Beside linear models")
        for name in listed[0]["test"]:
            for key, part in ((name, "test"), (f"unseen/{name}", "test_unseen")):
                if f"test/{key}" in found:
                    cells = [f"{floor[part][name]:.4f}" if part in floor else "" for floor in listed]
                    table.add_row(key, f"{found[f'test/{key}']:.4f}", *cells)
        Console().print(table)

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """What the model says of each record.

        Returns:
            ``answers`` ``(s y)``: probabilities of classes or labels, or values; ``labels`` ``(s ...)`` as the data has
            them; ``records`` ``(s)``: the number of each in its split. All on the CPU.
        """
        labelled = _labelled(batch)
        assert labelled.labels is not None and labelled.records is not None
        answers = self.answers(self(labelled))
        return {"answers": answers.cpu(), "labels": labelled.labels.cpu(), "records": labelled.records.cpu()}

    def describe(self) -> dict[str, Any]:
        """The model, for people and for JSON."""
        said = super().describe()
        trained = sum(part.numel() for part in self.parameters() if part.requires_grad)
        read = sum(part.numel() for part in self.head.parameters())
        return said | {
            "head": {"name": f"{self.pool.how} pooling, {self.outputs} outputs", "parameters": read},
            "parameters_trained": trained,
            "rc": self.rc,
            "init_from": self.init_from,
        }


def _labelled(batch: SequenceBatch) -> LabelledBatch:
    if not isinstance(batch, LabelledBatch) or batch.starts is None or batch.tokens is None:
        raise ConfigError("this task learns labels of sequences, but the batch has none; use data=labelled")
    return batch


def _spans(batch: LabelledBatch) -> Spans:
    assert batch.starts is not None and batch.ends is not None
    return Spans(batch.starts, batch.ends, *batch.shape)
