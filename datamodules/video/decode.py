"""Reading frames of a video file: one interface, PyAV behind it, torchcodec where it really decodes."""

from __future__ import annotations

import functools
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seqlong.datamodules.video.index import DecodeError, open_best, pyav, read_index, said
from seqlong.datamodules.video.tars import Slice, span
from seqlong.errors import ConfigError

log = logging.getLogger("seqlong")

Backend = Literal["auto", "pyav", "torchcodec"]

#: Frames that decoding on is cheaper than a seek for: a seek throws away the decoder's state and reads anew.
SEEK_COST = 4
#: Frames that torchcodec is asked for at once, so that memory is bounded by what the caller keeps.
_AT_ONCE = 16


@dataclass
class Frames:
    """Decoded frames.

    Attributes:
        pixels: ``(n h w 3)`` uint8, RGB, upright.
        seconds: ``(n)`` float64, when each goes on display, from the first frame of the file.
        numbers: ``(n)`` int64, of each frame in the file, from 0.
    """

    pixels: NDArray[np.uint8]
    seconds: NDArray[np.float64]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)


def open_video(path: str | Path, backend: Backend = "auto", threads: int = 1) -> VideoReader:
    """Open a video file.

    Args:
        path: of the file.
        backend: ``pyav``; ``torchcodec``, where it is installed and decodes; ``auto`` is PyAV, which reads everything
            that FFmpeg reads and needs nothing else.
        threads: of the decoder, for this file. One is best where several workers read.

    Raises:
        DecodeError: the file is no video that can be read.
        ConfigError: the backend does not work here.
    """
    if backend == "torchcodec":
        problem = torchcodec_problem()
        if problem:
            raise ConfigError(f"data.backend=torchcodec does not decode here ({problem}); use backend=pyav")
        return TorchCodecReader(Path(path), threads)
    return PyAVReader(Path(path), threads)


class VideoReader:
    """An open video file. Not to be pickled or carried over a fork: open it in the process that reads.

    Attributes:
        path: the file.
        index: which frames it has, and when each is shown.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self.index = read_index(path)

    def close(self) -> None:
        """Close the file."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> Any:
        raise TypeError(f"an open video ({self.path}) cannot be sent to another process; send its path")

    def _decode(self, numbers: Sequence[int], short_side: int | None) -> Iterator[NDArray[np.uint8]]:
        raise NotImplementedError

    def read(self, numbers: Sequence[int] | range | NDArray[np.int64], short_side: int | None = None) -> Frames:
        """Frames by number.

        Args:
            numbers: of frames, in ascending order; one may stand more than once.
            short_side: pixels of the shorter side that frames are scaled to as they are decoded; None keeps theirs.

        Raises:
            DecodeError: a frame cannot be decoded; its ``frames`` are those before it.
            ValueError: numbers are not ascending, or not of frames of this file.
        """
        asked = np.asarray(numbers, dtype=np.int64)
        if asked.size and (asked[0] < 0 or asked[-1] >= len(self.index) or (np.diff(asked) < 0).any()):
            raise ValueError(f"frame numbers must ascend from 0 to below {len(self.index)}, found {asked.tolist()[:9]}")
        store: NDArray[np.uint8] | None = None
        done = 0
        try:
            for picture in self._decode(asked.tolist(), short_side):
                if store is None:
                    store = np.empty((len(asked), *picture.shape), dtype=np.uint8)
                if picture.shape != store.shape[1:]:
                    here, there = ("x".join(map(str, s[1::-1])) for s in (store.shape[1:], picture.shape))
                    raise DecodeError(self.path, f"the picture changes from {here} to {there} at frame {asked[done]}")
                store[done] = picture
                done += 1
        except DecodeError as error:
            error.reached, error.frames = done, self._frames(store, asked[:done])
            raise
        return self._frames(store, asked)

    def _frames(self, store: NDArray[np.uint8] | None, numbers: NDArray[np.int64]) -> Frames:
        pixels = np.zeros((0, 0, 0, 3), dtype=np.uint8) if store is None else store[: len(numbers)]
        return Frames(pixels, self.index.seconds[numbers], numbers)


class PyAVReader(VideoReader):
    """FFmpeg through PyAV. Keeps its place: frames that follow the last ones cost no seek."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__(path, threads)
        self._av = pyav()
        self.decoded = 0  # frames decoded so far, wanted or not: what reading really costs
        self._open()

    def _open(self) -> None:
        self.container, self.stream = open_best(self.path)
        context = self.stream.codec_context
        context.thread_type, context.thread_count = ("NONE" if self.threads == 1 else "AUTO"), self.threads
        self._may_seek = self.index.timed
        self._begin()

    def close(self) -> None:
        self.container.close()

    def _begin(self) -> None:
        """Decode from wherever the container stands."""
        self._source = self._run()
        self._held: tuple[int, Any] | None = None  # the last frame taken: its number, and itself
        self._ahead: tuple[int, Any] | None = None  # one that was decoded and is for later

    def _run(self) -> Iterator[tuple[int, Any]]:
        """Frames with their numbers, from the next key frame on."""
        keyed = not self.index.timed or len(self.index.keys) == 0
        count = 0
        for packet in self.container.demux(self.stream):
            # A seek may land between key frames; what is decoded from there is grey.
            keyed = keyed or bool(packet.is_keyframe) or packet.size == 0 or len(self.index.keys) == 1
            if not keyed:
                continue
            for frame in packet.decode():
                self.decoded += 1
                if not self.index.timed:
                    yield count, frame
                    count += 1
                elif frame.pts is not None:
                    number = int(np.searchsorted(self.index.stamps, frame.pts, side="right")) - 1
                    if number >= 0:
                        yield number, frame

    def _from_start(self) -> None:
        self.container.close()
        may_seek = self._may_seek
        self._open()
        self._may_seek = may_seek

    def _frame(self, number: int) -> Any:
        """The frame on display as ``number`` is due."""
        stands = -1 if self._held is None else self._held[0]
        key = int(np.searchsorted(self.index.keys, number, side="right")) - 1
        start = int(self.index.keys[key])
        if stands == number and self._held is not None:
            return self._held[1]
        if number < stands or (self._may_seek and start > stands + SEEK_COST):
            if self._may_seek:
                self.container.seek(int(self.index.seeks[key]), stream=self.stream, backward=True)
                self._begin()
            else:
                self._from_start()
        found = self._search(number)
        if found is None and self._held is None and self._may_seek and start > 0:
            self._may_seek = False  # this container's seeks land behind what they were asked for
            self._from_start()
            found = self._search(number)
        if found is None:
            upto = "before its first frame" if self._held is None else f"after frame {self._held[0]}"
            raise DecodeError(
                self.path, f"ends {upto}, where frame {number} of {len(self.index)} was asked for: cut or damaged"
            )
        return found

    def _search(self, number: int) -> Any | None:
        """Decode on to ``number``. A frame that the decoder left out is the one before it, as on a screen; None at the
        end of the file, or where decoding began behind it."""
        while True:
            if self._ahead is None:
                self._ahead = next(self._source, None)
            if self._ahead is None or self._ahead[0] > number:
                behind = self._held is not None and self._ahead is not None
                return self._held[1] if behind and self._held is not None else None
            self._held, self._ahead = self._ahead, None
            if self._held[0] == number:
                return self._held[1]

    def _decode(self, numbers: Sequence[int], short_side: int | None) -> Iterator[NDArray[np.uint8]]:
        for number in numbers:
            try:
                frame = self._frame(number)
                picture = to_rgb(frame, short_side)
            except (self._av.error.FFmpegError, ValueError) as error:
                raise DecodeError(self.path, f"cannot be decoded at frame {number}: {said(error)}") from error
            yield picture


def to_rgb(frame: Any, short_side: int | None = None) -> NDArray[np.uint8]:
    """A PyAV frame as upright RGB ``(h w 3)``.

    The matrix (BT.601, BT.709, ...) and the range are those that the frame names, and 10 bits become 8. What is
    transparent is laid over black.

    Args:
        frame: from PyAV.
        short_side: pixels of the shorter side of the result; None keeps the size.
    """
    pieces = frame.format.components
    alpha = frame.format.name == "pal8" or any(piece.is_alpha for piece in pieces)
    height, width = (frame.height, frame.width) if short_side is None else scaled(frame.height, frame.width, short_side)
    resized = (height, width) != (frame.height, frame.width)
    if max(piece.bits for piece in pieces) > 8:
        # FFmpeg's scale filter and not its bare scaler, whose defaults for deep pixels smear colour at edges.
        frame = _through_filters(frame, height, width, "rgba" if alpha else "rgb24")
        resized = False
    size = {"height": height, "width": width, "interpolation": "AREA"} if resized else {}
    # One thread: PyAV 19 keeps its scaler from frame to frame, and a forked worker would wait for the parent's threads.
    picture = frame.to_ndarray(format="rgba" if alpha else "rgb24", threads=1, **size)
    if alpha:
        opaque = picture[..., 3:].astype(np.uint16)
        picture = ((picture[..., :3] * opaque + 127) // 255).astype(np.uint8)
    # The display matrix turns counter-clockwise for positive angles, as rot90 does.
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


def _through_filters(frame: Any, height: int, width: int, form: str) -> Any:
    graph = pyav().filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    steps = [source, graph.add("scale", f"{width}:{height}"), graph.add("format", form), graph.add("buffersink")]
    for before, after in pairwise(steps):
        before.link_to(after)
    graph.configure()
    graph.push(frame)
    return graph.pull()


def scaled(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the shorter of them ``short_side``, the shape kept."""
    by = short_side / min(height, width)
    return max(1, round(height * by)), max(1, round(width * by))


class TorchCodecReader(VideoReader):
    """FFmpeg through torchcodec: the same frames, chosen by the same index."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__(path, threads)
        from torchcodec.decoders import VideoDecoder

        try:
            source: str | bytes = str(path) if path.is_file() else Slice(*span(path)).read()
            self.decoder: Any = VideoDecoder(source, num_ffmpeg_threads=threads, dimension_order="NHWC")
        except (RuntimeError, ValueError) as error:
            raise DecodeError(path, f"cannot be opened by torchcodec: {str(error).splitlines()[0]}") from error
        if len(self.decoder) != len(self.index):
            raise DecodeError(path, f"torchcodec counts {len(self.decoder)} frames, PyAV {len(self.index)}; use pyav")

    def close(self) -> None:
        self.decoder = None

    def _decode(self, numbers: Sequence[int], short_side: int | None) -> Iterator[NDArray[np.uint8]]:
        for first in range(0, len(numbers), _AT_ONCE):
            part = list(numbers[first : first + _AT_ONCE])
            try:
                pixels = self.decoder.get_frames_at(part).data
            except (RuntimeError, IndexError):
                yield from self._one_by_one(part, short_side)
                continue
            yield from _resized(pixels, short_side)

    def _one_by_one(self, numbers: Sequence[int], short_side: int | None) -> Iterator[NDArray[np.uint8]]:
        for number in numbers:
            try:
                pixels = self.decoder.get_frames_at([number]).data
            except (RuntimeError, IndexError) as error:
                why = str(error).splitlines()[0]
                raise DecodeError(self.path, f"cannot be decoded at frame {number}: {why}") from error
            yield from _resized(pixels, short_side)


def _resized(pixels: Any, short_side: int | None) -> Iterator[NDArray[np.uint8]]:
    """``(n h w 3)`` uint8 tensor -> pictures."""
    if short_side is not None:
        import torch.nn.functional as F

        size = scaled(pixels.shape[1], pixels.shape[2], short_side)
        small = F.interpolate(pixels.permute(0, 3, 1, 2).float(), size=size, mode="area")
        pixels = small.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    yield from pixels.contiguous().numpy()


@functools.cache
def torchcodec_problem() -> str:
    """Why torchcodec does not decode here; empty where it does. Found out by decoding a clip: that it can be imported
    says nothing, since it looks for FFmpeg only as it opens a file."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        return f"it cannot be imported: {str(error).strip().splitlines()[0]}"
    try:
        frame = VideoDecoder(_one_frame())[0]
    except (RuntimeError, OSError, ValueError) as error:
        return f"it cannot open a clip: {str(error).strip().splitlines()[0]}"
    return "" if tuple(frame.shape) == (3, 32, 32) else f"it decoded a clip as {tuple(frame.shape)}"


def _one_frame() -> bytes:
    """A video of one frame, 32x32."""
    av = pyav()
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        grey = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 128, np.uint8), format="rgb24")
        container.mux(stream.encode(grey))
        container.mux(stream.encode(None))
    return file.getvalue()


def evenly(count: int, start: float, stop: float) -> NDArray[np.float64]:
    """``count`` times at the middles of equal parts of ``[start, stop)``, seconds."""
    return start + (np.arange(count) + 0.5) * (stop - start) / count


def at_rate(fps: float, start: float, stop: float) -> NDArray[np.float64]:
    """Times ``1 / fps`` apart in ``[start, stop)``, seconds; at least one."""
    return start + np.arange(max(1, math.ceil((stop - start) * fps - 1e-6))) / fps
