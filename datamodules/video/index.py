"""FrameIndex: which frames a video file has and when each is on display, from its packets, without decoding any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.video.tars import Slice, span, tar_of
from seqlong.errors import ConfigError, DataError


class DecodeError(DataError):
    """A video that cannot be opened, or cannot be decoded as far as was asked.

    Attributes:
        path: the file.
        reached: frames that were read in this call before it failed.
        frames: those frames.
    """

    def __init__(self, path: Path, message: str, reached: int = 0, frames: Any = None) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.reason, self.reached, self.frames = path, message, reached, frames


def pyav() -> ModuleType:
    """PyAV, which brings FFmpeg with it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "video files are decoded with PyAV, which is not installed; pip install 'seqlong[video]'"
        ) from error
    return av


@dataclass(frozen=True)
class FrameIndex:
    """The frames of the best video stream of a file, in the order in which they are shown.

    Attributes:
        seconds: ``(n)`` float64, when each frame goes on display, from the first one on.
        stamps: ``(n)`` int64, the same in the file's own clock; frame numbers where the file has no clock.
        ends: seconds at which the last frame leaves the display.
        keys: ``(k)`` int64, the frames from which decoding can begin; the first is 0.
        seeks: ``(k)`` int64, the stamp at which to look for each of them.
        timed: False where packets have no time (some AVI): frames are then counted, at the average rate.
        rate: frames a second that the file says.
        stream: number of the stream.
    """

    seconds: NDArray[np.float64]
    stamps: NDArray[np.int64]
    ends: float
    keys: NDArray[np.int64]
    seeks: NDArray[np.int64]
    timed: bool
    rate: float
    stream: int

    def __len__(self) -> int:
        return len(self.stamps)

    def shown_at(self, seconds: NDArray[np.float64]) -> NDArray[np.int64]:
        """The number of the frame on display at each time; the first before it, the last after it."""
        # Half a microsecond: times that were computed as n / rate must find their own frame.
        found = np.searchsorted(self.seconds, np.asarray(seconds, dtype=np.float64) + 5e-7, side="right") - 1
        return np.clip(found, 0, max(len(self) - 1, 0)).astype(np.int64)

    @property
    def variable_rate(self) -> bool:
        """Whether frames are shown for times that differ by more than the file's clock rounds (a millisecond)."""
        steps = np.diff(self.seconds)
        return bool(len(steps) > 1 and steps.max() - steps.min() > 2.1e-3)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container of a file and its best video stream; closed at the end.

    Raises:
        DecodeError: there is no such file, it is no video, or it has no video stream.
    """
    container, stream = open_best(path)
    try:
        yield container, stream
    finally:
        container.close()


def open_best(path: Path) -> tuple[Any, Any]:
    """As ``opened``, for who closes the container himself."""
    if not path.is_file():
        if tar_of(path) is None:
            raise DecodeError(path, "there is no such file")
        tar, offset, size = span(path)
        if not size:
            raise DecodeError(path, "the file is empty")
        return best_of(Slice(tar, offset, size), path)
    if path.stat().st_size == 0:
        raise DecodeError(path, "the file is empty")
    return best_of(str(path.absolute()), path)


def best_of(source: Any, path: Path) -> tuple[Any, Any]:
    """The container of a file name, an address or an open file, and its best video stream; ``path`` is for messages."""
    av = pyav()
    try:
        container = _open(av, source)
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(path, f"cannot be opened as a video: {said(error)}") from error
    # FFmpeg's own choice among several, as players show it: the largest picture, roughly.
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        kinds = sorted({other.type for other in container.streams})
        container.close()
        raise DecodeError(path, f"has no video stream that can be decoded, only {', '.join(kinds) or 'nothing'}")
    return container, stream


def _open(av: Any, source: Any) -> Any:
    """Opened so that titles that are no UTF-8 do no harm; PyAV 19 takes them as they are, and has no such option."""
    try:
        return av.open(source, metadata_errors="replace")
    except TypeError:
        return av.open(source)


def said(error: Exception) -> str:
    """FFmpeg's words for an error, without file names and function names."""
    return str(getattr(error, "strerror", None) or error).strip()


def read_index(path: Path) -> FrameIndex:
    """Read every packet's header of a file: no decoding, O(frames) memory of some bytes a frame.

    Numbers that containers write in their heads are not used: they are 0 for Matroska and MPEG-TS, and wrong in files
    that were cut.

    Raises:
        DecodeError: the file cannot be opened, or has no video packets.
    """
    av = pyav()
    rows: list[tuple[int | None, int | None, bool, int]] = []
    with opened(path) as (container, stream):
        base = Fraction(stream.time_base) if stream.time_base else Fraction(1, 1)
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    rows.append((packet.pts, packet.dts, bool(packet.is_keyframe), packet.duration or 0))
        except av.error.FFmpegError:
            pass  # what is missing shows when frames are asked for
        number = stream.index
    if not rows:
        raise DecodeError(path, "has no video frames, whatever its head says")
    timed = all(row[0] is not None for row in rows)
    if not timed:
        stamps = np.arange(len(rows), dtype=np.int64)
        start = np.zeros(1, dtype=np.int64)
        return FrameIndex(stamps / rate, stamps, len(rows) / rate, start, start, False, rate, number)
    keyed = [(pts, min(pts, dts if dts is not None else pts)) for pts, dts, key, _ in rows if key and pts is not None]
    every = sorted({pts for pts, _, _, _ in rows if pts is not None})
    first = min(keyed)[0] if keyed else every[0]
    stamps = np.array([pts for pts in every if pts >= first], dtype=np.int64)  # frames before have nothing to stand on
    durations = {pts: length for pts, _, _, length in rows}
    keyed = sorted(keyed) or [(int(stamps[0]), int(stamps[0]))]
    keys = np.searchsorted(stamps, np.array([pts for pts, _ in keyed]))
    seconds = ((stamps - stamps[0]) * float(base)).astype(np.float64)
    last = durations.get(int(stamps[-1]), 0) * float(base)
    return FrameIndex(
        seconds, stamps, float(seconds[-1] + (last or 1 / rate)), keys.astype(np.int64),
        np.array([seek for _, seek in keyed], dtype=np.int64), True, rate, number,
    )  # fmt: skip
