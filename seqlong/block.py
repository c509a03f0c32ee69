"""One block: norm, mixer, add; norm, feed-forward, add. And how a block is run within the memory there is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from seqlong.layout import SequenceLayout
from seqlong.mixers.base import Mixer

Checkpointing = Literal["none", "selective", "block", "tiled"]


class Block(nn.Module):
    """``h + mixer(norm(h))``, then ``h + ffn(norm(h))``."""

    def __init__(self, d_model: int, mixer: Mixer, ffn: nn.Module | None, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.mixer_norm = norm(d_model)
        self.mixer = mixer
        self.ffn_norm = None if ffn is None else norm(d_model)
        self.ffn = ffn

    def forward(
        self, hidden: Float[Tensor, "b t d"], layout: SequenceLayout, state: Any = None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        hidden, state = self.mix(hidden, layout, state)
        return self.feed(hidden), state

    def mix(self, hidden: Tensor, layout: SequenceLayout, state: Any = None) -> tuple[Tensor, Any]:
        """The first half: along the sequence."""
        mixed, state = self.mixer(self.mixer_norm(hidden), layout, state)
        return hidden + mixed, state

    def feed(self, hidden: Tensor) -> Tensor:
        """The second half: along the width, each position by itself."""
        if self.ffn is None or self.ffn_norm is None:
            return hidden
        return hidden + self.ffn(self.ffn_norm(hidden))

    def residual_projections(self) -> list[nn.Linear]:
        """The linear layers that write to the residual stream."""
        parts = [self.mixer] if self.ffn is None else [self.mixer, self.ffn]
        found = []
        for part in parts:
            for inner in part.modules():
                found += [inner.get_submodule(name) for name in getattr(inner, "residual_projections", ())]
        return [layer for layer in found if isinstance(layer, nn.Linear)]


def run_block(
    block: Block,
    hidden: Float[Tensor, "b t d"],
    layout: SequenceLayout,
    state: Any = None,
    checkpointing: Checkpointing = "none",
    tile: int = 16384,
) -> tuple[Float[Tensor, "b t d"], Any]:
    """Run ``block``, keeping for the backward pass what ``checkpointing`` says.

    - ``none``: everything.
    - ``selective``: results of matrix products, attention and state scans; the cheap rest is computed again.
    - ``block``: the input of the block only.
    - ``tiled``: the input of the block only, and never more than ``tile`` positions of its inside at once: the row is
      run in tiles, with the state carried from one to the next. Exact, because a row split anywhere is the row. A
      mixer whose state grows (full attention) is run whole, and only the feed-forward half in tiles.
    """
    if checkpointing == "none" or (checkpointing != "tiled" and not torch.is_grad_enabled()):
        return block(hidden, layout, state)
    save: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if not torch.is_grad_enabled():
        save = _call
    if checkpointing == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        return save(block, hidden, layout, state, context_fn=contexts)
    if checkpointing == "block":
        return save(block, hidden, layout, state)
    # Cut by split, whose backward joins the gradients once; that of a slice is as long as the whole row, each time.
    if not (block.mixer.causal and block.mixer.bounded_state):
        hidden, state = save(block.mix, hidden, layout, state)
        return torch.cat([save(block.feed, part) for part in hidden.split(tile, dim=1)], dim=1), state
    carried = state
    if carried is None:
        carried = block.mixer.initial_state(hidden.shape[0], hidden.device, hidden.dtype)
    outputs, start = [], 0
    for part in hidden.split(tile, dim=1):
        stop = start + part.shape[1]
        output, carried = save(block, part, layout.slice(start, stop), carried)
        outputs.append(output)
        start = stop
    return torch.cat(outputs, dim=1), None if state is None else carried


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


_KEPT = {
    "mm", "addmm", "bmm", "linear", "scalar_decay_chunked", "scalar_decay_triton", "scalar_decay_windows",
    "bidirectional_decay_triton",
}  # fmt: skip


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().split("::")[-1].split(".")[0]
    if name in _KEPT or "attention" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
