"""From a video in a list to the pixels of a clip: decoded, scaled, cropped, augmented."""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from seqlong.datamodules.video.clips import Clip
from seqlong.datamodules.video.decode import Backend, VideoReader, open_video
from seqlong.datamodules.video.faults import MARK, Policy
from seqlong.datamodules.video.index import DecodeError, FrameIndex
from seqlong.datamodules.video.listing import Video
from seqlong.errors import ConfigError

#: Files that a process keeps open, so that a clip goes on where the one before ended.
OPEN_FILES = 8
_INHERITED: list[object] = []
# Nor may a collection in a child free readers that the parent has let go of but not yet freed.
os.register_at_fork(after_in_child=gc.freeze)


@dataclass
class Reader:
    """Reads clips in whatever process it finds itself in; files are opened there.

    Attributes:
        size: height and width of a clip.
        resize: pixels of the shorter side that pictures are scaled to before they are cropped.
        policy: what to do with a file that does not decode.
        backend: see ``open_video``.
        threads: of a decoder.
    """

    size: tuple[int, int]
    resize: int
    policy: Policy = "raise"
    backend: Backend = "auto"
    threads: int = 1
    _open: OrderedDict[Path, VideoReader] = field(default_factory=OrderedDict, repr=False)
    _process: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_process": 0}

    def file(self, path: Path) -> VideoReader:
        """A file, opened by this process."""
        if self._process != os.getpid():
            # What a parent had open belongs to the parent: never used here, nor freed, which would close it.
            _INHERITED.append(self._open)
            self._open, self._process = OrderedDict(), os.getpid()
        found = self._open.pop(path, None) or open_video(path, self.backend, self.threads)
        self._open[path] = found
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return found

    def index(self, path: Path) -> FrameIndex:
        """Which frames a file has."""
        return self.file(path).index

    def clip(self, video: Video, label: int, numbers: Any, crop: tuple[float, float], flip: bool,
             transforms: Sequence[nn.Module] = (), seed: int = 0) -> Clip:  # fmt: skip
        """Read a clip.

        Args:
            video: from the list.
            label: of it.
            numbers: called with the file's index, gives the frames to read.
            crop: where the crop lies in the room that there is, down and across, each from 0 to 1.
            flip: whether to mirror it.
            transforms: torchvision's (v2) or anything that takes and gives ``(n 3 h w)`` uint8; drawn once for all
                frames, before the crop.
            seed: of what they draw.

        Raises:
            DecodeError: the file does not decode, and the policy is ``raise``.
        """
        source = video.name
        try:
            file = self.file(video.path)
            try:
                chosen: NDArray[np.int64] = numbers(file.index)
            except ValueError as error:
                raise DecodeError(video.path, str(error)) from error
            # Frames of a short clip may be asked for again from its beginning.
            order = np.argsort(chosen, kind="stable")
            frames = file.read(chosen[order], short_side=self.resize)
            pixels = frames.pixels[np.argsort(order, kind="stable")]
            if len(chosen):
                source = f"{video.path}:{file.index.seconds[chosen[0]]:.3f}-{file.index.seconds[chosen[-1]]:.3f}"
        except DecodeError as error:
            broken = self._open.pop(video.path, None)
            if broken is not None:
                broken.close()
            if self.policy == "raise":
                raise DecodeError(
                    video.path, f"{error.reason}. Set data.broken=skip or partial to go on without it, and see seqlong "
                    "video check", error.reached,
                ) from error  # fmt: skip
            if self.policy == "skip" or error.frames is None or not len(error.frames):
                return Clip(None, source=f"{source}{MARK['skip']}{error.reason}")
            pixels = error.frames.pixels
            source = f"{source}{MARK['partial']}{error.reason}, {len(pixels)} frames"
        made = self.fit(torch.from_numpy(np.ascontiguousarray(pixels)), crop, flip, transforms, seed)
        return Clip(made, label, source)

    def fit(
        self,
        pixels: UInt8[Tensor, "n h w 3"],
        crop: tuple[float, float] = (0.5, 0.5),
        flip: bool = False,
        transforms: Sequence[nn.Module] = (),
        seed: int = 0,
    ) -> UInt8[Tensor, "n y x 3"]:
        """Pictures that are scaled already, augmented, cropped to ``size`` and mirrored; see ``clip``."""
        if transforms:
            pixels = augmented(pixels, transforms, seed)
        height, width = self.size
        if pixels.shape[1] < height or pixels.shape[2] < width:
            pixels = _enlarged(pixels, height, width)
        top, left = (round(c * (room - want)) for c, room, want in zip(crop, pixels.shape[1:3], self.size, strict=True))
        pixels = pixels[:, top : top + height, left : left + width]
        return pixels.flip(2) if flip else pixels


def _enlarged(pixels: Tensor, height: int, width: int) -> Tensor:
    by = max(height / pixels.shape[1], width / pixels.shape[2])
    size = max(height, round(pixels.shape[1] * by)), max(width, round(pixels.shape[2] * by))
    wide = nn.functional.interpolate(pixels.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True)
    return wide.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def augmented(pixels: UInt8[Tensor, "n h w 3"], transforms: Sequence[nn.Module], seed: int) -> Tensor:
    """``(n h w 3)`` uint8 after ``transforms``, each of which draws once for the whole clip, the same for one ``seed``.

    Raises:
        ConfigError: what comes out is no clip.
    """
    video = pixels.permute(0, 3, 1, 2)
    if any(type(step).__module__.startswith("torchvision.") for step in transforms):
        from torchvision import tv_tensors

        video = tv_tensors.Video(video)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in transforms:
            video = step(video)
    video = video.as_subclass(Tensor)
    if video.dim() != 4 or video.shape[1] != 3 or not len(video):
        names = ", ".join(type(step).__name__ for step in transforms)
        raise ConfigError(f"data.transforms ({names}) gave {tuple(video.shape)}; expected frames (n 3 height width)")
    if video.dtype != torch.uint8:  # a transform may give parts of 1
        video = (video.float() * 255).round().clamp(0, 255).byte()
    return video.permute(0, 2, 3, 1)


def check_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        ConfigError: something else was given.
    """
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or min(both) < 1:
        raise ConfigError(f"data.size {size} must be a number of pixels, or [height, width]")
    return both
