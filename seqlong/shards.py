"""``seqlong shards``: make, check and index webdataset tars, which `seqlong.datamodules.shards` reads by number."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn, track
from rich.table import Table

from seqlong.datamodules.shards import (
    ShardIndex,
    beside,
    read_index,
    scan,
    split_name,
    write_index,
)
from seqlong.datamodules.text.documents import Drop, Reading, Start, Tally, read_documents
from seqlong.datamodules.text.files import kind_of
from seqlong.errors import ConfigError, DataError, SeqlongError

HELP = "Make, check and index tar shards (webdataset), so that they are read by number and a run resumes exactly."
EXAMPLES = """\
examples:
  seqlong shards make shards/ clips/                      # files that share a name make a sample
  seqlong shards make shards/ 'web/*.jsonl.gz' --field content   # a sample for each row
  seqlong shards check shards/                            # read everything, say what is wrong
  seqlong shards index shards/                            # shards of somebody else's: write their indexes"""
#: Describes all shards of a folder.
DATASET = "index.json"
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_CHUNK = 1 << 20


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SeqlongError(f"{self.prog}: {message}; `seqlong shards --help` lists what it takes")


def command(words: Sequence[str]) -> int:
    """``seqlong shards``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the arguments or in the files.
    """
    parser = _Parser(
        prog="seqlong shards", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", metavar="make|check|index", required=True)
    making = verbs.add_parser("make", prog="seqlong shards make", help="make shards of files")
    making.add_argument("out", help="folder to write into; it must have no shards yet")
    making.add_argument(
        "paths", nargs="+", metavar="PATH", help="files and folders; rows of JSON and Parquet are taken apart"
    )
    making.add_argument("--size", type=_bytes, default=_SIZES["M"] * 256, help="bytes of a shard, such as 1G; 256M")
    making.add_argument("--field", default="text", help="field of JSON rows or column of Parquet that holds the text")
    for verb, what in (("check", "read shards, and say what is wrong"), ("index", "write the indexes of shards")):
        other = verbs.add_parser(verb, prog=f"seqlong shards {verb}", help=what)
        other.add_argument("paths", nargs="+", metavar="PATH", help="tars, or folders of them")
        other.add_argument(
            "--fields", type=lambda text: text.split(","), help="fields with dots of their own: left.png,right.png"
        )
    given = parser.parse_args(list(words))
    if given.verb == "make":
        made = make(given.out, given.paths, given.size, given.field)
        print(f"{len(made):,} shards, {sum(index.samples for index in made):,} samples in {given.out}")
    elif given.verb == "check":
        check(given.paths, given.fields)
    else:
        index(given.paths, given.fields)
    return 0


def find_tars(paths: Sequence[str | Path]) -> list[Path]:
    """The tars that paths stand for, sorted within each folder.

    Raises:
        DataError: there are none.
    """
    found: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        inside = sorted(path.rglob("*.tar")) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path}: the folder holds no .tar files")
        found += inside
    return found


# --- make ------------------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """Members that share a key: field to a file, or to bytes."""

    key: str
    members: dict[str, Path | bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(one.stat().st_size if isinstance(one, Path) else len(one) for one in self.members.values())


def make(out: str | Path, paths: Sequence[str], size: int = 256 << 20, field_name: str = "text") -> list[ShardIndex]:
    """Write files into shards ``shard-000000.tar`` and so on, with their indexes.

    Files of a folder whose names differ in the field alone make one sample; each row of JSON lines or Parquet makes
    one, with the fields ``txt`` and ``json`` (where it came from). Dots in keys become ``_``, so that webdataset reads
    the same samples. The same files give the same bytes.

    Args:
        out: folder to write into.
        paths: files and folders.
        size: bytes of a shard; a sample is never divided.
        field_name: field or column that holds the text of rows.

    Raises:
        ConfigError: the folder has shards already.
        DataError: files that cannot be read, or two samples of the same key.
    """
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(folder.glob("*.tar"))
    if there:
        raise ConfigError(f"{folder} has shards already ({there[0].name}); choose another folder, or delete them")
    made: list[ShardIndex] = []
    held: list[_Sample] = []
    waiting, keys = 0, set()
    console = Console(stderr=True)
    columns = (TextColumn("Packing"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        for sample in _samples(paths, field_name):
            if sample.key in keys:
                raise DataError(f"two samples would be called '{sample.key}'; rename one of the files")
            keys.add(sample.key)
            if held and waiting + sample.size > size:
                made.append(_write(folder / f"shard-{len(made):06d}.tar", held))
                held, waiting = [], 0
            held.append(sample)
            waiting += sample.size
            bar.advance(task, sample.size)
    if not held:
        raise DataError(f"{', '.join(paths)}: found no files to put into shards")
    made.append(_write(folder / f"shard-{len(made):06d}.tar", held))
    _describe(folder, made)
    return made


def _samples(paths: Sequence[str], field_name: str) -> Iterator[_Sample]:
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
            base = path
        elif path.is_file():
            files, base = [path], path.parent
        else:
            files = sorted(file for file in path.parent.glob(path.name) if file.is_file())
            base = path.parent
            if not files:
                raise DataError(f"{path}: no such file")
        grouped: dict[str, _Sample] = {}
        for file in files:
            if kind_of(file) in ("jsonl", "parquet"):
                yield from _rows(file, field_name)
                continue
            name, kind = split_name(file.relative_to(base).as_posix())
            sample = grouped.setdefault(name, _Sample(name.replace(".", "_")))
            sample.members[kind or "bin"] = file
        yield from grouped.values()


def _rows(file: Path, field_name: str) -> Iterator[_Sample]:
    stem = re.sub(r"\W", "_", file.name.partition(".")[0])
    held: list[bytes] = []
    row = 0

    def done() -> Iterator[_Sample]:
        if row and held:
            about = json.dumps({"source": file.name, "row": row}).encode()
            yield _Sample(f"{stem}-{row:09d}", {"json": about, "txt": b"".join(held)})

    for event in read_documents(file, Reading(field_name), Tally()):
        if isinstance(event, Start):
            yield from done()
            row, held = event.row, []
        elif isinstance(event, bytes):
            held.append(event)
        elif isinstance(event, Drop):
            held = []
    yield from done()


def _write(path: Path, samples: list[_Sample]) -> ShardIndex:
    partial = path.with_name(path.name + ".part")
    try:
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as tar:
            for sample in samples:
                for kind, content in sorted(sample.members.items()):
                    member = tarfile.TarInfo(f"{sample.key}.{kind}")
                    member.size = content.stat().st_size if isinstance(content, Path) else len(content)
                    if isinstance(content, Path):
                        with content.open("rb") as file:
                            tar.addfile(member, file)
                    else:
                        tar.addfile(member, io.BytesIO(content))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    made = scan(path)
    write_index(made, beside(path))
    return made


def _describe(folder: Path, made: Sequence[ShardIndex]) -> None:
    shards = [
        {
            "name": one.path.name,
            "samples": one.samples,
            "bytes": one.bytes,
            "fields": list(one.fields),
            "sha256": _sha256(one.path),
        }
        for one in made
    ]
    about = {"format": 1, "samples": sum(one.samples for one in made), "shards": shards}
    (folder / DATASET).write_text(json.dumps(about, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- check and index -------------------------------------------------------------------------------------------------


def index(paths: Sequence[str | Path], fields: Sequence[str] | None = None) -> list[ShardIndex]:
    """Write the index of each tar beside it, and one of all into their folders.

    Raises:
        DataError: a tar cannot be used.
    """
    made = []
    for path in track(find_tars(paths), "Indexing", console=Console(stderr=True), transient=True):
        made.append(scan(path, fields))
        write_index(made[-1], beside(path))
    for folder in dict.fromkeys(one.path.parent for one in made):
        _describe(folder, [one for one in made if one.path.parent == folder])
    _show(made)
    return made


def check(paths: Sequence[str | Path], fields: Sequence[str] | None = None) -> list[ShardIndex]:
    """Read shards, print what they hold, and say all that is wrong.

    Looks at headers and the mark of the end, at what each sample lacks, at files without a byte, and, where there are
    indexes, at sizes, members and SHA-256.

    Raises:
        DataError: something is wrong; the message has all of it.
    """
    tars = find_tars(paths)
    known: dict[Path, dict[str, object]] = {}
    problems: list[str] = []
    for folder in dict.fromkeys(path.parent for path in tars):
        if (folder / DATASET).is_file():
            try:
                shards = json.loads((folder / DATASET).read_text())["shards"]
                known |= {folder / str(one["name"]): one for one in shards}
            except (ValueError, KeyError, TypeError):
                problems.append(f"{folder / DATASET}: cannot be read; run seqlong shards index")
    found: list[ShardIndex] = []
    for path in track(tars, "Checking", console=Console(stderr=True), transient=True):
        try:
            here = scan(path, fields)
            stored = read_index(path, beside(path))
        except DataError as error:
            problems.append(str(error))
            continue
        found.append(here)
        if stored is not None and (stored.fields != here.fields or (stored.offset != here.offset).any()):
            problems.append(f"{path}: its index is of another tar; run seqlong shards index")
        if path in known and known[path].get("sha256") != _sha256(path):
            problems.append(f"{path}: not the bytes that {DATASET} was written for (SHA-256 differs); copy it again")
        problems += _lacking(here)
    given = {path.resolve() for path in tars}
    problems += [
        f"{path}: named in {DATASET}, but not there"
        for path in known
        if path.resolve() not in given and not path.exists()
    ]
    _show(found)
    if problems:
        raise DataError("\n".join([f"{len(problems)} problem{'s' if len(problems) > 1 else ''}:", *problems]))
    return found


def _lacking(index: ShardIndex) -> list[str]:
    there = index.offset >= 0
    said = []
    for column, name in enumerate(index.fields):
        lack = (~there[:, column]).nonzero()[0]
        if 0 < len(lack) < index.samples / 2:
            said.append(
                f"{index.path}: {len(lack):,} of {index.samples:,} samples have no '{name}', such as "
                f"'{index.key(int(lack[0]))}'"
            )
        empty = (there[:, column] & (index.size[:, column] == 0)).nonzero()[0]
        if len(empty):
            said.append(f"{index.path}: {len(empty):,} '{name}' are empty, such as '{index.key(int(empty[0]))}'")
    return said


def _show(found: Sequence[ShardIndex], shown: int = 20) -> None:
    table = Table("shard", "samples", "bytes", "fields", box=None)
    for one in found[:shown]:
        counts = Counter({name: int((one.offset[:, at] >= 0).sum()) for at, name in enumerate(one.fields)})
        table.add_row(
            escape(one.path.name),
            f"{one.samples:,}",
            f"{one.bytes:,}",
            ", ".join(f"{name} {count:,}" if count != one.samples else name for name, count in counts.items()),
        )
    console = Console()
    console.print(table)
    if len(found) > shown:
        console.print(f"and {len(found) - shown:,} more")
    dotted = sum("." in one.key(place).rpartition("/")[2] for one in found for place in range(one.samples))
    samples, size = sum(one.samples for one in found), sum(one.bytes for one in found)
    console.print(f"{len(found):,} shards, {samples:,} samples, {size:,} bytes")
    if dotted:
        console.print(f"{dotted:,} keys have dots: webdataset itself would cut them at the first")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give bytes, or 512M, or 1G")
    return int(found[1]) * _SIZES[found[2].upper()]
