"""SequenceTask: what every task shares: model, exact loss over ranks, logging, evaluation, optimiser."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from seqlong.backbone import Backbone, BackboneConfig, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.fragment import split
from seqlong.heads import LanguageHead
from seqlong.metrics import Accuracy, BitsPerToken, RunningSums, world
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.carried import CarriedState
from seqlong.tasks.experts import PREFIX, ExpertLoads

#: Where a checkpoint holds the sums and the loads of experts since the last row of the log, and the carried state.
SUMS_KEY, EXPERTS_KEY, CARRIED_KEY = "seqlong_sums", "seqlong_expert_loads", "seqlong_carried_state"


class SequenceTask(LightningModule):
    """Predict a token at each position that has a target.

    Loss: ``Σ weight · nll / Σ weight`` over the positions of all ranks, plus the auxiliary losses of the blocks, so
    that the number of ranks and how the weight falls on them change nothing. With gradient accumulation each batch is
    divided by its own weight, and the batches of a step are averaged.

    Logs, every ``trainer.log_every_n_steps`` steps and over the steps since the row before: ``train/loss`` (nats, the
    objective), ``train/bits`` (bits per token over positions of positive weight, each counted once), ``train/length``
    (positions in a row), ``lr``, the figures of the blocks as ``train/<name>``, and those of their experts as
    ``experts/<block>/<name>``, of routers in their mixers ``routers/<block>/<name>`` (see ``ExpertLoads.figures``). In
    evaluation ``val/bits``, ``val/accuracy``, or ``test/...``.

    A subclass says what to predict, in ``prepare``.

    Args:
        backbone: the architecture.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        tie_embeddings: whether the last projection is the embedding's weight, or one of its own.
        z_loss: weight of the squared log-normaliser in the training loss, 0 for none, 1e-4 where logits drift. It then
            counts in train/bits too, never in evaluation.
        carry_state: start each row from the state that its window before left, without gradients across (truncated
            backpropagation through time). The data must be ordered for it, as data.order=stream is.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.
    """

    #: What ``targets`` of a batch must be: the token after each position, or the one at it.
    targets: Literal["next", "same"] = "next"

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        tie_embeddings: bool = True,
        z_loss: float = 0.0,
        carry_state: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)
        embedding = self.backbone.embedding
        self.head = LanguageHead(
            embedding.embedding_dim,
            embedding.num_embeddings,
            embedding if tie_embeddings else None,
            self.backbone.strands,
        )
        self.optimizer_settings, self.schedule = optimizer, schedule
        self.z_loss = z_loss
        self.carried = CarriedState() if carry_state else None
        if carry_state:
            CarriedState.check(self.backbone)
        self._compile_blocks, self._compiled = compile, False
        self._sums = RunningSums()
        self.experts = ExpertLoads()
        for part in ("val", "test"):
            self.add_module(f"{part}_bits", BitsPerToken())
            self.add_module(f"{part}_accuracy", Accuracy())

    # --- what a subclass says ------------------------------------------------------------------------------------

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch as the model is to see it: its targets are -1 where nothing is to be predicted."""
        raise NotImplementedError(f"{type(self).__name__} must define prepare(batch)")

    def observe(self, nll: Float[Tensor, "b t"], weight: Float[Tensor, "b t"]) -> None:
        """Look at the losses of a batch of training, nats, and their weights, as ``prepare`` left them."""

    # --- the model -----------------------------------------------------------------------------------------------

    def forward(self, batch: SequenceBatch) -> Float[Tensor, "b t y"]:
        """Logits of every position, float32."""
        return self.head.logits(self.backbone(batch).hidden)

    def objective(self, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to go backwards from, and the figures of this rank.

        Returns:
            ``loss``: its gradients, averaged over ranks, are those of the whole batch; so is the mean of its values.
            ``figures``: sums ``nats`` and ``count``, and what the blocks report.
        """
        batch = self._own(self.prepare(batch))
        output = self._run(batch)
        assert batch.targets is not None
        nll = self.head.loss(output.hidden, batch.targets, self.z_loss)
        weight = _weight(batch)
        self.observe(nll.detach(), weight)
        ranks = world()[1]
        totals = torch.stack([weight.sum(), _positions(batch)])
        if ranks > 1:
            dist.all_reduce(totals)
        total, positions = torch.where(totals > 0, totals, 1)
        loss = (nll * weight).sum() * ranks / total
        loss, aux = self._add_aux(loss, output, positions)
        counted = weight > 0
        nats = torch.where(counted, nll.detach(), 0).sum(dtype=torch.float64)
        return loss, {"nats": nats, "count": counted.sum(), **aux}

    def _with_aux(self, loss: Tensor, output: BackboneOutput, batch: SequenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the auxiliary losses of the blocks, and their figures."""
        positions = _positions(batch)
        if world()[1] > 1:
            dist.all_reduce(positions)
        return self._add_aux(loss, output, positions.clamp(min=1))

    def _add_aux(self, loss: Tensor, output: BackboneOutput, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ranks = world()[1]
        aux = {}
        for name, value in output.aux.items():
            if name.endswith("_sum"):  # over the positions of this rank
                name, value = name.removesuffix("_sum"), value * ranks / positions
            if not name.startswith(PREFIX):
                aux[f"aux_{name}"] = value.detach()
            if name.endswith("_loss"):
                loss = loss + value
        if self.training:
            self.experts.add(output.aux)
        return loss, aux

    def _own(self, batch: SequenceBatch) -> SequenceBatch:
        """The part of the rows that this process holds, under sequence parallelism."""
        return batch if self._sequence is None else split(batch, *self._sequence)

    @property
    def _sequence(self) -> Any:
        """Group, place and number of the processes that hold the same rows (``SequenceParallel``); else None."""
        return getattr(getattr(self._trainer, "strategy", None), "sequence", None)

    def _run(self, batch: SequenceBatch) -> BackboneOutput:
        return self.backbone(batch) if self.carried is None else self.carried.run(self.backbone, batch)

    def configure_model(self) -> None:
        """Compile the blocks, once."""
        if self._compile_blocks and not self._compiled:
            self._compiled = True
            for block in self.backbone.blocks:
                block.compile()

    def setup(self, stage: str) -> None:
        """Check that data and task were made for each other.

        Raises:
            ConfigError: other targets, more symbols than the model has.
        """
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "targets", self.targets)
        if found != self.targets:
            raise ConfigError(
                f"{type(self).__name__} predicts the {_MEANING[self.targets]}, but data.targets is '{found}'; set "
                f"data.targets={self.targets}"
            )
        check_patches(self, data)
        symbols, size = getattr(getattr(data, "vocabulary", None), "size", 0), self.head.vocab_size
        if symbols > size:
            raise ConfigError(
                f"the data has {symbols} symbols, but the model's vocabulary {size}; set "
                f"model.backbone.vocab_size={symbols}"
            )
        if data is not None and self.backbone.strands is not None and hasattr(data, "check_strands"):
            data.check_strands(self.backbone.strands.pairs)

    # --- training ------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Make Lightning write its rows at the right steps: the count that it decides by is wrong after a resume."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """One batch; see the class for the loss and what is logged."""
        loss, figures = self.objective(batch)
        self._sums.add(loss=loss, batches=1.0, **figures)
        trainer = self.trainer
        ends_step = not trainer.fit_loop._should_accumulate()
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if ends_step and (trainer.global_step + 1) % every == 0:
            self._log_training(batch.shape)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Balance the experts by what they had in this step. (A step that FiniteGuard skips has no gradients left.)"""
        self.experts.end_step(self.backbone, any(p.grad is not None for p in self.parameters()))
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % every == 0:
            for name, value in self.experts.figures(self.backbone).items():
                self.log(name, value.float())

    def _log_training(self, shape: tuple[int, int]) -> None:
        sums = self._sums.read()
        self._sums.reset()
        batches = sums["batches"]
        values = {"train/loss": sums["loss"] / batches, "train/bits": sums["nats"] / sums["count"] / math.log(2)}
        values |= {f"train/{name[4:]}": sums[name] / batches for name in sums if name.startswith("aux_")}
        # Summed over ranks already. (Lightning's sync_dist would wait at a barrier for each of them.)
        for name, value in values.items():
            self.log(name, value.float(), batch_size=shape[0])
        self.log("train/length", float(shape[1]), batch_size=shape[0])
        self.log("lr", float(self.trainer.optimizers[0].param_groups[0]["lr"]), batch_size=shape[0])

    def configure_optimizers(self) -> Any:
        """AdamW, and its schedule, which moves on with each optimiser step."""
        steps = self.trainer.max_steps  # not estimated_stepping_batches, which makes Lightning lose the loader's state
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = self.optimizer_settings.build(self, fused=self.device.type == "cuda" and not scaled)
        schedule = self.schedule.build(optimizer, steps if steps > 0 else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- evaluation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Bits per token and accuracy of a batch; see ``_evaluate``."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Bits per token and accuracy of a batch; see ``_evaluate``."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """What the model thinks of each position; rows that only fill up a batch are left out.

        Returns:
            ``nll`` ``(b t)`` float32, nats, 0 where there is no target; ``targets`` ``(b t)``; ``loss_weight``
            ``(b t)``; ``index`` ``(b)``; ``source``: where each row came from. All on the CPU.
        """
        batch = self.prepare(batch)
        if self._sequence is not None:
            raise ConfigError("predict writes rows that one process holds; set trainer.strategy=auto or ddp")
        assert batch.targets is not None
        nll = self.head.loss(self.backbone(batch).hidden, batch.targets)
        index = torch.arange(batch.shape[0]) if batch.index is None else batch.index.cpu()
        kept = index >= 0
        source = batch.source or [""] * batch.shape[0]
        values = {"nll": nll, "targets": batch.targets, "loss_weight": _weight(batch)}
        return {
            **{name: value.cpu()[kept] for name, value in values.items()},
            "index": index[kept],
            "source": [text for text, keep in zip(source, kept.tolist(), strict=True) if keep],
        }

    def _evaluate(self, batch: SequenceBatch, part: str) -> dict[str, Tensor]:
        """Log a batch, and hand callbacks what it was made of, ``(b t)`` each: ``nll`` in nats, ``right`` (whether the
        most likely token is the target), ``counted``, ``targets``."""
        batch = self._own(self.prepare(batch))
        assert batch.targets is not None
        hidden = self.backbone(batch).hidden
        counted = _weight(batch) > 0
        bits, accuracy = self.get_submodule(f"{part}_bits"), self.get_submodule(f"{part}_accuracy")
        nll, predicted = self.head.loss(hidden, batch.targets), self.head.most_likely(hidden)
        bits.update(nll, counted)  # type: ignore[operator]
        accuracy.update(predicted, batch.targets, counted)  # type: ignore[operator]
        for name, metric in (("bits", bits), ("accuracy", accuracy)):
            self.log(f"{part}/{name}", metric, on_step=False, on_epoch=True, batch_size=batch.shape[0])  # type: ignore[arg-type]
        said = {"nll": nll, "right": predicted == batch.targets, "counted": counted, "targets": batch.targets}
        return said if batch.fragment is None else {name: batch.fragment.join(value) for name, value in said.items()}

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact continuation needs beside the weights: tensors and numbers only."""
        checkpoint[SUMS_KEY] = {name: value.cpu() for name, value in self._sums.read().items()}
        checkpoint[EXPERTS_KEY] = self.experts.saved()
        if self.carried is not None:
            checkpoint[CARRIED_KEY] = self.carried.saved()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it from there."""
        self._sums.load(checkpoint.get(SUMS_KEY, {}))
        self.experts.load(checkpoint.get(EXPERTS_KEY, {}))
        if self.carried is not None:
            self.carried.load(checkpoint.get(CARRIED_KEY, {}))

    # --- description ---------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The model, for people and for JSON."""
        blocks = []
        for letter, block in zip(self.backbone.letters, self.backbone.blocks, strict=True):
            ffn = getattr(block, "ffn", None)
            blocks.append(
                {
                    "letter": letter,
                    "mixer": _mixer_name(block.mixer),  # type: ignore[arg-type]
                    "ffn": None if ffn is None else type(ffn).__name__,
                    "parameters": _count(block),
                }
            )
        return {
            "name": type(self).__name__,
            "parameters": _count(self),
            "parameters_active": _count(self) - sum(getattr(part, "idle_parameters", 0) for part in self.modules()),
            "d_model": self.backbone.embedding.embedding_dim,
            "vocab_size": self.head.vocab_size,
            "pattern": list(self.backbone.letters),
            "blocks": blocks,
            "head": {"name": "tied" if self.head.tied else "untied", "parameters": _count(self.head)},
        }


_MEANING = {
    "next": "token after each position",
    "same": "token at each hidden position",
    "pair": "text that belongs to a video",
    "label": "label of a record",
}


def check_patches(task: SequenceTask, data: Any) -> None:
    """Raise ConfigError unless the data's patches are of the size that the model was built for."""
    tubelets = getattr(data, "tubelets", None)
    size = getattr(task.backbone.patch_embedding, "size", None)
    if tubelets is not None and size is not None and tubelets.size != size:
        raise ConfigError(
            f"data.tubelets of {tubelets.time} x {tubelets.height} x {tubelets.width} x 3 are patches of "
            f"{tubelets.size} numbers, but the model's are of {size}; set "
            f"model.backbone.patches.init_args.size={tubelets.size}"
        )


def _weight(batch: SequenceBatch) -> Float[Tensor, "b t"]:
    """Weight of each position in the loss: 0 without a target."""
    assert batch.targets is not None
    known: Bool[Tensor, "b t"] = batch.targets >= 0
    return known.float() if batch.loss_weight is None else batch.loss_weight * known


def _positions(batch: SequenceBatch) -> Float[Tensor, ""]:
    """How many are not padding."""
    if batch.segment_ids is not None:
        return (batch.segment_ids != 0).sum().float()
    assert batch.targets is not None
    return torch.full((), float(batch.targets.numel()), device=batch.targets.device)  # a copy would wait for the GPU


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _mixer_name(mixer: nn.Module) -> str:
    """``Mamba2``, or ``Bidirectional(Mamba2)``."""
    inner = getattr(mixer, "forward_mixer", None)
    name = type(mixer).__name__
    return name if inner is None else f"{name}({type(inner).__name__})"
