"""StartingStates: rows of training that start from a state, not from zero, so that a model learns to live with states
that no row of its training would have led to."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqlong.backbone import Backbone, BackboneOutput
from seqlong.batch import SequenceBatch
from seqlong.errors import CheckpointError, ConfigError
from seqlong.metrics import world
from seqlong.state import BackboneState
from seqlong.tasks.carried import _gather_rows
from seqlong.tasks.masking import draw

Start = Literal["zero", "passed", "noise"]

_WHICH, _NOISE = 30, 31  # streams of random numbers; others: ``masking``, ``rearranging``, ``mixed_objectives``
_KEPT = 0.9  # of the moments of states, from batch to batch


class StartingStates:
    """Initial states of the rows of training, for models that are to read rows far longer than those.

    A recurrence that was trained from zero on rows of L tokens has only seen states that L tokens can lead to; behind
    them it may do anything. Here a share of rows starts from the state that another, unrelated row was left in (the row
    at the same place of the batch before), or from Gaussian noise with the mean and deviation that such states have, by
    head. No gradient goes back into them. Attention has no state to start from: its blocks begin as always. Where
    several documents share a row, the first goes on from the state. Source: arXiv 2507.02782.

    Args:
        kind: ``passed`` or ``noise``.
        share: of rows that start so, by (seed, sample number).
        seed: names the draws.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, kind: Start, share: float, seed: int) -> None:
        if kind not in ("passed", "noise") or not 0 < share <= 1:
            raise ConfigError(
                f"task.start is '{kind}' and task.start_share {share}; expected zero, passed or noise, and a share "
                "above 0 and up to 1"
            )
        self.kind, self.share, self.seed = kind, share, seed
        self._left: list[Tensor] = []  # what the batch before left, position first, or the moments of such states
        self._rows = 0

    @staticmethod
    def check(backbone: Backbone) -> None:
        """Raise ConfigError unless some block has a state to start from."""
        if backbone.strands is not None or not all(block.mixer.causal for block in backbone._blocks()):
            raise ConfigError("task.start needs causal mixers; set task.start=zero")
        if not any(_recurrent(block.mixer.initial_state(1, "cpu", torch.float32)) for block in backbone._blocks()):
            raise ConfigError(
                "task.start gives recurrences a state to start from, but every block of this model keeps tokens, not a "
                "state; set task.start=zero"
            )

    def run(self, backbone: Backbone, batch: SequenceBatch) -> BackboneOutput:
        """Run ``backbone`` on ``batch``, from such states, and remember what it leaves."""
        if batch.index is None:
            raise ConfigError("task.start needs batches with index; set task.start=zero")
        rows, weight = batch.shape[0], backbone.embedding.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else None
        state = backbone.initial_state(rows, weight.device, dtype or weight.dtype)
        for number, block in enumerate(state.blocks):
            if not _recurrent(block):
                state.blocks[number] = None  # as in a run without states: attention takes its fast path
        own = [state.position, *_floating(state)]
        place = torch.zeros(1, dtype=torch.int64, device=weight.device)
        chosen = draw(self.seed, _WHICH, batch.index, place)[:, 0] < self.share * (1 << 53)
        found = self._starts(own, batch.index, chosen)
        source = iter(found[1:])
        state.position = found[0]
        state.blocks = [None if block is None else _with(block, source) for block in state.blocks]
        output = backbone(dataclasses.replace(batch, continues=None), state)
        assert output.state is not None
        finite = output.hidden.detach().isfinite().flatten(1).all(dim=1)
        self._remember([output.state.position, *_floating(output.state)], finite)
        return BackboneOutput(output.hidden, aux=output.aux)

    def _starts(self, own: list[Tensor], index: Int[Tensor, "b"], chosen: Bool[Tensor, "b"]) -> list[Tensor]:
        """Position and states of each row."""
        if not self._left or (self.kind == "passed" and self._rows != len(index)):
            return own
        if len(self._left) != len(own):
            raise CheckpointError(
                f"the checkpoint has {len(self._left)} states to start from, but this model {len(own)}; go on with the "
                "model that it was saved from"
            )
        left = [value.to(one.device) for value, one in zip(self._left, own, strict=True)]
        made = left if self.kind == "passed" else [own[0], *(
            self._noise(one, moments, index, number)
            for number, (one, moments) in enumerate(zip(own[1:], left[1:], strict=True))
        )]  # fmt: skip
        return [torch.where(_rows(chosen, one), new.to(one.dtype), one) for new, one in zip(made, own, strict=True)]

    def _noise(self, one: Tensor, moments: Float[Tensor, "2 ..."], index: Int[Tensor, "b"], number: int) -> Tensor:
        """Gaussian numbers like a state, a function of sample and place."""
        size = one[0].numel()
        here = torch.arange(size, device=one.device) + 2 * number * (1 << 32)
        uniform = [
            (draw(self.seed, _NOISE, index, here + half * (1 << 32)).double() + 0.5) / (1 << 53) for half in range(2)
        ]
        normal = (-2 * uniform[0].log()).sqrt() * (2 * torch.pi * uniform[1]).cos()
        mean, square = moments[0], moments[1]
        return normal.view(one.shape) * (square - mean**2).clamp(min=0).sqrt() + mean

    def _remember(self, tensors: list[Tensor], finite: Bool[Tensor, "b"]) -> None:
        kept = [torch.where(_rows(finite, one), one.detach(), 0) for one in tensors]
        self._rows = len(finite)
        if self.kind == "passed":
            self._left = kept
            return
        count = finite.sum().double()
        moments = [_moments(value.double()) for value in kept[1:]]
        every = torch.cat([count[None], *(one.flatten() for one in moments)])
        if world()[1] > 1:
            dist.all_reduce(every)
        sizes = [one.numel() for one in moments]
        parts = (every[1:] / every[0].clamp(min=1)).split(sizes)
        now = [tensors[0][:0], *(part.view(one.shape) for part, one in zip(parts, moments, strict=True))]
        if self._left and bool(every[0] > 0):
            before = (value.to(one.device) for value, one in zip(self._left, now, strict=True))
            now = [_KEPT * old + (1 - _KEPT) * new for old, new in zip(before, now, strict=True)]
        self._left = now

    def saved(self) -> dict[str, Any]:
        """All there is to remember, of the rows of all ranks (a collective)."""
        if not self._left:
            return {}
        gathered = [_gather_rows(one) for one in self._left] if self.kind == "passed" else self._left
        return {"kind": self.kind, "tensors": [one.cpu() for one in gathered]}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from ``saved``, if it is of this kind."""
        self._left, self._rows = [], 0
        if saved.get("kind") != self.kind:
            return
        rank, ranks = world()
        step = slice(rank, None, ranks) if self.kind == "passed" else slice(None)
        self._left = [value[step] for value in saved["tensors"]]
        self._rows = len(self._left[0])


def _moments(value: Float[Tensor, "b ..."]) -> Float[Tensor, "2 ..."]:
    """Sums over rows of a state and of its square: by head for states ``(b h k v)``, else number by number."""
    both = torch.stack([value, value**2])
    if value.dim() > 3:
        both = both.mean(dim=tuple(range(3, both.dim())), keepdim=True)
    return both.sum(dim=1)


def _rows(rows: Bool[Tensor, "b"], like: Tensor) -> Tensor:
    return rows.view(-1, *([1] * (like.dim() - 1)))


def _parts(block: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        found.append(value)
        return value

    block.map(note)
    return found


def _recurrent(block: Any) -> bool:
    """Whether a mixer's first state is a recurrence's: floating numbers of a fixed size, no cache that begins empty."""
    parts = _parts(block)
    return bool(parts) and all(part.numel() and part.is_floating_point() for part in parts)


def _floating(state: BackboneState) -> list[Tensor]:
    return [part for block in state.blocks if block is not None for part in _parts(block)]


def _with(block: Any, source: Any) -> Any:
    return block.map(lambda one: next(source))
