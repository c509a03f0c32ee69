"""Few labels: masked pretraining and fine-tuning against training from nothing, on scenes cut from real videos.

Videos are cut into scenes of five seconds, scenes into clips of a third of a second; a clip's class is its scene.
Every second clip is shown without its label, masked, for ``--steps``; two clips of a scene have a label, one is for
validation, and the others are the test. A model of 0.2 M parameters; fine-tuning and training from nothing have the
same steps, learning rates (the better one on validation counts, for each seed) and order. Minutes on one core.

    seqlong bench video_pretrain --data ../shared/data/video
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch
from _fit import metrics

from seqlong import cli
from seqlong.bench import Row, main
from seqlong.datamodules.video.index import pyav, read_index

SCENE, CLIP, FRAMES, SIZE = 5.0, 1 / 3, 8, 64
#: Place of a clip in its scene -> what it is for; odd ones have no label.
ROLES = {0: "train", 8: "train", 4: "val"}
RATES = (1e-3, 3e-3)
Clip = tuple[Path, float, int, int]


def clips(files: list[Path]) -> tuple[list[Clip], int]:
    """``(file, begin, scene, place in the scene)`` of every clip, and how many scenes there are."""
    found, scene = [], 0
    for path in files:
        seconds = read_index(path).ends
        for number in range(int(seconds // SCENE)):
            for place in range(int(SCENE / CLIP)):
                found.append((path, number * SCENE + place * CLIP, scene, place))
            scene += 1
    return found, scene


def shrink(path: Path, folder: Path) -> Path:
    """The video at the size that is read, so that a step does not wait for its decoding."""
    av = pyav()
    made = folder / f"{path.stem}.mp4"
    with av.open(str(path)) as source, av.open(str(made), "w") as target:
        stream = source.streams.best("video")
        high = SIZE
        wide = round(stream.width * high / stream.height / 2) * 2
        out = target.add_stream("libx264", rate=stream.average_rate, options={"crf": "16", "g": "8"})
        out.width, out.height, out.pix_fmt = wide, high, "yuv420p"
        for number, frame in enumerate(source.decode(stream)):
            small = frame.reformat(wide, high, "yuv420p")
            small.pts, small.time_base = number, 1 / stream.average_rate
            target.mux(out.encode(small))
        target.mux(out.encode())
    return made


def write(path: Path, rows: list[tuple[Clip, str]]) -> Path:
    """A list of clips as data=video reads it."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "start", "end", "split", "group"])
        for (source, begin, scene, place), split in rows:
            group = f"{source.name}-{scene}-{place}"
            lines.writerow([source, f"scene {scene}", f"{begin:.4f}", f"{begin + CLIP:.4f}", split, group])
    return path


def call(verb: str, run: Path, *words: str) -> Path:
    """A verb of seqlong; the script ends where it fails."""
    if cli.main([verb, *words, f"run.dir={run}"]):
        sys.exit(f"seqlong {verb} {' '.join(words)} failed")
    return run


def best(run: Path) -> tuple[float, float]:
    """Accuracy on validation at its best, and on the test with the weights of then."""
    checkpoints = sorted((run / "checkpoints").glob("best-*.ckpt"), key=lambda path: path.stat().st_mtime)
    tested = call("test", run.with_name(f"{run.name}-test"), f"--ckpt_path={checkpoints[-1]}")
    return max(metrics(run)["val/accuracy"]), metrics(tested)["test/accuracy"][-1]


def measured(given: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Pretrain once; then both ways for each seed."""
    files = [shrink(given.data / name, scratch) for name in given.files]
    found, scenes = clips(files)
    shown = [(clip, "train" if clip[3] in ROLES or clip[3] % 2 else "") for clip in found]
    unlabelled = [(clip, split) for clip, split in shown if split and ROLES.get(clip[3]) != "val"]
    held = [(clip, "val") for clip in found if ROLES.get(clip[3]) == "val"]
    labelled = [(clip, ROLES.get(clip[3], "test")) for clip in found if clip[3] in ROLES or not clip[3] % 2]
    every = write(scratch / "every.csv", unlabelled + held)
    few = write(scratch / "few.csv", labelled)
    clip = [f"data.size={SIZE}", f"data.sampling={{kind: spread, frames: {FRAMES}, short: repeat}}"]
    size = "model.backbone.patches.init_args.size=1536"
    pretrained = call(
        "fit", scratch / "pretrained", "experiment=video/masked", "data=video", "data.labels=false",
        f"data.path={every}", *clip, size, "data.batch_size=16", f"trainer.max_steps={given.steps}",
        f"trainer.val_check_interval={given.steps}",
    )  # fmt: skip
    ways = {
        "pretrained": ["experiment=video/finetune", f"task.init_from={pretrained}"],
        "from nothing": ["experiment=video/classify", "model=video_small_masked", size],
    }
    scores: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        for name, words in ways.items():
            tried = []
            for rate in RATES:
                run = call(
                    "fit", scratch / f"{name}-{seed}-{rate}".replace(" ", "-"), *words, f"data.path={few}", *clip,
                    f"task.classes={scenes}", f"seed={seed}", f"task.optimizer.lr={rate}", "data.batch_size=16",
                    f"trainer.max_steps={given.tuning}", f"trainer.val_check_interval={given.tuning // 5}",
                    "trainer.callbacks.checkpoints.init_args.monitor=val/accuracy",
                    "trainer.callbacks.checkpoints.init_args.mode=max",
                )  # fmt: skip
                tried.append(best(run))
            scores.setdefault(name, []).append(max(tried)[1])
            print(name, seed, json.dumps(tried), flush=True)
    mine, theirs = scores["pretrained"], scores["from nothing"]
    tests = sum(role == "test" for _, role in labelled)
    spread = f", sd {stdev(mine):.3f} and {stdev(theirs):.3f}" if given.seeds > 1 else ""
    name = f"{scenes} scenes, {2 * scenes} labelled clips, {tests} of the test, mean of {given.seeds}{spread}"
    yield Row(name, "test accuracy", mean(mine), "accuracy", "seqlong from nothing", mean(theirs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of videos")
    parser.add_argument(
        "--files", nargs="+", default=["bbb_480p_30s.mp4", "torchcodec_nasa_13013.mp4"], help="those to cut up"
    )
    parser.add_argument("--steps", type=int, default=1500, help="of masked pretraining")
    parser.add_argument("--tuning", type=int, default=200, help="steps of fine-tuning, and of training from nothing")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main("video_pretrain", measured(chosen, Path(folder)), on="cpu")
