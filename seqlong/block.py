"""One block: norm, mixer, add; norm, feed-forward, add. And how a block is run within the memory there is."""

from __future__ import annotations

from collections.abc import Callable
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
        aux: Said | None = None,
        memory: Any = None,
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """Run the block.

        Args:
            hidden: the residual stream.
            layout: where segments begin and end.
            state: from the window before; None keeps none.
            aux: is given what the two halves have to say of losses and loads, if that is more than their result; and
                under ``memory`` what the mixer publishes, if a later block reads it.
            memory: what an earlier block's mixer published, for a mixer that reads it.
        """
        hidden, state = self.mix(hidden, layout, state, aux, memory)
        return self.feed(hidden, layout, aux), state

    def mix(
        self, hidden: Tensor, layout: SequenceLayout, state: Any = None, aux: Said | None = None, memory: Any = None
    ) -> tuple[Tensor, Any]:
        """The first half: along the sequence."""
        normed = self.mixer_norm(hidden)
        if aux is not None and self.publishes:
            mixed, state, aux[MEMORY] = self.mixer.publish(normed, layout, state)
        elif layout.fragment is not None and not self.mixer.sequence_parallel:
            mixed = on_whole_rows(self.mixer, normed, layout.fragment)
        elif self.mixer.reads_memory:
            mixed, state = self.mixer(normed, layout, state, memory)
        else:
            mixed, state = self.mixer(normed, layout, state)
        if aux is not None and self.training and self.mixer.balance_loss:
            _add(aux, {"router_loss_sum": self.mixer.router_loss_sum(normed, layout)})
        return (hidden if self.keeps_input else normed) + mixed, state

    def feed(self, hidden: Tensor, layout: SequenceLayout, aux: Said | None = None) -> Tensor:
        """The second half: along the width, each position by itself (unless its experts choose among positions)."""
        if self.ffn is None or self.ffn_norm is None:
            return hidden
        normed = self.ffn_norm(hidden)
        kept = hidden if self.keeps_input else normed
        if not self.routed:
            return kept + self.ffn(normed)
        fed, said = self.ffn(normed, layout)
        _add(aux, said)
        return kept + fed

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


def run_block(
    block: Block,
    hidden: Float[Tensor, "b t d"],
    layout: SequenceLayout,
    state: Any = None,
    checkpointing: Checkpointing = "none",
    tile: int = 16384,
    aux: Said | None = None,
    memory: Any = None,
) -> tuple[Float[Tensor, "b t d"], Any]:
    """Run ``block``, keeping for the backward pass what ``checkpointing`` says.

    - ``none``: everything.
    - ``selective``: results of matrix products, attention and state scans; the cheap rest is computed again.
    - ``block``: the input of the block only.
    - ``tiled``: the input of the block only, and never more than ``tile`` positions of its inside at once: the row is
      run in tiles, with the state carried from one to the next. Exact, because a row split anywhere is the row. A
      mixer whose state grows (full attention) is run whole, and only the feed-forward half in tiles; a feed-forward
      whose experts choose among positions is run whole too.

    ``aux`` is given what mixer and feed-forward say beside their results: sums, and those of tiles are added up; and
    what the mixer publishes, that of tiles joined. ``memory`` is what an earlier block published, for a mixer that
    reads it: cut as the row is if a position reads its own place only, else the mixer is run whole.
    """
    if checkpointing == "none" or (checkpointing != "tiled" and not torch.is_grad_enabled()):
        return block(hidden, layout, state, aux, memory)
    save: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if not torch.is_grad_enabled():
        save = _call
    if checkpointing in ("selective", "block"):
        if checkpointing == "selective":
            save = partial(save, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))
        hidden, state, said = save(_whole, block, hidden, layout, state, memory)
        _add(aux, said)
        return hidden, state
    # Cut by split, whose backward joins the gradients once; that of a slice is as long as the whole row, each time.
    parts, outputs, start = hidden.split(tile, dim=1), [], 0
    if not (block.mixer.causal and block.mixer.bounded_state and block.feeds_each_alone):
        hidden, state, said = save(_mixed, block, hidden, layout, state, memory)
        _add(aux, said)
        parts = hidden.split(tile, dim=1) if block.feeds_each_alone else (hidden,)
        for part in parts:
            stop = start + part.shape[1]
            output, said = save(_fed, block, part, layout.slice(start, stop) if len(parts) > 1 else layout)
            _add(aux, said)
            outputs.append(output)
            start = stop
        return torch.cat(outputs, dim=1), state
    carried = state
    if carried is None:
        carried = block.mixer.initial_state(hidden.shape[0], hidden.device, hidden.dtype)
    memories = [None] * len(parts) if memory is None else memory.split(tile, dim=1)
    published = []
    for part, remembered in zip(parts, memories, strict=True):
        stop = start + part.shape[1]
        output, carried, said = save(_whole, block, part, layout.slice(start, stop), carried, remembered)
        if MEMORY in said:
            published.append(said.pop(MEMORY))
        _add(aux, said)
        outputs.append(output)
        start = stop
    if published:
        _add(aux, {MEMORY: torch.cat(published, dim=1)})
    return torch.cat(outputs, dim=1), None if state is None else carried


def _whole(block: Block, hidden: Tensor, layout: SequenceLayout, state: Any, memory: Any) -> tuple[Tensor, Any, Said]:
    said: Said = {}
    hidden, state = block(hidden, layout, state, said, memory)
    return hidden, state, said


def _mixed(block: Block, hidden: Tensor, layout: SequenceLayout, state: Any, memory: Any) -> tuple[Tensor, Any, Said]:
    said: Said = {}
    hidden, state = block.mix(hidden, layout, state, said, memory)
    return hidden, state, said


def _fed(block: Block, hidden: Tensor, layout: SequenceLayout) -> tuple[Tensor, Said]:
    said: Said = {}
    return block.feed(hidden, layout, said), said


def _add(aux: Said | None, said: Said) -> None:
    """What a run in the backward pass says goes into a dictionary of its own, so that nothing is counted twice."""
    for name, value in said.items() if aux is not None else ():
        assert aux is not None
        aux[name] = aux[name] + value if name in aux else value


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


_KEPT = {
    "mm", "addmm", "bmm", "linear", "scalar_decay_chunked", "scalar_decay_triton", "scalar_decay_windows",
    "bidirectional_decay_triton", "grouped_matmul", "topk", "sort",
}  # fmt: skip


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split("::")[-1].split(".")[0]
    if name in _KEPT or "attention" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
