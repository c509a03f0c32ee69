"""Divergence: weights that several processes hold must be the same on all of them, bit for bit."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqlong.errors import TrainingError

log = logging.getLogger("seqlong")

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: What is compared before the parameters.
_FIRST = ("the number of steps", "the learning rates", "the rows of the batch")


class Divergence(Callback):
    """Compare ranks every n steps, and stop the run, naming the rank and the first parameter, where they differ.

    Compared are the bits, added up as integers, of each parameter among the ranks that hold the same part of it; the
    number of steps and the learning rates among all; the rows of the batch among ranks that share them. A rank differs
    after a fault of its memory or network, or a branch of code that not all have taken; training then goes on without
    an error, each on weights of its own. (Random numbers of dropout are not the same on any two ranks.)

    The sums are copied from a GPU while it works on the next step, and compared after that, on the host: nothing waits.
    Does nothing with one process.

    Args:
        every_n_train_steps: optimiser steps between two looks; 0: none.
        stop: stop the run, or warn; null stops, but warns where only replicas of parts of weights differ (FSDP2): each
            adds up the norm of gradients by itself, and rounding may be enough.
    """

    def __init__(self, every_n_train_steps: int = 500, stop: bool | None = None) -> None:
        self.every_n_train_steps, self.stop = every_n_train_steps, stop
        self._group: Any = None
        self._names: list[str] = []
        self._keys: NDArray[np.int64] = np.empty((0, 0), np.int64)
        self._hosts: list[str] = []
        self._taken: tuple[int, list[int], Tensor, Any] | None = None
        self._looked = self._agreed = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        several = trainer.world_size > 1 and dist.is_available() and dist.is_initialized()
        if stage == "fit" and several and self.every_n_train_steps > 0:
            self._group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._group is None:
            return
        named = [(name, parameter) for name, parameter in pl_module.named_parameters()]
        self._names = [*_FIRST, *(name for name, _ in named)]
        shares = trainer.distributed_sampler_kwargs or {"rank": trainer.global_rank}
        keys = [0, 0, int(shares["rank"]), *(_part(parameter) for _, parameter in named)]
        self._keys = self._gather(torch.tensor(keys, dtype=torch.int64))
        hosts: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(hosts, socket.gethostname(), group=self._group)
        self._hosts, self._taken = hosts, None
        self._looked = self._agreed = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._group is None:
            return
        if self._taken is not None:
            taken, self._taken = self._taken, None
            self._compare(trainer, *taken)
        step = trainer.global_step
        if step == self._looked or trainer.fit_loop._should_accumulate() or step % self.every_n_train_steps:
            return
        self._looked = step
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        digest = hashlib.blake2b(np.array(rates).tobytes(), digest_size=7).digest()
        rows = getattr(batch, "inputs", batch)
        sums = [bits(parameter) for parameter in pl_module.parameters()]
        sums.insert(0, bits(rows) if isinstance(rows, Tensor) else torch.zeros_like(sums[0]))
        found = torch.stack(sums)
        # On its way while the next step is worked out, and read after that.
        kept = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda).copy_(found, non_blocking=True)
        copied = torch.cuda.Event() if found.is_cuda else None
        if copied is not None:
            copied.record()
        self._taken = step, [step, int.from_bytes(digest, "little")], kept, copied

    def _compare(self, trainer: Trainer, step: int, first: list[int], sums: Tensor, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()  # a step ago: it is there
        wrong = differing(self._keys, self._gather(torch.cat([torch.tensor(first), sums])))
        if not wrong:
            self._agreed = step
            return
        text = self._say(step, wrong)
        by_rounding = all(
            column >= len(_FIRST) and (self._keys[:, column] != self._keys[0, column]).any() for column, _, _ in wrong
        )
        if self.stop or (self.stop is None and not by_rounding):
            raise TrainingError(text)
        if trainer.is_global_zero:
            log.warning("%s", text)

    def _say(self, step: int, wrong: list[tuple[int, list[int], list[int]]]) -> str:
        ranks = Counter(rank for _, away, _ in wrong for rank in away)
        column, away, among = wrong[0]
        who = ", ".join(f"rank {rank} ({self._hosts[rank]})" for rank, _ in ranks.most_common(8))
        more = f" and {len(ranks) - 8:,} more" if len(ranks) > 8 else ""
        others = "rank " + str(next(r for r in among if r not in away)) if len(among) == 2 else "the other ranks"
        parameters = sum(number >= len(_FIRST) for number, _, _ in wrong)
        return (
            f"ranks have come apart: {who}{more} not as {others}, first in {self._names[column]} ({parameters:,} of "
            f"{len(self._names) - len(_FIRST):,} parameters), at step {step}; at step {self._agreed} they agreed. "
            "A fault of that machine, or code that not all ranks run alike. Checkpoints later than step "
            f"{self._agreed} may be wrong; go on from an earlier one, without that machine"
        )

    def _gather(self, values: Tensor) -> NDArray[np.int64]:
        every = [torch.empty_like(values) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(every, values, group=self._group)
        return torch.stack(every).numpy()


def differing(keys: NDArray[np.int64], values: NDArray[np.int64]) -> list[tuple[int, list[int], list[int]]]:
    """Columns in which ranks that hold the same have different values.

    Args:
        keys: ``(ranks, columns)``; ranks with the same number hold the same.
        values: of the same shape.

    Returns:
        the column, the ranks that differ from most of those that hold the same (of two, the second), and all of these.
    """
    found = []
    suspects = ((values != values[0]) | (keys != keys[0])).any(axis=0).nonzero()[0]
    for column in suspects.tolist():
        for key in np.unique(keys[:, column]).tolist():
            among = (keys[:, column] == key).nonzero()[0].tolist()
            counted = Counter(values[among, column].tolist())
            if len(counted) > 1:
                usual = counted.most_common(1)[0][0]  # of as many, the one of the lowest rank
                found.append((column, [rank for rank in among if values[rank, column] != usual], among))
    return found


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor, or of this process's part of it, added up as integers; on its device, without waiting."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    if local.is_complex() or local.dtype == torch.bool:
        local = torch.view_as_real(local) if local.is_complex() else local.to(torch.int8)
    return local.view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64)


def _part(parameter: Tensor) -> int:
    """A number for the part of a parameter that this process holds."""
    if not isinstance(parameter, DTensor):
        return 0
    place: Sequence[int] = parameter.device_mesh.get_coordinate() or ()
    held = [number for number, kind in zip(place, parameter.placements, strict=True) if not kind.is_replicate()]
    return int.from_bytes(hashlib.blake2b(repr(held).encode(), digest_size=7).digest(), "little")
