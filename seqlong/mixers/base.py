"""The one contract that every mixer keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqlong.layout import SequenceLayout


class MixerState:
    """What a mixer carries from one window to the next. A dataclass of tensors whose first dimension is the row."""

    def map(self, function: Callable[[Tensor], Tensor]) -> MixerState:
        """Apply ``function`` to every tensor."""
        return type(self)(**{name: None if value is None else function(value) for name, value in vars(self).items()})

    def detach(self) -> MixerState:
        """Cut the graph: truncated backpropagation through time."""
        return self.map(Tensor.detach)

    def keep(self, rows: Bool[Tensor, "b"]) -> MixerState:
        """Keep the state of the rows that are True, and start the others afresh (zero)."""
        return self.map(
            lambda value: torch.where(rows.reshape(-1, *([1] * (value.dim() - 1))), value, torch.zeros_like(value))
        )


@dataclass
class NoState(MixerState):
    """That of a mixer which carries nothing of its own."""


class Mixer(nn.Module):
    """Moves information along the sequence.

    ``forward(hidden, layout, state)`` is the same call in training (``state=None``), for a window that follows another
    (``state`` of the window before), for prefilling (``initial_state``) and for one token (t = 1). Laws, tested for
    every mixer in ``tests/test_mixers.py``:

    - no position of a segment sees a later one (unless the mixer is declared not causal) or another segment;
    - running a row whole, or split anywhere with the state carried, gives the same;
    - padding (segment id 0) changes nothing;
    - ``state=None`` in gives None out, so that training keeps nothing that it does not need.

    Attributes:
        causal: whether position t depends on positions up to t only.
        bounded_state: whether the state keeps its size however many tokens passed, so that a row can be run in tiles.
        residual_projections: names of the linear layers that write to the residual stream; the backbone scales their
            initial weights with depth.
        routed: whether it has a router (or several), of which ``router_sums`` tells.
        reads_memory: whether it reads what a mixer of an earlier block publishes: ``forward(..., memory)``. With
            ``bounded_state``, each position reads its own place only, and a memory is cut where the row is.
        sequence_parallel: whether it can be given a layout with a ``fragment``: rows that several processes hold.
            Others are run on whole rows by each process.
        memory_width: channels of the readings ``(b t w)`` that ``publish`` gives later blocks; None if it gives none.
    """

    causal: bool = True
    bounded_state: bool = False
    residual_projections: tuple[str, ...] = ()
    routed: bool = False
    reads_memory: bool = False
    memory_width: int | None = None
    sequence_parallel: bool = False

    def place(self, layer: int, layers: int) -> None:
        """Be told, once, to be block ``layer`` (from 0) of ``layers``: for what depends on depth."""

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: Any = None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """Mix ``hidden`` along t; return the result and, if a state was given, the state after the last token."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(hidden, layout, state)")

    def publish(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: Any = None
    ) -> tuple[Float[Tensor, "b t d"], Any, Any]:
        """``forward``, and the memory that later blocks read: readings ``(b t w)``, or the keys and values ``Seen``."""
        raise NotImplementedError(f"{type(self).__name__} publishes no memory")

    def bind(self, publisher: Mixer) -> None:
        """Be told, once, whose memory is read.

        Raises:
            ValueError: it is none that this mixer can read.
        """
        raise ValueError(f"{type(self).__name__} reads no memory of another block")

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """What a ``routed`` mixer's router does with this input, for the log and the loss of training.

        Returns:
            Sums over tokens that are not padding: ``load`` ``(e)``, the choices of each expert; ``positions`` that
            chose; ``entropy`` of their scores, nats; under ``<name>/`` if there are several routers; and
            ``router_loss_sum``, of all of them, if a loss was asked for. See ``seqlong.mixers.routing``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no router")

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The state before the first token of ``rows`` rows."""
        raise NotImplementedError(f"{type(self).__name__} must define initial_state(rows, device, dtype)")


def positive(owner: str, **settings: int | float | None) -> None:
    """See that settings are above 0; None is not given.

    Raises:
        ValueError: one is not; named as in YAML.
    """
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{owner} needs {name} above 0, found {name}={value}")


#: Builds a mixer for a width. In YAML: ``{class_path: seqlong.mixers.Mamba2, init_args: {...}}``.
MixerFactory = Callable[[int], Mixer]
