"""Optimiser and learning rate: settings, parameter groups, and a schedule that is a pure function of the step."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from seqlong.errors import ConfigError

log = logging.getLogger("seqlong")

#: Parameters of recurrent mixers that are no weights of a linear map, whatever their shape: decay rates, skips, steps.
UNDECAYED_NAMES = ("A_log", "D", "dt_bias")


@dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101).

    Weight decay spares vectors and scalars (norms, biases, decay rates), ``A_log``, ``D`` and ``dt_bias`` of any shape,
    parameters marked ``_no_weight_decay``, and embeddings, tied or not. (A row of an embedding that a batch lacks would
    shrink with nothing to balance it, and small embeddings make large gradients further up: arXiv 2501.00656.) The
    fused implementation is taken on CUDA but for float16, where the scaler of gradients comes between.

    Args:
        lr: the highest learning rate.
        betas: decay of the running means of the gradient and of its square, a step.
        eps: added to the root of the mean square.
        weight_decay: share of a weight that a step takes away at learning rate 1.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def build(self, module: nn.Module, fused: bool = False) -> torch.optim.AdamW:
        """The optimiser of all trainable parameters of ``module``.

        Loading a state takes the moments from it; the settings stay these, so that what a run's configuration says is
        what happens.

        Raises:
            ConfigError: a setting is out of its range, or nothing is trainable.
        """
        if self.lr < 0 or self.eps <= 0 or self.weight_decay < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optimizer: lr {self.lr} and weight_decay {self.weight_decay} must be 0 or more, eps {self.eps} above "
                f"0, betas {tuple(self.betas)} from 0 to below 1"
            )
        groups = parameter_groups(module, self.weight_decay)
        if not groups:
            raise ConfigError(f"{type(module).__name__} has no trainable parameter")
        first, second = self.betas
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(first, second), eps=self.eps, fused=fused or None)
        # Says that step() divides gradients by the scaler's factor itself. Without a scaler there is nothing to divide,
        # but Lightning 2.6 then refuses to clip.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        optimizer.register_load_state_dict_pre_hook(_keep_settings)
        return optimizer


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter of ``module`` exactly once, in a group with weight decay or one without.

    A parameter used in several places (a tied embedding) is spared if any of them spares it.
    """
    every: dict[int, nn.Parameter] = {}
    spared: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            every[id(parameter)] = parameter
            if (
                parameter.ndim < 2
                or isinstance(owner, nn.Embedding)
                or name in UNDECAYED_NAMES
                or getattr(parameter, "_no_weight_decay", False)
            ):
                spared.add(id(parameter))
    decayed = [parameter for key, parameter in every.items() if key not in spared]
    plain = [parameter for key, parameter in every.items() if key in spared]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _keep_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    saved = state["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        return None  # torch says what does not fit
    groups = [{**ours, "params": theirs["params"]} for ours, theirs in zip(optimizer.param_groups, saved, strict=True)]
    return {**state, "param_groups": groups}


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as a share of ``optimizer.lr``. The run's length is ``trainer.max_steps``.

    Args:
        kind: what follows the warm-up. ``cosine`` falls to ``final`` along half a cosine. ``stable`` stays at the top
            and falls at the end, as 1 - sqrt (arXiv 2405.18392), so that a run can be prolonged from before the fall.
            ``constant`` stays.
        warmup_steps: optimiser steps of linear rise; null is a twentieth of the run, at most 2000.
        decay_steps: optimiser steps of the fall of ``stable``; null is a fifth of the run.
        final: share of the learning rate at the end.
    """

    kind: Literal["cosine", "stable", "constant"] = "cosine"
    warmup_steps: int | None = None
    decay_steps: int | None = None
    final: float = 0.1

    def factor(self, step: int, total: int | None) -> float:
        """Share of the learning rate in optimiser step ``step``, counted from 0, of ``total`` (None: without end).

        The last step of the warm-up has 1, the step after the run's last would have ``final``.
        """
        warmup = self.warmup(total)
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "constant" or total is None:
            return 1.0
        fall = total - warmup
        if self.kind == "stable":
            fall = min(fall, total // 5 if self.decay_steps is None else self.decay_steps)
        if step >= total:
            return self.final
        progress = 1 - (total - step) / fall if total - step < fall else 0.0
        shape = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - math.sqrt(progress)
        return self.final + (1 - self.final) * shape

    def warmup(self, total: int | None) -> int:
        """Steps of the warm-up in a run of ``total`` steps (None: without end)."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 2000 if total is None else min(2000, total // 20)

    def build(self, optimizer: torch.optim.Optimizer, total: int | None) -> StepSchedule:
        """The scheduler for a run of ``total`` optimiser steps; None is a run without end.

        Raises:
            ConfigError: a setting is out of its range, or there is no end to fall towards.
        """
        if (self.warmup_steps or 0) < 0 or (self.decay_steps or 0) < 0 or not 0 <= self.final <= 1:
            raise ConfigError(
                f"schedule: warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} must be 0 or more, "
                f"final {self.final} from 0 to 1"
            )
        if total is None and self.kind != "constant":
            raise ConfigError(
                f"schedule.kind '{self.kind}' falls towards the end of the run, but trainer.max_steps sets none; set "
                "it, or schedule.kind=constant"
            )
        if total is not None and self.warmup(total) > total:
            log.warning(
                "schedule.warmup_steps %d is more than trainer.max_steps %d: the learning rate rises to %.0f %% of "
                "optimizer.lr and never falls",
                self.warmup(total),
                total,
                100 * total / self.warmup(total),
            )
        return StepSchedule(optimizer, self, total)


class StepSchedule(LambdaLR):
    """``lr = optimizer.lr · schedule.factor(step, total)``. Its whole state is the step.

    Going on with other settings, or a longer run, gives what these say at that step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, total: int | None) -> None:
        super().__init__(optimizer, lambda step: schedule.factor(step, total))

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = int(state_dict["last_epoch"])
        self._step_count = self.last_epoch + 1
        for group, base, share in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * share(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
