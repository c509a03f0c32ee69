"""``seqlong video``: look at video files before a model does, and let one watch them."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from seqlong.datamodules.video.check import Facts, examine, videos_under
from seqlong.errors import ConfigError, DataError

HELP = """Looks at video files before a model does, and lets one watch them.

  check   decodes every frame of every file and says what is in it and what is broken
  sheet   writes a PNG of frames as a model would see them: upright, the best stream, at their times
  stream  runs a video of any length through a model, the state carried on (seqlong video stream --help)
  codes   makes videos into whole numbers with a trained tokenizer (seqlong video codes --help)"""
EXAMPLES = """examples:
  seqlong video check clips/
  seqlong video check clips/ --out audit.csv      also for a program; audit.json as well
  seqlong video check clips/ --good good.csv      a list of the files that decode, for data.path=good.csv
  seqlong video sheet clips/a.mp4 --out a.png --frames 16
  seqlong video stream day.mp4 --ckpt last --out day.csv"""

# What else there is -> the module whose `command(words)` serves it.
_OTHERS = {"stream": "seqlong.video_stream", "codes": "seqlong.video_codes"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"seqlong video: {message}. See seqlong video --help")


def command(words: Sequence[str]) -> int:
    """Run ``seqlong video`` and return its exit status: ``check`` gives 1 where a file does not decode whole."""
    if words and words[0] in _OTHERS:
        return int(import_module(_OTHERS[words[0]]).command(words[1:]))
    parser = _Parser(
        "seqlong video", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="what", required=True, metavar="check|sheet|stream|codes", parser_class=_Parser)
    check = parts.add_parser("check", help="decode everything, and say what is in it")
    check.add_argument("folder", type=Path, help="folder, searched with its subfolders, or one file")
    check.add_argument("--out", type=Path, help="write the table as .csv or .json")
    check.add_argument("--good", type=Path, help="write a CSV of the files that decode whole")
    check.add_argument("--threads", type=int, default=1, help="decoder threads a file")
    sheet = parts.add_parser("sheet", help="a PNG of frames")
    sheet.add_argument("file", type=Path)
    sheet.add_argument("--out", type=Path, required=True, help="PNG to write")
    sheet.add_argument("--frames", type=int, default=16, help="how many, spread evenly")
    sheet.add_argument("--start", type=float, default=0.0, help="seconds")
    sheet.add_argument("--end", type=float, help="seconds; the end of the file if not given")
    sheet.add_argument("--backend", choices=["auto", "pyav", "torchcodec"], default="auto")
    asked = parser.parse_args(list(words) or ["--help"])
    return _check(asked) if asked.what == "check" else _sheet(asked)


def _check(asked: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    if not asked.folder.exists():
        raise DataError(f"{asked.folder}: there is no such file or folder")
    paths = list(videos_under(asked.folder))
    if not paths:
        raise DataError(f"{asked.folder}: has no video files")
    progress = Console(stderr=True)
    found = [
        examine(path, asked.threads)
        for path in track(paths, "decoding", console=progress, disable=not progress.is_terminal, transient=True)
    ]
    root = asked.folder if asked.folder.is_dir() else asked.folder.parent
    _print(found, root)
    if asked.out:
        _write(found, asked.out)
    if asked.good:
        with asked.good.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["path", "label"])
            for facts in found:
                if facts.status == "whole":
                    inside = facts.path.relative_to(root)
                    lines.writerow([facts.path.absolute(), inside.parts[0] if len(inside.parts) > 1 else ""])
        print(f"wrote {asked.good}")
    return 0 if all(facts.status == "whole" for facts in found) else 1


def _print(found: list[Facts], root: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("file", "decodes", "codec", "pixels", "size", "fps", "seconds", "frames", "keys"):
        right = name in ("fps", "seconds", "frames", "keys")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    table.add_column("notes", overflow="fold", ratio=1)
    colours = {"whole": "green", "part": "yellow", "none": "red"}
    for facts in found:
        size = f"{facts.width}x{facts.height}" if facts.width else "-"
        count = str(facts.frames) if facts.status == "whole" else f"{facts.frames} of {facts.packets}"
        table.add_row(
            str(facts.path.relative_to(root)),
            f"[{colours[facts.status]}]{facts.status}[/]",
            facts.codec or "-",
            facts.pixels or "-",
            size,
            "-" if facts.rate is None else f"{facts.rate:.4g}",
            "-" if facts.seconds is None else f"{facts.seconds:.2f}",
            count,
            str(facts.keys),
            "; ".join([facts.problem, *facts.notes] if facts.problem else facts.notes),
        )
    # A pipe or a file gets whole lines, whatever the width of the terminal that started it.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    whole, part, none = ([f for f in found if f.status == status] for status in ("whole", "part", "none"))
    seconds = sum(facts.seconds or 0 for facts in found)
    print(
        f"{len(found)} files, {sum(f.frames for f in found)} frames, {seconds:.1f} s: {len(whole)} decode whole, "
        f"{len(part)} in part, {len(none)} not at all"
    )


def _write(found: list[Facts], path: Path) -> None:
    rows = [{**dataclasses.asdict(f), "path": str(f.path), "decodes": f.status, "notes": f.notes} for f in found]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            lines = csv.DictWriter(file, list(rows[0]))
            lines.writeheader()
            lines.writerows({**row, "notes": "; ".join(row["notes"])} for row in rows)  # type: ignore[dict-item,arg-type]
    else:
        raise ConfigError(f"--out {path}: write a .csv or a .json")
    print(f"wrote {path}")


def _sheet(asked: argparse.Namespace) -> int:
    from seqlong.datamodules.video.decode import evenly, open_video

    if asked.frames < 1:
        raise ConfigError(f"--frames {asked.frames} must be 1 or more")
    with open_video(asked.file, asked.backend) as video:
        stop = video.index.ends if asked.end is None else min(asked.end, video.index.ends)
        if not 0 <= asked.start < stop:
            raise ConfigError(f"--start {asked.start} and --end {stop} must name a part of 0 to {video.index.ends:.3f}")
        frames = video.read(video.index.shown_at(evenly(asked.frames, asked.start, stop)), short_side=180)
    titles = [f"{s:.3f} s, frame {n}" for s, n in zip(frames.seconds, frames.numbers, strict=True)]
    draw_sheet(list(frames.pixels), titles, asked.out)
    print(f"wrote {asked.out}: {len(frames)} frames")
    return 0


def draw_sheet(pictures: Sequence, titles: Sequence[str], path: Path) -> None:  # type: ignore[type-arg]
    """Write pictures ``(h w 3)`` side by side in a PNG."""
    import math

    from matplotlib.figure import Figure

    across = math.ceil(math.sqrt(len(pictures)))
    down = math.ceil(len(pictures) / across)
    height, width = pictures[0].shape[:2]
    figure = Figure(figsize=(across * 2.4, down * (2.4 * height / width + 0.25)), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for axis, picture, title in zip(figure.axes, pictures, titles, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=6)
    figure.savefig(path, dpi=100)
