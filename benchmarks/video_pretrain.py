"""One label a scene: masked pretraining and fine-tuning against training from nothing, on clips of real videos.

Videos are cut into scenes of two and a half seconds; a clip's class is its scene. The first half of a scene is shown
without its label, eight frames at a time, masked, for ``--steps``, and other videos too; of its second half the first
third of a second has a label, and the two after it are the test. A model of 0.2 M parameters; fine-tuning and training
from nothing have the same steps, learning rates and order, and the weights of the last step are measured. Minutes on
one core.

    seqlong bench video_pretrain --data ../shared/data/video
"""

from __future__ import annotations

import argparse
import csv
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

SCENE, CLIP, FRAMES, SIZE = 2.5, 1 / 3, 8, 64
#: Number of a clip in the second half of its scene -> what it is for.
ROLES = ("train", "test", "test")
RATES = (1e-3, 3e-3)
#: File, beginning and end in seconds, class, part.
Line = tuple[Path, float, float, str, str]


def scenes_of(files: list[Path]) -> list[tuple[Path, float, str]]:
    """``(file, beginning, name)`` of every whole scene."""
    found: list[tuple[Path, float, str]] = []
    for path in files:
        for number in range(int(read_index(path).ends // SCENE)):
            found.append((path, number * SCENE, f"scene {len(found)}"))
    return found


def lists(files: list[Path], more: list[Path]) -> tuple[list[Line], list[Line]]:
    """What is shown without labels, and the few clips with them."""
    shown: list[Line] = [(path, 0.0, read_index(path).ends, "", "train") for path in more]
    few: list[Line] = []
    for path, begin, name in scenes_of(files):
        middle = begin + SCENE / 2
        shown.append((path, begin, middle, "", "train"))
        for number, role in enumerate(ROLES):
            few.append((path, middle + number * CLIP, middle + (number + 1) * CLIP, name, role))
    few += [(path, begin, end, name, "val") for path, begin, end, name, part in few if part == "train"]  # unused
    held: list[Line] = [(path, begin, end, "", part) for path, begin, end, _, part in few if part == "val"]
    return shown + held, few


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


def write(path: Path, rows: list[Line]) -> Path:
    """A list of clips as data=video reads it."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "start", "end", "split", "group"])
        for number, (source, begin, end, name, part) in enumerate(rows):
            lines.writerow([source, name, f"{begin:.4f}", f"{end:.4f}", part, number])
    return path


def call(verb: str, run: Path, *words: str) -> Path:
    """A verb of seqlong; the script ends where it fails."""
    if cli.main([verb, *words, f"run.dir={run}"]):
        sys.exit(f"seqlong {verb} {' '.join(words)} failed")
    return run


def tested(run: Path) -> float:
    """Accuracy on the test with the last weights."""
    last = run / "checkpoints" / "last.ckpt"
    found = call("test", run.with_name(f"{run.name}-test"), f"--ckpt_path={last}")
    return metrics(found)["test/accuracy"][-1]


def measured(given: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Pretrain once; then both ways for each seed."""
    files = [shrink(given.data / name, scratch) for name in given.files]
    shown, labelled = lists(files, [shrink(given.data / name, scratch) for name in given.more])
    every, few = write(scratch / "every.csv", shown), write(scratch / "few.csv", labelled)
    scenes = len({name for *_, name, _ in labelled})
    clip = [f"data.size={SIZE}", f"data.sampling={{kind: rate, frames: {FRAMES}, short: repeat}}"]
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
    scores: dict[tuple[str, float], list[float]] = {}
    for seed in range(given.seeds):
        for rate in RATES:
            for name, words in ways.items():
                run = call(
                    "fit", scratch / f"{name}-{seed}-{rate}".replace(" ", "-"), *words, f"data.path={few}", *clip,
                    f"task.classes={scenes}", f"seed={seed}", f"task.optimizer.lr={rate}", "data.batch_size=16",
                    f"trainer.max_steps={given.tuning}", f"trainer.val_check_interval={given.tuning}",
                )  # fmt: skip
                scores.setdefault((name, rate), []).append(tested(run))
                print(name, rate, scores[name, rate], flush=True)
    tests = sum(part == "test" for *_, part in labelled)
    for rate in RATES:
        mine, theirs = scores["pretrained", rate], scores["from nothing", rate]
        spread = f", sd {stdev(mine):.2f}, {stdev(theirs):.2f}" if given.seeds > 1 else ""
        name = f"{scenes} scenes, rate {rate:g}{spread}"
        what = f"accuracy, {tests} test clips, {given.seeds} seeds"
        yield Row(name, what, mean(mine), "accuracy", "seqlong from nothing", mean(theirs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of videos")
    parser.add_argument(
        "--files", nargs="+", default=["bbb_480p_30s.mp4", "torchcodec_nasa_13013.mp4"], help="those to cut up"
    )
    more = ["muxjs_sintel-captions.ts", "muxjs_test-no-audio-segment.ts", "torchcodec_av1_video.mkv"]
    parser.add_argument("--more", nargs="*", default=more, help="those shown without labels only")
    parser.add_argument("--steps", type=int, default=1500, help="of masked pretraining")
    parser.add_argument("--tuning", type=int, default=200, help="steps of fine-tuning, and of training from nothing")
    parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        main("video_pretrain", measured(chosen, Path(folder)), on="cpu")
