"""ExpertLoads: what the blocks say of their experts and routers, counted over a step and over a row of the log."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from seqlong.backbone import Backbone
from seqlong.ffn import MoE
from seqlong.ffn.balance import dead, violation
from seqlong.metrics import world

#: What names of figures begin with: experts of a feed-forward, ``experts/<block>/<what>``; routers inside of a mixer,
#: ``routers/<block>/<what>``, of several ``routers/<block>/<name>/<what>``.
PREFIX = ("experts/", "routers/")


class ExpertLoads:
    """Counts choices of experts. After each optimiser step it moves the biases that keep a feed-forward's load even.

    Counts are whole numbers, added up over the batches of a step and over all ranks before a bias moves: what a step
    does depends neither on how many ranks there are nor on how its batches are cut. (They are no buffers of the model:
    data-parallel wrappers would copy those of the first rank onto the others.)
    """

    def __init__(self) -> None:
        self._step: dict[str, Tensor] = {}  # of this rank, since the last optimiser step
        self._row: dict[str, Tensor] = {}  # of all ranks, since the last row of the log
        self._reported = False

    def add(self, aux: dict[str, Tensor]) -> None:
        """Add what a batch of this rank said."""
        for name, value in aux.items():
            if name.startswith(PREFIX):
                before = self._step.get(name)
                self._step[name] = value.detach() if before is None else before + value.detach()

    def end_step(self, backbone: Backbone, taken: bool = True) -> None:
        """Move the biases; all ranks together.

        Args:
            backbone: whose biases.
            taken: whether the optimiser took the step; what was counted in one that it skipped is forgotten.
        """
        if self._reported:
            self._row, self._reported = {}, False
        step, self._step = self._step, {}
        if not taken or not step:
            return
        names = sorted(step)
        if world()[1] > 1:
            # One message: float64 holds these whole numbers exactly.
            sizes = [step[name].numel() for name in names]
            joined = torch.cat([step[name].reshape(-1).double() for name in names])
            dist.all_reduce(joined)
            for name, part in zip(names, joined.split(sizes), strict=True):
                step[name] = part.view(step[name].shape).to(step[name].dtype)
        for name in names:
            before = self._row.get(name)
            self._row[name] = step[name] if before is None else before.to(step[name].device) + step[name]
            place, what = name.rsplit("/", 1)
            if what == "load" and (moe := _experts(place, backbone)) is not None:
                moe.balance(step[name])

    def loads(self) -> dict[tuple[int, str], list[int]]:
        """(Block from 1, its part) -> choices of each expert since the last row of the log, over all ranks.

        Parts: ``mixer``, of several routers in it ``mixer/<name>``; ``ffn``. Routers side by side one after another.
        """
        found = {}
        for name, load in self._row.items():
            kind, number, *names, what = name.split("/")
            if what == "load":
                part = "ffn" if kind == "experts" else "/".join(["mixer", *names])
                found[int(number), part] = load.flatten().tolist()
        return dict(sorted(found.items(), key=lambda entry: (entry[0][0], entry[0][1] == "ffn", entry[0][1])))

    def figures(self, backbone: Backbone) -> dict[str, Tensor]:
        """What goes into the log, since the row before.

        For each feed-forward with experts, and for each router in a mixer: MaxVio (largest load over the mean, minus
        1), the number of experts below a hundredth of the mean, the entropy of the scores (0 to 1, the share of that of
        even scores) and the share of choices that fell on experts that do nothing.
        """
        values: dict[str, Tensor] = {}
        self._reported = True  # the next step begins another row; until then the loads can be read
        for name, load in self._row.items():
            place, what = name.rsplit("/", 1)
            if what != "load":
                continue
            moe = _experts(place, backbone)
            working = load if moe is None else load[: moe.experts.count]
            values[f"{place}/max_violation"] = violation(working)
            values[f"{place}/dead"] = dead(working)
            mean = self._row[f"{place}/entropy"] / self._row[f"{place}/positions"].clamp(min=1)
            values[f"{place}/entropy"] = mean / math.log(max(load.shape[-1], 2))
            if moe is not None and moe.identity:
                values[f"{place}/identity"] = load[moe.experts.count :].sum() / load.sum().clamp(min=1)
        return values

    def saved(self) -> dict[str, Tensor]:
        """What is counted since the last row of the log, the same on every rank. Between steps there is no more."""
        return {} if self._reported else {name: value.cpu() for name, value in self._row.items()}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go on from there."""
        self._row, self._reported = dict(saved), False


def _experts(place: str, backbone: Backbone) -> MoE | None:
    """The experts that a place such as ``experts/3`` names; None for a router in a mixer, which no bias balances."""
    kind, number = place.split("/")[:2]
    return cast(MoE, backbone.blocks[int(number) - 1].ffn) if kind == "experts" else None
