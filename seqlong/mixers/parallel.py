"""Parallel: several mixers side by side in one block, their results added: hybrid heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqlong.kernels.norm import rms_norm
from seqlong.layout import SequenceLayout
from seqlong.mixers.attention import Attention
from seqlong.mixers.base import Mixer, MixerFactory, MixerState
from seqlong.mixers.linear import precise
from seqlong.mixers.mamba2 import Mamba2
from seqlong.mixers.routing import together

if TYPE_CHECKING:
    from seqlong.cost import Cost


@dataclass
class ParallelState(MixerState):
    """The state of every branch, in order."""

    branches: list[Any]

    def map(self, function: Callable[[Tensor], Tensor]) -> ParallelState:
        return ParallelState([branch.map(function) for branch in self.branches])

    def keep(self, rows: Bool[Tensor, "b"]) -> ParallelState:
        return ParallelState([branch.keep(rows) for branch in self.branches])


class Parallel(Mixer):
    """``y = c Σ_i β_i ⊙ RMSNorm(mixer_i(x))``: all branches read the same x; β_i is learnt, a number a channel.

    ``c`` is 1 for a sum and one over the number of branches for a mean. A mean with norms is Hymba's rule (arXiv
    2411.13676): norms, because a recurrence's results are larger than attention's; its branches share one projection
    at the end, here each has its own, before the norm. A sum without norms is Falcon-H1's (arXiv 2507.22448), whose
    multipliers are constants. Norms undo that the backbone scales projections with depth, so β starts at ``1 / √(2
    layers)`` with them, 1 without.

    Args:
        d_model: width of the residual stream.
        mixers: name -> mixer, given as class_path and init_args; ``attention`` and ``ssm``, an ``Attention`` and a
            ``Mamba2`` as they come, if not given. Names are those of the weights in checkpoints.
        combine: how the branches are put together: their ``mean`` or their ``sum``.
        norm: whether each branch's result is normed before it is scaled.
        norm_eps: added to the mean square in these norms.
    """

    def __init__(
        self,
        d_model: int,
        mixers: dict[str, MixerFactory] | None = None,
        combine: Literal["mean", "sum"] = "mean",
        norm: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        makers: dict[str, MixerFactory] = (
            {"attention": partial(Attention, heads=math.gcd(d_model, 8)), "ssm": Mamba2} if mixers is None else mixers
        )
        if len(makers) < 2:
            raise ValueError(f"Parallel needs two mixers or more, found {', '.join(makers) or 'none'}")
        branches: dict[str, Mixer] = {}
        for name, maker in makers.items():
            if not name.isidentifier() or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"Parallel needs names of letters, digits and _ for its mixers, and not a method's: found '{name}'"
                )
            try:
                branches[name] = maker(d_model)
            except ValueError as error:
                raise ValueError(f"mixers.{name}: {error}") from error
            if branches[name].reads_memory:
                raise ValueError(
                    f"mixers.{name}: {type(branches[name]).__name__} reads another block's memory, which a branch of "
                    "Parallel cannot; give it a block of its own"
                )
        self.branches = nn.ModuleDict(branches)
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.ones(d_model)) for name in branches})
        self.norm, self.norm_eps = norm, norm_eps
        self.share = 1 / len(branches) if combine == "mean" else 1.0
        self.causal = all(mixer.causal for mixer in branches.values())
        self.bounded_state = all(mixer.bounded_state for mixer in branches.values())
        self.sequence_parallel = all(mixer.sequence_parallel for mixer in branches.values())
        self.routed = any(mixer.routed for mixer in branches.values())

    def _mixers(self) -> list[Mixer]:
        return list(self.branches.values())  # type: ignore[arg-type]

    def place(self, layer: int, layers: int) -> None:
        for mixer in self._mixers():
            mixer.place(layer, layers)
        for scale in self.scales.values() if self.norm else ():
            nn.init.constant_(scale, 1 / math.sqrt(2 * layers))

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: ParallelState | None = None
    ) -> tuple[Float[Tensor, "b t d"], ParallelState | None]:
        before = [None] * len(self.branches) if state is None else state.branches
        after, mixed = [], torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        for (name, mixer), entry in zip(self.branches.items(), before, strict=True):
            scale = self.scales[name]  # by name: a ParameterDict is sorted
            branch, left = mixer(hidden, layout, entry)
            if self.norm:
                branch = rms_norm(branch, scale, self.norm_eps)
            else:
                branch = branch * precise(scale, branch).to(branch.dtype)
            mixed = mixed + self.share * branch
            after.append(left)
        return mixed, None if state is None else ParallelState(after)

    def router_sums(self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout) -> dict[str, Tensor]:
        """Those of every branch with a router, by the branch's name."""
        branches = zip(self.branches, self._mixers(), strict=True)
        return together({name: mixer.router_sums(hidden, layout) for name, mixer in branches if mixer.routed})

    def initial_state(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> ParallelState:
        return ParallelState([mixer.initial_state(rows, device, dtype) for mixer in self._mixers()])

    def cost(self, length: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See ``seqlong.cost``: that of the branches."""
        from seqlong.cost import beside, mixer_cost

        return beside([mixer_cost(mixer, length, dtype) for mixer in self._mixers()])
