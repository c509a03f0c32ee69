"""Which frames of a video make a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.video.decode import at_rate, evenly
from seqlong.datamodules.video.index import FrameIndex
from seqlong.errors import ConfigError

Kind = Literal["spread", "rate", "whole"]
#: Of a frame: how much of one may lack at the end of a stretch for it to count as long enough.
_SLACK = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How a clip is taken from a video.

    Attributes:
        kind: ``spread``: ``frames`` frames over all of it, each from a part of its own; ``rate``: ``frames`` frames at
            ``fps``, from a place that is drawn in training; ``whole``: from the beginning at ``fps``, up to ``frames``.
        frames: of a clip.
        fps: frames a second, by time and not by number; null takes the file's own frames, one after the other.
        short: what to do with a video that has fewer: ``pad`` the row, ``repeat`` it from its beginning, or ``error``.
    """

    kind: Kind = "spread"
    frames: int = 16
    fps: float | None = None
    short: Literal["pad", "repeat", "error"] = "pad"

    def __post_init__(self) -> None:
        if self.kind not in ("spread", "rate", "whole") or self.short not in ("pad", "repeat", "error"):
            raise ConfigError(
                f"data.sampling: kind '{self.kind}' must be spread, rate or whole, and short '{self.short}' "
                "pad, repeat or error"
            )
        if self.frames < 1 or (self.fps is not None and self.fps <= 0):
            raise ConfigError(f"data.sampling: frames {self.frames} must be 1 or more, fps {self.fps} above 0")

    def frame_numbers(
        self, index: FrameIndex, start: float = 0.0, end: float | None = None, place: float = 0.5, jitter: float = 0.5
    ) -> NDArray[np.int64]:
        """Numbers of the frames of a clip, ascending (unless repeated); fewer than ``frames`` where the video is short.

        Args:
            index: of the file.
            start: seconds, where the stretch begins.
            end: seconds; None is the end of the file.
            place: of a clip at a rate, from 0 (at the beginning) to 1 (at the end).
            jitter: of spread frames, where in its part each is, from 0 to 1.

        Raises:
            ValueError: the stretch lies behind the end of the file, or is shorter than a clip and ``short`` is error.
        """
        stop = index.ends if end is None else min(end, index.ends)
        if start >= stop:
            raise ValueError(f"the stretch from {start:g} s begins behind the end of the file at {index.ends:.3f} s")
        if self.kind == "spread":
            middles = evenly(self.frames, start, stop)
            shift = (jitter - 0.5) * (stop - start) / self.frames
            numbers = index.shown_at(middles + shift)
            if self.short == "error" and len(np.unique(numbers)) < self.frames:
                raise ValueError(f"has {len(np.unique(numbers))} frames, where {self.frames} were asked for")
            return numbers
        if self.fps is None:
            first, last = index.shown_at(np.array([start, stop - 1e-4]))
            every = np.arange(first, last + 1)
        else:
            every = index.shown_at(at_rate(self.fps, start, stop))
        if len(every) < self.frames and self.kind == "rate":
            if self.short == "error":
                raise ValueError(f"has {len(every)} frames of a clip, where {self.frames} were asked for")
            return np.resize(every, self.frames) if self.short == "repeat" else every
        if self.kind == "whole":
            return every[: self.frames]
        if self.fps is None:
            begin = round(place * (len(every) - self.frames))
            return every[begin : begin + self.frames]
        free = max(stop - start - self.frames / self.fps, 0.0)  # by time, so that every phase of the rate comes up
        begins = start + place * free
        return index.shown_at(begins + np.arange(self.frames) / self.fps)

    def clips_in(self, index: FrameIndex, start: float = 0.0, end: float | None = None) -> int:
        """Clips that follow each other in a stretch, the last one perhaps short."""
        stop = index.ends if end is None else min(end, index.ends)
        rate = self.fps if self.fps is not None else len(index) / index.ends
        return max(1, int(np.ceil(max(stop - start, 0.0) * rate / self.frames - _SLACK)))

    def following(
        self, index: FrameIndex, clip: int, start: float = 0.0, end: float | None = None
    ) -> NDArray[np.int64]:
        """Frames of clip number ``clip`` of those that follow each other without a gap."""
        stop = index.ends if end is None else min(end, index.ends)
        if self.fps is None:
            first, last = index.shown_at(np.array([start, stop - 1e-4]))
            every = np.arange(first, last + 1)
            return every[clip * self.frames : (clip + 1) * self.frames]
        times = start + np.arange(clip * self.frames, (clip + 1) * self.frames) / self.fps
        return index.shown_at(times[times < stop - 1e-6])
