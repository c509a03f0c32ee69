"""Tubelets: a clip cut into patches of time x height x width, each with its place on three axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from seqlong.errors import ConfigError

Order = Literal["space", "time"]


@dataclass(frozen=True)
class Tubelets:
    """How a clip is cut, and in which order the pieces stand in a row.

    Pixels become ``(x / 255 - mean) / deviation``, the same for all channels and all files.

    Attributes:
        time: frames of a patch.
        height: pixels.
        width: pixels.
        order: ``space`` goes through a picture line by line, then to the next in time; ``time`` follows each place
            through all of time, then goes to the next place. A row that carries state, or is causal, wants ``space``.
        mean: subtracted, in parts of 255.
        deviation: divided by.
    """

    time: int = 1
    height: int = 16
    width: int = 16
    order: Order = "space"
    mean: float = 0.45
    deviation: float = 0.25

    def __post_init__(self) -> None:
        if min(self.time, self.height, self.width) < 1:
            raise ConfigError(
                f"tubelets of {self.time} frames x {self.height} x {self.width} pixels: each must be 1 or more"
            )
        if self.order not in ("space", "time") or self.deviation <= 0:
            raise ConfigError(
                f"tubelets: order {self.order!r} must be space or time, deviation {self.deviation} above 0"
            )

    @property
    def size(self) -> int:
        """Numbers of a patch: ``time * height * width * 3``."""
        return self.time * self.height * self.width * 3

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """How many patches there are along time, height and width. The last ones in time may reach beyond the clip.

        Raises:
            ConfigError: a picture smaller than a patch, or cut by one.
        """
        if height % self.height or width % self.width or not height or not width:
            raise ConfigError(
                f"pictures of {height} x {width} do not divide into patches of {self.height} x {self.width}; set "
                f"data.size to a multiple of the patch"
            )
        return -(-frames // self.time), height // self.height, width // self.width

    def count(self, frames: int, height: int, width: int) -> int:
        """Patches of a clip."""
        t, h, w = self.grid(frames, height, width)
        return t * h * w

    def cut(self, clip: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "t p"]:
        """The patches of a clip in order. Where frames do not fill the last patches, the last frame is repeated."""
        frames, height, width, _ = clip.shape
        t, h, w = self.grid(frames, height, width)
        if t * self.time != frames:
            clip = torch.cat([clip, clip[-1:].expand(t * self.time - frames, -1, -1, -1)])
        pieces = clip.reshape(t, self.time, h, self.height, w, self.width, 3)
        # Patches first, in bytes, so that only one float copy is made.
        front = (0, 2, 4) if self.order == "space" else (2, 4, 0)
        flat = pieces.permute(*front, 1, 3, 5, 6).reshape(t * h * w, self.size)
        return flat.float().mul_(1 / (255 * self.deviation)).sub_(self.mean / self.deviation)

    def paste(self, patches: Float[Tensor, "t p"], grid: tuple[int, int, int]) -> UInt8[Tensor, "n h w 3"]:
        """The clip that patches are of: what ``cut`` is undone by."""
        t, h, w = grid
        pixels = (patches.float() * self.deviation + self.mean).mul(255).round().clamp(0, 255).byte()
        if self.order == "space":
            pieces = pixels.reshape(t, h, w, self.time, self.height, self.width, 3).permute(0, 3, 1, 4, 2, 5, 6)
        else:
            pieces = pixels.reshape(h, w, t, self.time, self.height, self.width, 3).permute(2, 3, 0, 4, 1, 5, 6)
        return pieces.reshape(t * self.time, h * self.height, w * self.width, 3)

    def positions(self, grid: tuple[int, int, int], first: int = 0) -> Int[Tensor, "t 3"]:
        """``(time, height, width)`` of each patch, counted in patches; time from ``first``."""
        t, h, w = (torch.arange(count) for count in grid)
        if self.order == "space":
            return torch.cartesian_prod(t + first, h, w)
        y, x, time = torch.cartesian_prod(h, w, t + first).unbind(1)
        return torch.stack([time, y, x], dim=1)
