"""``seqlong video stream``: endless video through a model in constant memory, the state carried from clip to clip."""

from __future__ import annotations

import csv
import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from seqlong.batch import SequenceBatch
from seqlong.datamodules.video.index import DecodeError
from seqlong.datamodules.video.live import length_of, watch
from seqlong.datamodules.video.reading import Reader, check_size
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.errors import ConfigError
from seqlong.inference.arguments import Parser, integer, open_model, progress
from seqlong.inference.model import Model
from seqlong.tasks.video_classification import VideoClassification
from seqlong.tasks.video_patches import VideoPrediction

log = logging.getLogger("seqlong")

HELP = """Runs a video of any length through a model, clip by clip, the state carried on: what comes out for a frame
is what one pass over the whole video gives, in the memory of one clip. A row of the output is a step of time: the
frames of a patch.

Classification: the probabilities of the classes after each step. Prediction of what comes next: how wrong it was about
this step (mean square error), so that cuts and surprises stand out. All models: hidden states, with --embeddings."""
EXAMPLES = """examples:
  seqlong video stream day.mp4 --ckpt last --out day.csv
  seqlong video stream day.mp4 --ckpt last --embeddings day.npy --frames 64
  ffmpeg -i rtsp://camera -c copy -f mpegts - | seqlong video stream - --ckpt best > camera.csv"""


@dataclass
class Steps:
    """What a model makes of the steps of time of a clip.

    Attributes:
        hidden: ``(n d)`` float32, the mean over each step's patches.
        figures: name -> ``(n)`` numbers; NaN where there is nothing to say yet.
    """

    hidden: Float[Tensor, "n d"]
    figures: dict[str, NDArray[np.float64]]


class Watcher:
    """A model that watches a video: clips go in one after the other, figures of each step of time come out.

    Args:
        model: causal, its states of a size that does not grow, reading patches.
        tubelets: how clips are cut.
        names: of the classes; numbers where they are too few.
        window: steps of time that a classifier's mean goes over; None: all since the beginning.

    Raises:
        ConfigError: the model cannot do that.
    """

    def __init__(self, model: Model, tubelets: Tubelets, names: Sequence[str] = (), window: int | None = None) -> None:
        self.model, self.tubelets, self.task = model, tubelets, model.task
        if model.backbone.patch_embedding is None:
            raise ConfigError(f"{model.path} reads tokens, not video; train one with experiment=video/stream")
        if model.backbone.patch_embedding.size != tubelets.size:
            raise ConfigError(
                f"{model.path} reads patches of {model.backbone.patch_embedding.size} numbers, but tubelets of "
                f"{tubelets.time} x {tubelets.height} x {tubelets.width} x 3 have {tubelets.size}"
            )
        if tubelets.order != "space":
            raise ConfigError(f"{model.path} was trained with tubelets.order=time: its rows cannot go on in time")
        if not model.bounded:
            raise ConfigError(
                f"{model.path} sees later frames or keeps every patch it has seen, so memory would grow; "
                "train with causal mixers, and give attention a window"
            )
        self.names = list(names)
        self.state = model.initial_state()
        self.steps = 0  # of time, seen so far
        self._sums: deque[Tensor] = deque(maxlen=window)  # of hidden states, a step each, where the mean has a window
        self._window, self._total, self._count = window, torch.zeros(()), 0
        self._expected: deque[Tensor] = deque()  # patches that were predicted for steps to come

    @torch.no_grad()
    def watch(self, clip: UInt8[Tensor, "n h w 3"]) -> Steps:
        """Go on with the next frames."""
        grid = self.tubelets.grid(*clip.shape[:3])
        count, places = grid[0], grid[1] * grid[2]
        patches = self.tubelets.cut(clip)[None].to(self.model.device)
        if self.model.precision == "float64":
            patches = patches.double()
        positions = self.tubelets.positions(grid, self.steps)[None].to(self.model.device)
        with self.model.products():
            output = self.model.backbone(SequenceBatch(patches=patches, positions=positions), self.state)
            assert output.state is not None
            self.state = output.state
            hidden = output.hidden[0].unflatten(0, (count, places))
            figures: dict[str, NDArray[np.float64]] = {}
            if isinstance(self.task, VideoClassification):
                figures = self._classes(hidden)
            elif isinstance(self.task, VideoPrediction) and self.task.ahead:
                figures = {"error": self._errors(hidden, patches[0].unflatten(0, (count, places)))}
        self.steps += count
        return Steps(hidden.float().mean(dim=1).cpu(), figures)

    def _classes(self, hidden: Tensor) -> dict[str, NDArray[np.float64]]:
        """Probabilities after each step."""
        if self.task.pool == "last":
            states = hidden[:, -1]
        else:
            states = torch.stack([self._mean(step) for step in hidden.float().sum(dim=1)]) / hidden.shape[1]
        shares = self.task.head.logits(states[None].to(hidden.dtype))[0].softmax(dim=-1).double().cpu().numpy()
        names = self.names if len(self.names) == shares.shape[1] else [str(n) for n in range(shares.shape[1])]
        return {name: shares[:, number] for number, name in enumerate(names)}

    def _mean(self, step: Tensor) -> Tensor:
        """The mean of the steps so far, or of the last ones, this one with them."""
        if self._window is not None:
            self._sums.append(step)
            return torch.stack(list(self._sums)).mean(dim=0)
        self._total, self._count = self._total.to(step.device) + step.double(), self._count + 1
        return (self._total / self._count).float()

    def _errors(self, hidden: Tensor, patches: Tensor) -> NDArray[np.float64]:
        """Mean square error of what was predicted for each step, before it came."""
        aims = patches.float()
        if self.task.normalise:
            mean, variance = aims.mean(dim=-1, keepdim=True), aims.var(dim=-1, keepdim=True)
            aims = (aims - mean) / (variance + 1e-6).sqrt()
        found = []
        for guess, aim in zip(self.task.to_patch(hidden).float(), aims, strict=True):
            if len(self._expected) == self.task.ahead:
                found.append(float((self._expected.popleft() - aim).square().mean()))
            else:
                found.append(math.nan)
            self._expected.append(guess)
        return np.array(found)


def command(words: Sequence[str]) -> int:
    """``seqlong video stream``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags, the model or the video.
    """
    parser = Parser("video stream", HELP, EXAMPLES)
    parser.add_argument("file", help="video file; - for standard input; or an address that FFmpeg opens (rtsp://...)")
    parser.add_model()
    parser.add_argument("--out", metavar="FILE", help="CSV of a row a step; standard output if left out")
    parser.add_argument("--embeddings", metavar="FILE", help=".npy of (steps, width) float32")
    parser.add_argument("--frames", type=integer, help="frames to read at once; as in training")
    parser.add_argument("--fps", type=float, help="frames a second, by time; 0: every frame. As in training")
    parser.add_argument("--size", help="pixels, or HEIGHTxWIDTH; as in training")
    parser.add_argument("--window", type=integer, help="last steps that a classifier's mean goes over; else all")
    parser.add_argument("--threads", type=integer, default=1, help="of the decoder")
    parser.add_argument("--partial", action="store_true", help="a video that breaks off: keep what came before")
    given = parser.parse_args(list(words))
    if given.embeddings and Path(given.embeddings).suffix != ".npy":
        raise ConfigError(f"--embeddings {given.embeddings}: expected a name that ends in .npy")
    model = open_model(given)
    tubelets, reader, frames, fps = as_trained(model, given.size, given.frames, given.fps)
    watcher = Watcher(model, tubelets, [str(name) for name in model.card.get("classes") or ()], given.window)
    try:
        _stream(watcher, reader, frames, fps, given)
    except BrokenPipeError:  # whoever read the table has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def as_trained(
    model: Model, size: str | None, frames: int | None, fps: float | None
) -> tuple[Tubelets, Reader, int, float | None]:
    """Patches, how pictures are made, frames of a clip and their rate: those of training, but for what is given.

    Raises:
        ConfigError: the model was not trained on video, or what is given is no size or rate.
    """
    data = (model.config.get("data") or {}).get("init_args") or {}
    known = data.get("tubelets")
    if not isinstance(known, dict):
        raise ConfigError(f"{model.path} was not trained on video: its data has no tubelets")
    tubelets = Tubelets(**known)
    sampling = data.get("sampling") or {}
    if size is not None:
        numbers = [int(part) for part in size.lower().split("x") if part.isdecimal()]
        if len(numbers) not in (1, 2) or not all(part.isdecimal() for part in size.lower().split("x")):
            raise ConfigError(f"--size {size}: expected pixels, such as 112, or HEIGHTxWIDTH, such as 96x160")
        shape = check_size(numbers if len(numbers) == 2 else numbers[0])
        resize = min(shape)
    else:
        shape = check_size(data.get("size", 112))
        resize = data.get("resize") or min(shape)
    tubelets.grid(1, *shape)
    rate = sampling.get("fps") if fps is None else fps or None
    if fps is not None and (fps < 0 or not math.isfinite(fps)):
        raise ConfigError(f"--fps {fps} must be above 0, or 0 for every frame")
    count = frames or int(sampling.get("frames") or data.get("frames") or 16)
    count = -(-count // tubelets.time) * tubelets.time  # no patch is cut by the end of a clip
    return tubelets, Reader(shape, resize), count, rate


def clips(
    source: str, reader: Reader, frames: int, fps: float | None, threads: int = 1
) -> Iterator[tuple[list[float], Tensor]]:
    """Times and pictures ``(n h w 3)`` of ``frames`` frames at a time, the last ones perhaps fewer; what a file that
    breaks off gave last comes before the error."""
    times: list[float] = []
    store: NDArray[np.uint8] | None = None
    try:
        for seconds, picture in watch(source, fps, reader.resize, threads):
            if store is None:
                store = np.empty((frames, *picture.shape), dtype=np.uint8)
            if picture.shape != store.shape[1:]:
                here, there = ("x".join(map(str, shape[1::-1])) for shape in (store.shape[1:], picture.shape))
                raise DecodeError(Path(source), f"the picture changes from {here} to {there} at {seconds:.3f} s")
            store[len(times)] = picture
            times.append(seconds)
            if len(times) == frames:
                yield times, reader.fit(torch.from_numpy(store))
                times = []
    except DecodeError:
        if times and store is not None:
            yield times, reader.fit(torch.from_numpy(store[: len(times)]))
        raise
    if times and store is not None:
        yield times, reader.fit(torch.from_numpy(store[: len(times)]))


def _stream(watcher: Watcher, reader: Reader, frames: int, fps: float | None, given: Any) -> None:
    began = time.monotonic()
    seconds = length_of(given.file)
    total = None if seconds is None or fps is None else round(seconds * fps)
    done, last, step = 0, 0.0, watcher.tubelets.time
    with ExitStack() as files:
        text: IO[str] = sys.stdout if given.out is None else files.enter_context(Path(given.out).open("w", newline=""))
        table = csv.writer(text)
        rows = files.enter_context(GrowingArray(Path(given.embeddings))) if given.embeddings else None
        advance = files.enter_context(progress("Watching", total, "frames"))
        try:
            for times, pixels in clips(given.file, reader, frames, fps, given.threads):
                found = watcher.watch(pixels)
                if not done:
                    table.writerow(["step", "start", "end", *found.figures])
                for place in range(len(found.hidden)):
                    of_step = times[place * step : (place + 1) * step]
                    said = (float(values[place]) for values in found.figures.values())
                    figures = ("" if math.isnan(value) else f"{value:.6g}" for value in said)
                    number = watcher.steps - len(found.hidden) + place
                    table.writerow([number, f"{of_step[0]:.3f}", f"{of_step[-1]:.3f}", *figures])
                text.flush()  # a camera is read as it goes
                if rows is not None:
                    rows.add(found.hidden.numpy())
                done, last = done + len(times), times[-1]
                advance(len(times))
        except DecodeError as error:
            if not given.partial or not done:
                raise
            log.warning("%s; what came before it is kept", error)
    took = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    log.info(
        "%s: %s frames, %.1f s of video, in %.1f s: %.1f frames/s, %.2f times as fast as it plays; %s patches, "
        "peak memory %.0f MiB", given.file, f"{done:,}", last, took, done / took, last / took,
        f"{_patches(watcher, reader):,}", peak,
    )  # fmt: skip


def _patches(watcher: Watcher, reader: Reader) -> int:
    _, high, wide = watcher.tubelets.grid(1, *reader.size)
    return watcher.steps * high * wide


class GrowingArray:
    """A .npy file that grows along its first axis, and is whole at the end, however that comes."""

    def __init__(self, path: Path, kind: str | np.dtype[Any] = "<f4") -> None:
        self.path, self.count, self.kind = path, 0, np.dtype(kind)
        self.tail: tuple[int, ...] = (0,)

    def __enter__(self) -> GrowingArray:
        self._file = self.path.open("wb")
        return self

    def add(self, rows: NDArray[Any]) -> None:
        """Rows to stand behind those that are there; all of one shape."""
        if not self.count:
            self.tail = rows.shape[1:]
            self._head()
        self._file.write(np.ascontiguousarray(rows, dtype=self.kind).tobytes())
        self.count += len(rows)

    def _head(self) -> None:
        """NumPy's header leaves room for the first axis to grow, so that it can be written again."""
        about = {"descr": self.kind.str, "fortran_order": False, "shape": (self.count, *self.tail)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._head()
        self._file.close()
