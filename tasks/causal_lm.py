"""CausalLM: predict the token after each position from those up to it."""

from __future__ import annotations

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.errors import ConfigError
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks.base import SequenceTask


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

    def prepare(self, batch: SequenceBatch) -> SequenceBatch:
        if batch.targets is None:
            raise ConfigError("CausalLM needs batches with targets; set data.targets=next")
        return batch
