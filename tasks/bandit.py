"""Bandit: which objective to train on, by how much each one still gets better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from seqlong.errors import ConfigError
from seqlong.metrics import world


@dataclass(frozen=True)
class Reward:
    """How shares follow what is learnt.

    Attributes:
        every: batches of a period, over which losses are compared.
        momentum: how much of an objective's value is kept from one period to the next.
        sharpness: shares are proportional to ``weight · exp(sharpness · value)``, values between -1 and 1.
        floor: part of its ``weight`` share that an objective always keeps, so that it is never forgotten.
    """

    every: int = 25
    momentum: float = 0.7
    sharpness: float = 2.0
    floor: float = 0.25


class Bandit:
    """Shares of objectives, moved by rewards.

    After every period the reward of objective a is how much better it got,
    ``r_a = (loss_a before - loss_a now) / loss_a before``, scaled by the largest of them to lie in [-1, 1]; its value
    follows, ``v_a <- m v_a + (1 - m) r_a``, and its share is
    ``f w_a + (1 - f) w_a exp(s v_a) / Σ w exp(s v)``, ``w`` the weights, which sum to 1. The whole state is a few
    numbers, in every checkpoint; all ranks have the same. Source: rewards by loss progress, arXiv 1704.03003; over
    objectives, arXiv 2411.01030.

    Args:
        weights: of the objectives, in any unit.
        reward: see ``Reward``; None keeps the shares at the weights.
    """

    def __init__(self, weights: Sequence[float], reward: Reward | None) -> None:
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(f"objectives need weights of 0 or more, and one above, found {list(weights)}")
        if reward is not None and (
            reward.every < 1 or not 0 <= reward.momentum < 1 or reward.sharpness < 0 or not 0 <= reward.floor <= 1
        ):
            raise ConfigError(
                "reward needs every of 1 or more, momentum from 0 and below 1, sharpness of 0 or more and floor from 0 "
                f"to 1, found {reward}"
            )
        self.reward = reward
        self._weights = torch.tensor(list(weights), dtype=torch.float64) / sum(weights)
        self._sums = torch.zeros(2, len(weights), dtype=torch.float64)
        self._before = torch.full((len(weights),), math.nan, dtype=torch.float64)
        self._values = torch.zeros(len(weights), dtype=torch.float64)
        self._batches = 0

    @property
    def shares(self) -> Float[Tensor, "a"]:
        """Of the rows, on the CPU."""
        if self.reward is None:
            return self._weights
        pulled = self._weights * torch.exp(self.reward.sharpness * self._values)
        return self.reward.floor * self._weights + (1 - self.reward.floor) * pulled / pulled.sum()

    @property
    def bits(self) -> Float[Tensor, "a"]:
        """Of each objective in the last period that had it, per token that was asked; NaN before its first."""
        return self._before / math.log(2)

    def add(self, chosen: Int[Tensor, "b"], nats: Float[Tensor, "b"], asked: Float[Tensor, "b"]) -> None:
        """A batch: the objective of each row, its loss and how many tokens were asked."""
        if self._sums.device != nats.device:
            self._sums = self._sums.to(nats.device)
        self._sums.index_add_(1, chosen, torch.stack([nats, asked]).double())
        self._batches += 1
        period = 25 if self.reward is None else self.reward.every
        if self._batches == period:
            self._end()

    def _end(self) -> None:
        sums = self._sums.clone()
        if world()[1] > 1:
            dist.all_reduce(sums)
        nats, asked = sums.cpu()
        now = nats / asked  # NaN where nothing was asked
        self._sums.zero_()
        self._batches = 0
        gained = ((self._before - now) / self._before).nan_to_num(0.0, 0.0, 0.0)
        self._before = torch.where(now.isfinite(), now, self._before)
        if self.reward is not None:
            scaled = gained / gained.abs().max().clamp(min=1e-12)
            keep = self.reward.momentum
            tried = asked > 0
            self._values = torch.where(tried, keep * self._values + (1 - keep) * scaled, self._values)

    def saved(self) -> dict[str, Tensor | int]:
        """All there is to remember; the sums of all ranks (a collective)."""
        sums = self._sums.clone()
        if world()[1] > 1:
            dist.all_reduce(sums)
        return {"sums": sums.cpu(), "before": self._before, "values": self._values, "batches": self._batches}

    def load(self, saved: dict[str, Tensor | int]) -> None:
        """Go on from ``saved``, if it is of as many objectives."""
        if not saved or len(saved["values"]) != len(self._values):  # type: ignore[arg-type]
            return
        sums, before, values = (saved[name] for name in ("sums", "before", "values"))
        assert isinstance(sums, Tensor) and isinstance(before, Tensor) and isinstance(values, Tensor)
        # One rank has the sums of all, so that together they are what they were.
        self._sums = sums.clone() if world()[0] == 0 else torch.zeros_like(sums)
        self._before, self._values, self._batches = before.clone(), values.clone(), int(saved["batches"])
