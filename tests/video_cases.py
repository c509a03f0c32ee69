"""Small video files made on the spot, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="video files need PyAV: pip install 'seqlong[video]'")

#: Frames are told apart by their brightness: frame n is this much brighter than the one before.
STEP = 8


def plain(count: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """``(n h w 3)`` uint8 grey pictures, each a little brighter; the left third is red, so that turns show."""
    pictures = np.zeros((count, *size, 3), dtype=np.uint8)
    pictures += (16 + STEP * np.arange(count, dtype=np.uint8) % 200)[:, None, None, None]
    pictures[:, :, : size[1] // 3] = [200, 30, 30]
    return pictures


def number_of(picture: np.ndarray) -> int:
    """Which of ``plain`` a decoded picture is."""
    return round((float(picture[..., -8:, :].mean()) - 16) / STEP)


def write_video(
    path: Path,
    count: int = 10,
    rate: int = 10,
    stamps: Sequence[int] | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    gop: int = 4,
    rotation: int = 0,
    size: tuple[int, int] = (32, 48),
    options: dict[str, str] | None = None,
    pictures: np.ndarray | None = None,
) -> Path:
    """A video of ``plain`` pictures; ``stamps`` are when each is shown, in hundredths of a second."""
    pictures = plain(count, size) if pictures is None else pictures
    options = dict(options or {"crf": "10"})
    if codec == "libx265":
        # Found with valgrind: in x265 4.2 (PyAV 18.1) Lookahead::cuTree writes past the end of its arrays for pictures
        # that are 48 wide, and the process aborts whenever the allocator comes upon it, often tests later.
        options["x265-params"] = "cutree=0:log-level=none"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], pixels
        stream.codec_context.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        if stamps is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 100)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """A sound file: no video stream at all."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
