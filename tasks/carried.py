"""The state that a task carries from batch to batch: truncated backpropagation through time."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from seqlong.backbone import Backbone, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import CheckpointError, ConfigError
from seqlong.metrics import world
from seqlong.state import BackboneState


class CarriedState:
    """The backbone's state after the last training batch, without its graph.

    It starts afresh where the number of rows or their length changes, and row by row where ``batch.continues`` is
    False. Saved with the rows of all ranks in the order of the whole batch, so that a run may go on with another number
    of ranks. (Rank ``r`` of ``w`` has rows ``r, r + w, ...`` of a batch.)
    """

    def __init__(self) -> None:
        self._state: BackboneState | None = None
        self._shape: tuple[int, int] | None = None
        self._loaded: list[Tensor] = []

    @staticmethod
    def check(backbone: Backbone) -> None:
        """Raise ConfigError unless every mixer's state keeps its size."""
        for number, block in enumerate(backbone.blocks, 1):
            mixer = block.mixer
            if not (mixer.causal and mixer.bounded_state):  # type: ignore[union-attr]
                kind = type(mixer).__name__
                why = "sees later tokens too" if not mixer.causal else "keeps every token it has seen"  # type: ignore[union-attr]
                raise ConfigError(
                    f"carry_state needs causal mixers whose state keeps its size, but block {number} is {kind}, which "
                    f"{why}; give attention a window, or set task.carry_state=false"
                )

    def run(self, backbone: Backbone, batch: SequenceBatch) -> BackboneOutput:
        """Run ``backbone`` on ``batch``, from the carried state, and carry on from there.

        Raises:
            ConfigError: the batch does not say which rows follow on.
        """
        if batch.continues is None:
            raise ConfigError(
                "carry_state needs batches that say which rows follow on from the batch before (continues); set "
                "data.order=stream, or task.carry_state=false"
            )
        state = self._state if self._shape == batch.shape else None
        if state is None:
            state = self._begin(backbone, batch)
        output = backbone(batch, state)
        assert output.state is not None
        # A step that went wrong is skipped; the rows that it left without a finite state start afresh.
        finite = output.hidden.detach().isfinite().flatten(1).all(dim=1)
        self._state, self._shape = output.state.detach().keep(finite), batch.shape
        return output

    def saved(self) -> dict[str, int | list[Tensor]]:
        """Length of the rows, and the tensors of all ranks (a collective). Nothing before the first batch."""
        if self._state is None or self._shape is None:
            return {}
        return {"length": self._shape[1], "tensors": [_gather_rows(value).cpu() for value in _tensors(self._state)]}

    def load(self, saved: dict[str, int | list[Tensor]]) -> None:
        """Go on from ``saved`` with the next batch, if its rows are of the same number and length."""
        self._state = None
        tensors, length = saved.get("tensors", []), saved.get("length", 0)
        assert isinstance(tensors, list) and isinstance(length, int)
        rank, ranks = world()
        self._loaded = [value[rank::ranks] for value in tensors]
        self._shape = (len(self._loaded[0]), length) if self._loaded else None

    def _begin(self, backbone: Backbone, batch: SequenceBatch) -> BackboneState:
        rows = batch.shape[0]
        weight = backbone.embedding.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        state = backbone.initial_state(rows, weight.device, dtype)
        loaded, self._loaded = self._loaded, []
        if not loaded or self._shape != batch.shape:
            return state
        # A state that has been through a batch knows which of its entries are valid.
        state = state.keep(torch.ones(rows, dtype=torch.bool, device=weight.device))
        if len(_tensors(state)) != len(loaded):
            raise CheckpointError(
                f"the checkpoint carries a state of {len(loaded)} tensors, but that of this model has "
                f"{len(_tensors(state))}; go on with the model that it was saved from"
            )
        source = iter(loaded)
        return state.map(lambda own: next(source).to(own.device))


def _tensors(state: BackboneState) -> list[Tensor]:
    found: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        found.append(value)
        return value

    state.map(note)
    return found


def _gather_rows(value: Tensor) -> Tensor:
    """``(b ...)`` of every rank -> ``(b · ranks ...)`` in the order of the whole batch."""
    ranks = world()[1]
    if ranks == 1 or value.numel() == 0:
        return value if ranks == 1 else value.repeat_interleave(ranks, dim=0)
    plain = value.contiguous().reshape(-1).view(torch.uint8)  # bytes, because not every backend moves every type
    parts = [torch.empty_like(plain) for _ in range(ranks)]
    dist.all_gather(parts, plain)
    return torch.stack([part.view(value.dtype).view(value.shape) for part in parts], dim=1).flatten(0, 1)
