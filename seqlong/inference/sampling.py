"""How a symbol is drawn from what a model says: temperature, the k likeliest, the likeliest with some probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from seqlong.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a symbol is drawn.

    Attributes:
        temperature: logits are divided by this; below 1 likely ones become likelier, 0 takes the likeliest always.
        top_k: only so many of the likeliest; 0 for all.
        top_p: only the likeliest that have this probability together; 1 for all.
        seed: names the draw.

    Raises:
        ConfigError: a setting is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise ConfigError(f"--temperature is {self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}; expected above 0 and up to 1")
        if self.top_k < 0:
            raise ConfigError(f"--top-k is {self.top_k}; expected 0 (all) or more")

    def probabilities(self, logits: Float[Tensor, "b y"]) -> Float[Tensor, "b y"]:
        """What each symbol is drawn with, float64."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
        shares = (logits / self.temperature).softmax(dim=-1)
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(dim=-1) - ordered < self.top_p  # the first that pass it are in
        if self.top_k:
            kept[..., self.top_k :] = False
        shares = torch.zeros_like(shares).scatter(-1, order, ordered * kept)
        return shares / shares.sum(dim=-1, keepdim=True)
