"""What is in a video file, found out by decoding all of it: the audit before training."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from seqlong.datamodules.video.index import DecodeError, opened, pyav, read_index, said
from seqlong.datamodules.video.tars import members

#: File name endings that a folder is searched for.
ENDINGS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".gif"}
    | {".ogv", ".3gp", ".y4m", ".vob", ".mxf", ".264", ".hevc", ".ivf"}
)


@dataclass
class Facts:
    """One file. What is unknown because it could not be read is None.

    Attributes:
        path: the file.
        container: such as ``mov`` or ``matroska``.
        codec: of the best video stream.
        pixels: pixel format.
        width: as shown, that is after rotation.
        height: as shown.
        rotation: degrees that players turn it, counter-clockwise.
        rate: frames a second, mean.
        variable: whether frames are shown for different times.
        seconds: from the first frame to the end of the last that decodes.
        claimed: frames by the file's head; 0 where that says nothing.
        packets: frames that the file holds packets of.
        frames: frames that decode.
        keys: frames from which decoding can begin.
        videos: video streams.
        audios: audio streams.
        problem: why not all of it decodes; empty if it does.
    """

    path: Path
    container: str | None = None
    codec: str | None = None
    pixels: str | None = None
    width: int | None = None
    height: int | None = None
    rotation: int = 0
    rate: float | None = None
    variable: bool = False
    seconds: float | None = None
    claimed: int | None = None
    packets: int = 0
    frames: int = 0
    keys: int = 0
    videos: int = 0
    audios: int = 0
    problem: str = ""

    @property
    def status(self) -> str:
        """``whole``, ``part`` or ``none``: how much of it decodes."""
        return "whole" if not self.problem else "part" if self.frames else "none"

    @property
    def notes(self) -> list[str]:
        """What to know of a file that decodes."""
        said = []
        if self.claimed and self.claimed != self.frames:
            said.append(f"its head says {self.claimed} frames")
        if self.videos > 1:
            said.append(f"{self.videos} video streams")
        if self.rotation:
            said.append(f"turned by {self.rotation}°")
        if self.variable:
            said.append("variable frame rate")
        if self.keys == 1 and self.frames > 250:
            said.append("one key frame: clips from its end are slow to reach")
        return said


def examine(path: Path, threads: int = 1) -> Facts:
    """Decode a file from its first to its last frame and say what was found. Memory: one frame. Never raises for a
    broken file: its ``problem`` says what is wrong."""
    facts = Facts(path)
    av = pyav()
    try:
        with opened(path) as (container, stream):
            context = stream.codec_context
            facts.container = container.format.name.split(",")[0]
            facts.codec, facts.pixels = context.codec.canonical_name, context.pix_fmt
            facts.width, facts.height = context.width or None, context.height or None
            facts.claimed = stream.frames
            facts.videos, facts.audios = len(container.streams.video), len(container.streams.audio)
            index = read_index(path)
            facts.packets, facts.keys, facts.variable = len(index), len(index.keys), index.variable_rate
            context.thread_type, context.thread_count = "AUTO", threads
            last = None
            try:
                for frame in container.decode(stream):
                    if facts.frames == 0:
                        facts.rotation = round(frame.rotation)
                        turned = facts.rotation % 180 != 0
                        facts.width, facts.height = (frame.width, frame.height)[:: -1 if turned else 1]
                        facts.pixels = frame.format.name
                    facts.frames += 1
                    last = frame.pts
            except (av.error.FFmpegError, ValueError) as error:
                facts.problem = f"cannot be decoded at frame {facts.frames}: {said(error)}"
            if facts.frames:
                whole = facts.frames >= len(index)
                end = index.ends if whole or last is None else float((last - index.stamps[0]) * stream.time_base)
                facts.seconds = end
                facts.rate = facts.frames / end if end else index.rate
                if not whole and not facts.problem:
                    facts.problem = f"{facts.frames} of {len(index)} frames decode"
            elif not facts.problem:
                facts.problem = "not one frame decodes"
    except DecodeError as error:
        facts.problem = error.reason
    return facts


def videos_under(folder: Path, endings: Collection[str] = ENDINGS) -> Iterator[Path]:
    """Video files of a folder and the folders in it, by name, and those in its tars; a file is itself."""
    if folder.is_file():
        if folder.suffix.lower() == ".tar":
            yield from members(folder, endings)
        else:
            yield folder
        return
    been: set[Path] = set()
    for place, folders, names in os.walk(folder, followlinks=True):  # class folders are often links
        if Path(place).resolve() in been:  # ... and links may lead in circles
            folders.clear()
            continue
        been.add(Path(place).resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if path.suffix.lower() == ".tar" and path.is_file():
                yield from members(path, endings)
            elif path.suffix.lower() in endings and not name.startswith(".") and path.is_file():
                yield path
