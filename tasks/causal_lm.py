"""CausalLM: predict the token after each position from those up to it."""

from __future__ import annotations

from typing import Any

from seqlong.backbone import BackboneConfig, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask
from seqlong.tasks.starting import Start, StartingStates

#: Where a checkpoint holds the states that rows start from.
STARTING_KEY = "seqlong_starting_states"


class CausalLM(SequenceTask):
    """Causal language modelling: ``Σ -ln p(x_{t+1} | x_1 ... x_t)``. The data gives the targets (data.targets=next).

    The loss is exact over ranks. With gradient accumulation each batch is divided by its own weight.

    Args:
        backbone: the architecture. Every mixer must be causal.
        optimizer: AdamW's settings.
        schedule: the learning rate over the run.
        tie_embeddings: whether the last projection is the embedding's weight, or one of its own.
        z_loss: weight of the squared log-normaliser in the training loss, 0 for none, 1e-4 where logits drift. It then
            counts in train/bits too, never in evaluation.
        carry_state: start each row from the state that its window before left, without gradients across (truncated
            backpropagation through time). The data must be ordered for it, as data.order=stream is.
        compile: compile each block with torch.compile: a slow first step, then faster ones on a GPU.
        start: what rows of training start from: ``zero``, as in use; ``passed``, the state that an unrelated row was
            left in; ``noise`` like such states. The last two keep recurrences steady on rows far longer than those of
            training (arXiv 2507.02782).
        start_share: of the rows, that start so; the others start from zero.

    Raises:
        ConfigError: a mixer sees later tokens.
    """

    targets = "next"

    def __init__(
        self,
        backbone: BackboneConfig,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        tie_embeddings: bool = True,
        z_loss: float = 0.0,
        carry_state: bool = False,
        compile: bool = False,
        start: Start = "zero",
        start_share: float = 0.8,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, tie_embeddings, z_loss, carry_state, compile)
        if self.backbone.strands is not None:
            raise ConfigError(
                "CausalLM predicts the next token, but with model.backbone.rc=equivariant the other strand sees it; "
                "set model.backbone.rc=none, or use task=masked_lm"
            )
        for number, block in enumerate(self.backbone.blocks, 1):
            if not block.mixer.causal:  # type: ignore[union-attr]
                raise ConfigError(
                    f"CausalLM predicts the next token, but block {number} ({type(block.mixer).__name__}) sees it; "
                    "make every mixer causal, or use task=masked_lm"
                )
        self.starting = None if start == "zero" else StartingStates(start, start_share, seed=0)
        if self.starting is not None:
            if carry_state:
                raise ConfigError(
                    f"task.carry_state goes on from the batch before, and task.start={start} from something else; set "
                    "task.start=zero, or task.carry_state=false"
                )
            StartingStates.check(self.backbone)

    def _run(self, batch: SequenceBatch) -> BackboneOutput:
        return super()._run(batch) if self.starting is None else self.starting.run(self.backbone, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.starting is not None:
            checkpoint[STARTING_KEY] = self.starting.saved()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.starting is not None:
            self.starting.load(checkpoint.get(STARTING_KEY, {}))

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        if batch.targets is None:
            raise ConfigError("CausalLM needs batches with targets; set data.targets=next")
        return batch
