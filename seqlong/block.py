"""One block: norm, mixer, add; norm, feed-forward, add. And how a block is run within the memory there is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from seqlong.ffn.experts import ExpertLinear
from seqlong.ffn.moe import MoE
from seqlong.fragment import Fragment
from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer

#: The name in ``aux`` of what a mixer publishes for later blocks.
MEMORY = "memory"

#: Names in ``aux`` of what a mixer's routers did begin with it; those of a feed-forward's experts do not.
ROUTERS = "routers"

#: What is said beside a result: sums and figures, and memories.
Said = dict[str, Any]

Checkpointing = Literal["none", "selective", "block", "tiled"]

#: What a half of a block adds its result to: its input, or the norm of it.
Residual = Literal["input", "norm"]


class Block(nn.Module):
    """``h + mixer(norm(h))``, then ``h + ffn(norm(h))``; with ``residual="norm"``, ``n + mixer(n)``, n being norm(h).

    Attributes:
        publishes: whether a later block reads the memory of this one's mixer; the backbone sets it.
        one_way: whether rows are read as they are given only, not from the other end too; the backbone sets it.
    """

    publishes: bool = False
    one_way: bool = True

    def __init__(
        self, d_model: int, mixer: Mixer, ffn: nn.Module | None, norm: Callable[[int], nn.Module],
        residual: Residual = "input",
    ) -> None:  # fmt: skip
        super().__init__()
        self.mixer_norm = norm(d_model)
        self.mixer = mixer
        self.ffn_norm = None if ffn is None else norm(d_model)
        self.ffn = ffn
        self.routed = isinstance(ffn, MoE)
        self.keeps_input = residual == "input"

    def forward(
        self,
        hidden: Float[Tensor, "b t d"],
        layout: SequenceLayout,
        state: Any = None,
        memory: Any = None,
        checkpointing: Checkpointing = "none",
        tile: int = 16384,
    ) -> tuple[Float[Tensor, "b t d"], Any, Said]:
        """Run the block, keeping for the backward pass what ``checkpointing`` says.

        - ``none``: everything.
        - ``selective``: results of matrix products, attention and state scans; the cheap rest is computed again.
        - ``block``: the input of the block only.
        - ``tiled``: the input of the block only, and never more than ``tile`` positions of its inside at once: the row
          is run in tiles, with the state carried from one to the next. Exact, because a row split anywhere is the row.
          A mixer whose state grows (full attention), or whose row is shared by processes, is run whole, and only the
          feed-forward half in tiles; a feed-forward whose experts choose among positions is run whole too.

        Args:
            hidden: the residual stream.
            layout: where segments begin and end.
            state: from the window before; None keeps none.
            memory: what an earlier block's mixer published, for a mixer that reads it: cut as the row is if a position
                reads its own place only, else the mixer is run whole.
            checkpointing: see above.
            tile: positions a tile.

        Returns:
            The residual stream; the state; and what the two halves say beside: sums, those of tiles added up, figures,
            and under ``memory`` what the mixer publishes, if a later block reads it.
        """
        if checkpointing == "tiled":
            return self._in_tiles(hidden, layout, state, memory, tile)
        if checkpointing == "none" or not torch.is_grad_enabled():
            return self.both(hidden, layout, state, memory)
        context = {}
        if checkpointing == "selective":
            context["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        return _save(self.both, hidden, layout, state, memory, **context)

    def both(self, hidden: Tensor, layout: SequenceLayout, state: Any = None, memory: Any = None) -> tuple[Any, ...]:
        """Both halves, one after the other; returns as ``forward``."""
        hidden, state, said = self.mix(hidden, layout, state, memory)
        hidden, more = self.feed(hidden, layout)
        _add(said, more)
        return hidden, state, said

    def mix(
        self, hidden: Tensor, layout: SequenceLayout, state: Any = None, memory: Any = None
    ) -> tuple[Tensor, Any, Said]:
        """The first half: along the sequence."""
        said: Said = {}
        normed = self.mixer_norm(hidden)
        if self.publishes:
            mixed, state, said[MEMORY] = self.mixer.publish(normed, layout, state)
        elif layout.fragment is not None and not self.mixer.sequence_parallel:
            mixed = on_whole_rows(self.mixer, normed, layout.fragment)
        elif self.mixer.reads_memory:
            mixed, state = self.mixer(normed, layout, state, memory)
        else:
            mixed, state = self.mixer(normed, layout, state)
        if self.training and self.mixer.routed:
            for name, value in self.mixer.router_sums(normed, layout).items():
                said[name if name.endswith("_sum") else f"{ROUTERS}/{name}"] = value
        return (hidden if self.keeps_input else normed) + mixed, state, said

    def feed(self, hidden: Tensor, layout: SequenceLayout) -> tuple[Tensor, Said]:
        """The second half: along the width, each position by itself (unless its experts choose among positions)."""
        if self.ffn is None or self.ffn_norm is None:
            return hidden, {}
        normed = self.ffn_norm(hidden)
        kept = hidden if self.keeps_input else normed
        if not self.routed:
            return kept + self.ffn(normed), {}
        fed, said = self.ffn(normed, layout)
        return kept + fed, said

    def _in_tiles(
        self, hidden: Tensor, layout: SequenceLayout, state: Any, memory: Any, tile: int
    ) -> tuple[Tensor, Any, Said]:
        save = _save if torch.is_grad_enabled() else _call
        # Cut by split, whose backward joins the gradients once; that of a slice is as long as the whole row, each time.
        parts, outputs, start = hidden.split(tile, dim=1), [], 0
        in_turn = self.mixer.causal and self.mixer.bounded_state and self.feeds_each_alone
        if layout.fragment is not None or not in_turn:
            hidden, state, every = save(self.mix, hidden, layout, state, memory)
            parts = hidden.split(tile, dim=1) if self.feeds_each_alone else (hidden,)
            if len(parts) > 1:
                layout = replace(layout, fragment=None)  # each position by itself: nobody else's are asked for
            for part in parts:
                stop = start + part.shape[1]
                output, said = save(self.feed, part, layout.slice(start, stop) if len(parts) > 1 else layout)
                _add(every, said)
                outputs.append(output)
                start = stop
            return torch.cat(outputs, dim=1), state, every
        carried = state
        if carried is None:
            carried = self.mixer.initial_state(hidden.shape[0], hidden.device, hidden.dtype)
        memories = [None] * len(parts) if memory is None else memory.split(tile, dim=1)
        every, published = {}, []
        for part, remembered in zip(parts, memories, strict=True):
            stop = start + part.shape[1]
            output, carried, said = save(self.both, part, layout.slice(start, stop), carried, remembered)
            if MEMORY in said:
                published.append(said.pop(MEMORY))
            _add(every, said)
            outputs.append(output)
            start = stop
        if published:
            every[MEMORY] = torch.cat(published, dim=1)
        return torch.cat(outputs, dim=1), None if state is None else carried, every

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what is computed; how it is cut and kept stays Python."""
        for name in ("both", "mix", "feed"):
            setattr(self, name, torch.compile(getattr(self, name), *args, **kwargs))

    @property
    def causal(self) -> bool:
        """Whether no position depends on a later one."""
        return self.one_way and self.mixer.causal and self.feeds_each_alone

    @property
    def feeds_each_alone(self) -> bool:
        """Whether the second half may be run position by position."""
        return bool(getattr(self.ffn, "causal", True))

    def residual_projections(self) -> list[nn.Linear | ExpertLinear]:
        """The linear layers that write to the residual stream."""
        parts = [self.mixer] if self.ffn is None else [self.mixer, self.ffn]
        found = []
        for part in parts:
            for inner in part.modules():
                found += [inner.get_submodule(name) for name in getattr(inner, "residual_projections", ())]
        return [layer for layer in found if isinstance(layer, nn.Linear | ExpertLinear)]


def on_whole_rows(mixer: Mixer, hidden: Float[Tensor, "b n d"], fragment: Fragment) -> Float[Tensor, "b n d"]:
    """Any mixer under sequence parallelism: every process gathers the whole rows, and keeps its part of the result.

    Right for all, and no saving of the mixer's time or memory.
    """
    mixed, _ = mixer(fragment.join(hidden), fragment.whole)
    return fragment.own(mixed)


def _save(function: Callable[..., Any], *arguments: Any, **context: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **context)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _add(every: Said, said: Said) -> None:
    for name, value in said.items():
        every[name] = every[name] + value if name in every else value


_KEPT = {
    "mm", "addmm", "bmm", "linear", "scalar_decay_chunked", "scalar_decay_triton", "scalar_decay_windows",
    "bidirectional_decay_triton", "grouped_matmul", "topk", "sort",
}  # fmt: skip


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split("::")[-1].split(".")[0]
    if name in _KEPT or "attention" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
