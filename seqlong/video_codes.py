"""``seqlong video codes``: videos through a tokenizer, to .npy files of whole numbers."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seqlong import runs
from seqlong.datamodules.video.codes import ABOUT
from seqlong.datamodules.video.index import DecodeError
from seqlong.datamodules.video.listing import read_videos
from seqlong.datamodules.video.reading import Reader
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.errors import ConfigError
from seqlong.inference.arguments import Parser, integer, open_model, progress
from seqlong.inference.model import Model
from seqlong.tasks.video_tokenizer import VideoTokenizer, psnr
from seqlong.video_stream import GrowingArray, as_trained, clips

log = logging.getLogger("seqlong")

HELP = """Runs videos through a tokenizer (experiment=video/fsq) and writes its codes: for each video a .npy of (time,
height, width), uint16, or uint32 beyond 65,536 codes, under its own name in the folder of the output, with codes.csv,
which lists them with their labels, splits and groups, and codes.json. Memory is that of a clip, whatever the length.

Then: seqlong fit experiment=video/codes data.path=codes/"""
EXAMPLES = """examples:
  seqlong video codes clips/ --ckpt last --out codes/
  seqlong video codes list.csv --ckpt last --out codes/ --psnr"""


class Encoder:
    """Codes of a video, clip by clip: exactly those of the whole.

    Args:
        model: whose task is a VideoTokenizer.
        tubelets: how clips are cut.
    """

    def __init__(self, model: Model, tubelets: Tubelets) -> None:
        task = model.task
        assert isinstance(task, VideoTokenizer)
        self.model, self.task, self.tubelets = model, task, tubelets
        self.before: Tensor | None = None  # the last steps of the clip before, which its codes depend on
        self.error, self.count = 0.0, 0

    @torch.no_grad()
    def encode(self, clip: Tensor, measure: bool = False) -> Tensor:
        """Codes ``(time, height, width)`` of the next frames ``(n h w 3)``.

        Args:
            clip: uint8; but at the end of a video, of full patches.
            measure: whether to add to ``error`` the squared error of pixels as they come back.
        """
        grid = self.tubelets.grid(*clip.shape[:3])
        patches = self.tubelets.cut(clip).unflatten(0, grid).to(self.model.device)
        seen = patches if self.before is None else torch.cat([self.before, patches])
        with self.model.products():
            values, codes = self.task.encode(seen[None])
            if measure:
                made = self.task.decode(values)[0, -grid[0] :]
                self.error += float((self._parts(made) - self._parts(patches)).square().sum(dtype=torch.float64))
                self.count += patches.numel()
        # Decoding looks as far back again as encoding does.
        self.before = seen[-2 * self.task.context :]
        return codes[0, -grid[0] :].cpu()

    def _parts(self, patches: Float[Tensor, "*s p"]) -> Float[Tensor, "*s p"]:
        pixels = (patches.float() * self.tubelets.deviation + self.tubelets.mean).mul(255)
        return pixels.round().clamp(0, 255) / 255


def command(words: Sequence[str]) -> int:
    """``seqlong video codes``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags, the model or the videos.
    """
    parser = Parser("video codes", HELP, EXAMPLES)
    parser.add_argument("path", help="folder of videos, or a .csv or .jsonl list")
    parser.add_model()
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--frames", type=integer, help="frames to read at once; as in training")
    parser.add_argument("--fps", type=float, help="frames a second, by time; 0: every frame. As in training")
    parser.add_argument("--size", help="pixels, or HEIGHTxWIDTH; as in training")
    parser.add_argument("--threads", type=integer, default=1, help="of the decoder")
    parser.add_argument("--psnr", action="store_true", help="also say how well codes tell the pixels")
    parser.add_argument("--partial", action="store_true", help="a video that breaks off: keep what came before")
    given = parser.parse_args(list(words))
    model = open_model(given)
    if not isinstance(model.task, VideoTokenizer):
        raise ConfigError(f"{model.path} is a {type(model.task).__name__}; codes need one of experiment=video/fsq")
    tubelets, reader, frames, fps = as_trained(model, given.size, given.frames, given.fps)
    source, out = Path(given.path).expanduser(), Path(given.out)
    videos = read_videos(source)
    cut = [video.name for video in videos if video.start or video.end is not None]
    if cut:
        raise ConfigError(f"{source}: {cut[0]} is a stretch of a file; codes are made of whole files: cut it out first")
    root = source if source.is_dir() else source.parent
    out.mkdir(parents=True, exist_ok=True)
    kind = np.dtype("<u2" if model.task.fsq.codes <= 1 << 16 else "<u4")
    rows, total, done, began = [], 0, 0, time.monotonic()
    error, count = 0.0, 0
    with progress("Encoding", len(videos), "videos") as advance:
        for video in videos:
            inside = video.path.relative_to(root) if video.path.is_relative_to(root) else Path(video.path.name)
            target = out / inside.with_name(inside.name + ".npy")
            target.parent.mkdir(parents=True, exist_ok=True)
            encoder = Encoder(model, tubelets)
            read = _write(encoder, video.path, target, reader, frames, fps, kind, given)
            group = "" if video.group == str(video.path) else video.group
            rows.append([target.relative_to(out), video.label, video.split or "", group])
            total, done = total + read[0], done + read[1]
            error, count = error + encoder.error, count + encoder.count
            advance(1)
    with (out / "codes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split", "group"])
        table.writerows(rows)
    about = {
        "codes": model.task.fsq.codes, "levels": list(model.task.fsq.levels), "fps": fps, "size": list(reader.size),
        "tubelets": [tubelets.time, tubelets.height, tubelets.width], "checkpoint": str(model.path),
    }  # fmt: skip
    runs.write_json(out / ABOUT, about)
    took = time.monotonic() - began
    log.info("%s videos, %s frames: %s codes of %.1f bits in %s, %.1f frames/s", len(rows), f"{total:,}", f"{done:,}",
             math.log2(model.task.fsq.codes), out, total / took)  # fmt: skip
    if count:
        log.info("PSNR %.2f dB", float(psnr(torch.tensor(error / count))))
    return 0


def _write(
    encoder: Encoder, path: Path, target: Path, reader: Reader, frames: int, fps: float | None, kind: np.dtype, given
) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    """Frames read and codes written."""
    read = written = 0
    unfinished = target.with_name(f".{target.name}.partial")
    try:
        with GrowingArray(unfinished, kind) as array:
            try:
                for times, pixels in clips(str(path), reader, frames, fps, given.threads):
                    codes = encoder.encode(pixels, given.psnr).numpy()
                    array.add(codes)
                    read, written = read + len(times), written + codes.size
            except DecodeError as error:
                if not given.partial or not written:
                    raise
                log.warning("%s; what came before it is kept", error)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return read, written
