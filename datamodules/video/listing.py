"""Which videos there are, and what is known of each: a folder of class folders, or a CSV or JSONL list."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from seqlong.datamodules.dna.alphabet import LETTERS
from seqlong.datamodules.sampler import permute
from seqlong.datamodules.video.check import ENDINGS, videos_under
from seqlong.datamodules.video.tars import facts_of, tar_of
from seqlong.errors import ConfigError, DataError, located, nearest

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
_COLUMNS = ("path", "label", "start", "end", "split", "group", "text", "dna")
_NAMES: dict[str, Part] = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
                           "validation": "validation", "test": "test", "testing": "test"}  # fmt: skip


@dataclass(frozen=True)
class Video:
    """A video, or a stretch of one.

    Attributes:
        path: the file.
        label: name of its class; empty where none is known.
        start: seconds at which the stretch begins.
        end: seconds at which it ends; None is the end of the file.
        split: the part that a list puts it in; None leaves that to ``divide``.
        group: videos of one group are never parted; the file itself if the list names none.
        text: what is said of it; empty where nothing is.
        dna: bases that go with it; empty where none do.
        line: of the list; 0 where there is none.
    """

    path: Path
    label: str = ""
    start: float = 0.0
    end: float | None = None
    split: Part | None = None
    group: str = ""
    text: str = ""
    dna: str = ""
    line: int = 0

    @property
    def name(self) -> str:
        """For people."""
        stretch = (
            "" if not self.start and self.end is None else f" {self.start:g}-{'' if self.end is None else self.end}"
        )
        return f"{self.path}{stretch} s" if stretch else str(self.path)


def read_videos(path: str | Path, group_pattern: str | None = None, endings: Collection[str] = ENDINGS) -> list[Video]:
    """Videos of a folder or list.

    Args:
        path: a folder with a folder for each class, or with ``train``, ``val`` and ``test`` folders that have them; a
            webdataset tar or a folder of them, whose samples have a video and a .json of the names below (or a .cls); a
            .csv with a header, or a .jsonl: path, and as many of label, start, end (seconds), split, group, text and
            dna as are known. Paths are taken from the list's folder.
        group_pattern: regular expression; what it finds in a file's name (its first bracket) is the file's group.
        endings: of the files that a folder is searched for.

    Raises:
        DataError: no such folder or list, no videos, a line that cannot be used, a file that is missing.
    """
    source = Path(path).expanduser()
    if source.is_dir() or (source.suffix.lower() == ".tar" and source.is_file()):
        found = list(_of_folder(source, endings))
    elif source.suffix in (".csv", ".tsv", ".jsonl"):
        found = list(_of_list(source))
    elif source.is_file():
        raise DataError(
            f"{source}: expected a folder of videos, a .tar of them, or a list that ends in .csv, .tsv or .jsonl"
        )
    else:
        raise DataError(f"{source}: there is no such file or folder")
    if not found:
        raise DataError(f"{source}: has no videos; a folder needs one folder for each class, with video files in it")
    if group_pattern is None:
        return found
    try:
        pattern = re.compile(group_pattern)
    except re.error as error:
        raise ConfigError(f"data.group_pattern '{group_pattern}' is no regular expression: {error}") from error
    named = []
    for video in found:
        match = pattern.search(video.path.stem)
        group = video.group if match is None else match[1 if pattern.groups else 0]
        named.append(replace(video, group=group))
    return named


def _of_folder(root: Path, endings: Collection[str]) -> Iterator[Video]:
    inside_tar = root.is_file()
    folders = [] if inside_tar else sorted(
        child for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")
    )  # fmt: skip
    splits = {child: _NAMES[child.name.lower()] for child in folders if child.name.lower() in _NAMES}
    if splits and len(splits) == len(folders):
        for folder, split in splits.items():
            for video in _of_folder(folder, endings):
                yield replace(video, split=split, group=str(video.path))
        return
    for file in videos_under(root, endings):
        if not file.is_file():
            yield _of_member(file)
            continue
        inside = file.relative_to(root).parts
        yield Video(file, inside[0] if len(inside) > 1 else "", group=str(file))


def _of_member(path: Path) -> Video:
    """A video in a tar: its sample's .json says what a list's line would; a tar called train-0001.tar, the split."""
    tar = tar_of(path)
    assert tar is not None
    row = facts_of(path)
    where = tar / f"{path.stem}.json"
    start, end = (_seconds(where, 1, key, row.get(key)) for key in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise DataError(f"{where}: end {end} must be later than start {start or 0}")
    split = str(row.get("split") or "").strip().lower()
    if split and split not in _NAMES:
        raise DataError(f"{where}: split '{split}' is none of train, val and test")
    named = re.match(r"[a-z]+", tar.stem.lower())
    part = _NAMES.get(split or (named[0] if named else ""))
    label = row.get("label")
    group = str(row.get("group") or "").strip() or str(path)
    text, dna = (str(row.get(key) or "").strip() for key in ("text", "dna"))
    _check_dna(where, 1, dna)
    return Video(path, "" if label is None else str(label).strip(), start or 0.0, end, part, group, text, dna)


def _check_dna(source: Path, line: int, dna: str) -> None:
    """Raise DataError for what is no DNA."""
    wrong = ", ".join(map(repr, sorted(set(dna.upper()) - set(LETTERS))[:5]))
    if wrong:
        raise DataError(located(source, line, f"dna has {wrong}; expected letters of {LETTERS}"))


def _of_list(source: Path) -> Iterator[Video]:
    if not source.is_file():
        raise DataError(f"{source}: there is no such file")
    for line, row in _rows(source):
        name = str(row.get("path") or "").strip()
        if not name:
            raise DataError(located(source, line, "names no path"))
        file = Path(name) if Path(name).is_absolute() else source.parent / name
        if not file.is_file():
            raise DataError(
                located(source, line, f"there is no file {name}" + ("" if file == Path(name) else f" ({file})"))
            )
        start, end = (_seconds(source, line, key, row.get(key)) for key in ("start", "end"))
        if end is not None and end <= (start or 0):
            raise DataError(located(source, line, f"end {end} must be later than start {start or 0}"))
        split = str(row.get("split") or "").strip().lower()
        if split and split not in _NAMES:
            raise DataError(located(source, line, f"split '{split}' is none of train, val and test"))
        label = row.get("label")
        text, dna = (str(row.get(key) or "").strip() for key in ("text", "dna"))
        _check_dna(source, line, dna)
        yield Video(
            file, "" if label is None else str(label).strip(), start or 0.0, end, _NAMES.get(split),
            str(row.get("group") or "").strip() or str(file), text, dna, line,
        )  # fmt: skip


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with source.open(newline="", encoding="utf-8-sig") as file:
        if source.suffix == ".jsonl":
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(located(source, number, f"is no JSON: {error.msg}")) from error
                if not isinstance(row, dict):
                    raise DataError(
                        located(source, number, 'expected an object such as {"path": "a.mp4", "label": "cat"}')
                    )
                yield number, row
            return
        lines = csv.DictReader(file, delimiter="\t" if source.suffix == ".tsv" else ",")
        columns = [str(name).strip() for name in lines.fieldnames or ()]
        if "path" not in columns:
            close = nearest("path", columns)
            raise DataError(
                located(
                    source,
                    1,
                    f"the header has no column 'path', only {', '.join(columns) or 'nothing'}{close}; "
                    f"columns are {', '.join(_COLUMNS)}",
                )
            )
        lines.fieldnames = columns
        for row in lines:
            if None in row:
                raise DataError(located(source, lines.line_num, f"has more fields than the header's {len(columns)}"))
            yield lines.line_num, row


def _seconds(source: Path, line: int, key: str, value: Any) -> float | None:
    if value is None or not str(value).strip():
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise DataError(located(source, line, f"{key} '{value}' is no number of seconds"))
    return seconds


def classes_of(videos: Sequence[Video], source: str | Path) -> list[str]:
    """Names of the classes: in order of their numbers if all are numbers, else of the alphabet.

    Raises:
        DataError: videos without a label, or of one class only.
    """
    without = [video for video in videos if not video.label]
    names = {video.label for video in videos if video.label}
    if without:
        raise DataError(f"{source}: {len(without)} of {len(videos)} videos have no label, such as {without[0].path}")
    if len(names) < 2:
        raise DataError(
            f"{source}: all {len(videos)} videos are of one class, '{next(iter(names))}'; two or more are needed to "
            "learn labels (a task without labels does not ask)"
        )
    if all(re.fullmatch(r"\d{1,9}", name) for name in names):
        return sorted(names, key=int)
    return sorted(names)


def divide(
    videos: Sequence[Video], validation: float = 0.1, test: float = 0.1, seed: int = 0
) -> dict[Part, list[Video]]:
    """Train, validation and test: as the list says; else whole groups are shared out, class by class.

    Args:
        videos: all of them.
        validation: share of each class's groups; at least one where there are three or more.
        test: the same.
        seed: names the draw.

    Raises:
        DataError: a group stands on both sides of a split that a list makes.
    """
    parts: dict[str, Part] = {}
    for video in videos:
        if video.split is not None and parts.setdefault(video.group, video.split) != video.split:
            raise DataError(
                f"{video.path}: its group '{video.group}' is in {parts[video.group]} and in {video.split}; what is "
                "learnt from one part would be measured on the other"
            )
    if any(video.split is None for video in videos) and not any(video.split for video in videos):
        by_class: dict[str, list[str]] = {}
        placed: set[str] = set()
        for video in videos:
            groups = by_class.setdefault(video.label, [])
            if video.group not in placed:
                placed.add(video.group)
                groups.append(video.group)
        for number, label in enumerate(sorted(by_class)):
            groups = sorted(by_class[label])
            order = [groups[place] for place in permute(range(len(groups)), max(len(groups), 1), seed, number)]
            counts = [
                max(round(share * len(order)), 1 if share and len(order) > 2 else 0) for share in (validation, test)
            ]
            for place, group in enumerate(order):
                parts[group] = PARTS[1 if place < counts[0] else 2 if place < sum(counts) else 0]
    divided: dict[Part, list[Video]] = {part: [] for part in PARTS}
    for video in videos:
        divided[video.split or parts.get(video.group, "train")].append(video)
    return divided
