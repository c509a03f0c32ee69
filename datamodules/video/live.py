"""Frames of a video as they come: no index, no seeking, the memory of one frame. For files, pipes and addresses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.video.decode import to_rgb
from seqlong.datamodules.video.index import DecodeError, best_of, open_best, pyav, said

#: As FrameIndex: times that were computed as n / rate must find their own frame, and the end none.
_EARLY, _END = 5e-7, 1e-6


def watch(
    source: str, fps: float | None = None, short_side: int | None = None, threads: int = 1
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Seconds since the first frame, and the upright RGB picture ``(h w 3)``, one after the other.

    The same frames as ``Sampling.following`` chooses with the whole file known.

    Args:
        source: a file; ``-`` for standard input; or an address that FFmpeg opens, with ``://`` in it.
        fps: pictures a second, by time: the one that is on display; None gives every frame of the file.
        short_side: pixels of the shorter side that pictures are scaled to; None keeps theirs.
        threads: of the decoder.

    Raises:
        DecodeError: it cannot be opened, or cannot be decoded from some frame on; all before it were given.
    """
    path = Path(source)
    if source == "-":
        container, stream = best_of(sys.stdin.buffer, Path("standard input"))
    elif "://" in source:
        container, stream = best_of(source, path)
    else:
        container, stream = open_best(path)
    context = stream.codec_context
    context.thread_type, context.thread_count = ("NONE" if threads == 1 else "AUTO"), threads
    try:
        yield from _at_rate(_decoded(container, stream, path), fps, short_side)
    finally:
        container.close()


def length_of(source: str) -> float | None:
    """Seconds that a file's head says it lasts, for progress bars; None where that says nothing."""
    if source == "-" or "://" in source:
        return None
    container, _ = open_best(Path(source))
    found = container.duration
    container.close()
    return found / 1e6 if found else None


def _decoded(container: Any, stream: Any, path: Path) -> Iterator[tuple[float, float, Any]]:
    """When each frame goes on display, until when it stays there if none follows, and the frame."""
    av = pyav()
    base = float(stream.time_base or Fraction(1))
    rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
    first: int | None = None
    timed, count = True, 0
    try:
        for packet in container.demux(stream):
            if packet.is_discard:
                continue
            if first is None and packet.size:
                timed = packet.pts is not None
                if timed and not packet.is_keyframe:
                    continue  # nothing to stand on yet
                first = packet.pts if timed else 0
            for frame in packet.decode():
                if not timed:
                    yield count / rate, (count + 1) / rate, frame
                elif frame.pts is not None and first is not None and frame.pts >= first:
                    seconds = (frame.pts - first) * base
                    yield seconds, seconds + ((frame.duration or 0) * base or 1 / rate), frame
                else:
                    continue
                count += 1
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(path, f"cannot be decoded at frame {count}: {said(error)}") from error
    if not count:
        raise DecodeError(path, "has no video frames, whatever its head says")


def _at_rate(
    frames: Iterator[tuple[float, float, Any]], fps: float | None, short_side: int | None
) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    if fps is None:
        for seconds, _, frame in frames:
            yield seconds, to_rgb(frame, short_side)
        return
    held: Any = None
    picture: NDArray[np.uint8] | None = None
    ends, asked = 0.0, 0
    for seconds, until, frame in frames:
        while held is not None and asked / fps + _EARLY < seconds:
            picture = to_rgb(held, short_side) if picture is None else picture
            yield asked / fps, picture
            asked += 1
        held, picture, ends = frame, None, until
    while held is not None and asked / fps < ends - _END:
        picture = to_rgb(held, short_side) if picture is None else picture
        yield asked / fps, picture
        asked += 1
