"""Recall tasks of files that users have: BABILong, and the Long Range Arena, as they are published."""

from __future__ import annotations

import json
import logging
import re
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from seqlong.datamodules.sampler import permute
from seqlong.datamodules.synthetic.draw import Draw
from seqlong.datamodules.synthetic.generator import RecallTask, Rows
from seqlong.datamodules.synthetic.language import Encoding
from seqlong.errors import DataError, located

log = logging.getLogger("seqlong")

#: A record: what is given, and the answer.
Record = tuple[bytes, str]
PARTS = ("train", "validation", "test")
Arena = Literal["listops", "text", "retrieval", "image", "pathfinder"]
#: Of each task: its classes, and its file or folder of each part.
ARENA: dict[str, tuple[int, tuple[str, str, str]]] = {
    "listops": (10, ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")),
    "text": (2, ("train", "test", "test")),
    "retrieval": (2, ("new_aan_pairs.train.tsv", "new_aan_pairs.eval.tsv", "new_aan_pairs.test.tsv")),
    "image": (10, ("data_batch_*.bin", "test_batch.bin", "test_batch.bin")),
    "pathfinder": (2, PARTS),
}
_IMAGE = 1 + 3 * 1024  # a label, then the red, green and blue of 32 x 32
#: The release has one picture without content, at this place of curv_baseline of the size of 32.
_EMPTY = ("imgs/0", "sample_172.png")


class FromFiles(RecallTask):
    """Records of a file as rows: what is given, ``Answer:``, the answer, padding. Training draws records; an evaluation
    takes them in order, from the first on."""

    counted = "records"
    encoding: Encoding

    def records(self, part: int) -> Records:
        """The records of train (0), validation (1) or test (2)."""
        raise NotImplementedError(f"{type(self).__name__} must define records(part)")

    def fit(self, record: Record, length: int, where: str) -> tuple[list[int], list[int]]:
        """Tokens of what is given and of the answer, ``length`` at most together."""
        given, answer = self._tokens(record)
        if len(given) + len(answer) > length:
            raise self.too_short(length, len(given) + len(answer), f"{where} and its answer")
        return given, answer

    def _tokens(self, record: Record) -> tuple[list[int], list[int]]:
        text, answer = record
        given = self.encoding.encode(f"{text.decode()}\nAnswer:").tolist()
        return given, self.encoding.encode(f" {answer}").tolist()

    def rows(self, draw: Draw, length: int) -> Rows:
        found = self.records(draw.part)
        chosen = draw.below(len(found), 1)[:, 0] if draw.part == 0 else np.maximum(draw.numbers, 0) % len(found)
        tokens = np.zeros((draw.rows, length), dtype=np.int64)
        targets = np.full((draw.rows, length), -1, dtype=np.int64)
        answers = targets.copy()
        for row, number in enumerate(chosen.tolist()):
            given, answer = self.fit(found[number], length, f"{found.name} record {number + 1}")
            whole = given + answer
            tokens[row, : len(whole)] = whole
            targets[row, len(given) - 1 : len(whole) - 1] = answer
            answers[row, len(given) - 1 : len(whole) - 1] = 0
        return Rows(tokens, targets, np.full_like(targets, -1), answers, 1)


class Babilong(FromFiles):
    """BABILong: a question about facts that lie in a long book (arXiv 2406.10149). The files are its own: JSON, or rows
    of JSON, with ``input``, ``question`` and ``target``, such as data/qa1/4k.json.

    Args:
        path: the file to ask from.
        train: a file to train on; the first if not given.
        tokenizer: ``bytes``, or the path of a tokenizer.json.

    Raises:
        DataError: a file is missing or of another form.
    """

    title = "BABILong"

    def __init__(self, path: str, train: str | None = None, tokenizer: str = "bytes") -> None:
        self.path, self.train, self.encoding = path, train, Encoding(tokenizer)
        self.vocab_size = self.encoding.vocab_size
        self._asked = _babilong(Path(path))
        self._trained = self._asked if train is None else _babilong(Path(train))

    def records(self, part: int) -> Records:
        return self._trained if part == 0 else self._asked

    def chance(self) -> float:
        return 1 / len({answer for _, answer in self._asked.held})

    def settings(self) -> dict[str, object]:
        return {"path": self.path, "train": self.train}


class LongRangeArena(FromFiles):
    """A task of the Long Range Arena (arXiv 2011.04006), as bytes: the class is the token to answer with at the end.

    ``listops``: the TSV files of the release; ``text``: IMDB's folders ``train`` and ``test`` with ``pos`` and ``neg``;
    ``retrieval``: the TSV pairs of AAN; ``image``: CIFAR-10's binary version, in grey. What is too long for a row is
    cut at its end, two documents each at theirs. Text and image have no validation of their own: it is their test.
    ``pathfinder``: one difficulty of one size, such as ``pathfinder32/curv_contour_length_14``, with its folders
    ``imgs`` and ``metadata``; pathfinder128 is Path-X. Its pictures are not divided by the release: a fixed tenth of
    them is the validation, another the test.

    Args:
        task: which.
        path: the folder with its files.

    Raises:
        DataError: a file is missing or of another form.
    """

    title = "Long Range Arena"

    def __init__(self, task: Arena, path: str) -> None:
        self.task, self.path, self.encoding = task, path, Encoding("bytes")
        self.vocab_size = self.encoding.vocab_size
        self._held: dict[int, Records] = {}

    def records(self, part: int) -> Records:
        if part not in self._held:
            name = ARENA[self.task][1][part]
            reader = {"listops": _Listops, "retrieval": _Pairs, "text": _Reviews, "image": _Images,
                      "pathfinder": _Paths}[self.task]  # fmt: skip
            self._held[part] = reader(Path(self.path), name)
        return self._held[part]

    def fit(self, record: Record, length: int, where: str) -> tuple[list[int], list[int]]:
        ending, answer = self._tokens((b"", record[1]))
        room = length - len(ending) - len(answer)
        if room < 1:
            raise self.too_short(length, len(ending) + len(answer) + 1, where)
        parts = record[0].split(b"\0") if self.task == "retrieval" else [record[0]]
        cut = b"\n\n".join(part[: (room - 2 * (len(parts) - 1)) // len(parts)] for part in parts)
        given = np.frombuffer(cut, dtype=np.uint8).astype(np.int64) + 4
        return [*given.tolist(), *ending], answer

    def chance(self) -> float:
        return 1 / ARENA[self.task][0]

    def settings(self) -> dict[str, object]:
        return {"arena": self.task, "path": self.path}


class Records:
    """Records by number; read when they are asked for, but for where they are."""

    name: str

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must define __len__()")

    def __getitem__(self, number: int) -> Record:
        raise NotImplementedError(f"{type(self).__name__} must define __getitem__(number)")


class _Held(Records):
    def __init__(self, name: str, held: list[Record]) -> None:
        self.name, self.held = name, held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, number: int) -> Record:
        return self.held[number]


def _babilong(path: Path) -> _Held:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; expected one of BABILong, such as data/qa1/4k.json")
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise DataError(located(path, error.lineno, f"{error.msg}; expected JSON, or a row of it a line")) from error
    held = []
    for number, one in enumerate(found, 1):
        if not isinstance(one, dict) or not {"input", "question", "target"} <= one.keys():
            has = ", ".join(one) if isinstance(one, dict) else type(one).__name__
            raise DataError(f"{path}: record {number} has {has}; expected input, question and target")
        held.append((f"{one['input']}\n{one['question']}".encode(), str(one["target"])))
    if not held:
        raise DataError(f"{path} holds no record")
    return _Held(str(path), held)


class _Lines(Records):
    """Lines of a TSV, found once."""

    first = 0

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.name = str(self.path)
        if not self.path.is_file():
            raise DataError(f"{self.path}: there is no such file; expected {name} of the Long Range Arena's release")
        if len(self) < 1:
            raise DataError(f"{self.path} holds no record")

    @cached_property
    def _starts(self) -> np.ndarray:
        data = np.memmap(self.path, dtype=np.uint8, mode="r") if self.path.stat().st_size else np.zeros(0, np.uint8)
        ends = np.flatnonzero(data == 10) + 1
        ends = ends if len(data) == 0 or (len(ends) and ends[-1] == len(data)) else np.append(ends, len(data))
        return np.concatenate([[0], ends])[self.first :]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _fields(self, number: int, count: int, what: str) -> list[bytes]:
        with self.path.open("rb") as file:
            file.seek(int(self._starts[number]))
            line = file.read(int(self._starts[number + 1] - self._starts[number]))
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != count:
            found = f"{len(fields)} fields"
            raise DataError(located(self.path, number + 1 + self.first, f"{found}; expected {count}: {what}"))
        return fields

    def _label(self, label: bytes, number: int, classes: int) -> str:
        text = label.decode("utf-8", "replace").strip()
        text = text[:-2] if text.endswith(".0") else text
        if not text.isdecimal() or int(text) >= classes:
            found = f"the label '{text}'"
            raise DataError(located(self.path, number + 1 + self.first, f"{found}; expected 0 to {classes - 1}"))
        return text


class _Listops(_Lines):
    """``Source``, ``Target``, with a header; brackets that only group are left out, as everybody does."""

    first = 1

    def __getitem__(self, number: int) -> Record:
        source, target = self._fields(number, 2, "Source and Target")
        return re.sub(rb"[() ]+", b" ", source).strip(), self._label(target, number, 10)


class _Pairs(_Lines):
    """label, two ids, two texts as Python writes bytes."""

    def __getitem__(self, number: int) -> Record:
        label, _, _, one, two = self._fields(number, 5, "label, two ids, two texts")
        texts = [text[2:-1] if text[:2] in (b"b'", b'b"') else text for text in (one, two)]
        plain = [text.replace(b"\\n", b"\n").replace(b"\0", b" ") for text in texts]
        return b"\0".join(plain), self._label(label, number, 2)


class _Reviews(Records):
    """Folders ``pos`` and ``neg`` of .txt files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = str(folder / name)
        self._files = [
            (path, label)
            for label, side in (("1", "pos"), ("0", "neg"))
            for path in (folder / name / side).glob("*.txt")
        ]
        self._files.sort(key=lambda item: item[0].name)  # so that both labels come up early
        if not self._files:
            raise DataError(f"{self.name} has no pos/*.txt and neg/*.txt; expected the folders of IMDB")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Record:
        path, label = self._files[number]
        return path.read_bytes(), label


class _Images(Records):
    """CIFAR-10's binary files, as bytes of grey: ``0.299 r + 0.587 g + 0.114 b``."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = str(folder / name)
        paths = sorted(folder.glob(name))
        if not paths:
            raise DataError(f"{self.name}: there is no such file; expected CIFAR-10's binary version")
        for path in paths:
            if path.stat().st_size % _IMAGE or not path.stat().st_size:
                raise DataError(f"{path} has {path.stat().st_size:,} bytes; expected a multiple of {_IMAGE:,}")
        self._data = [np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, _IMAGE) for path in paths]
        self._ends = np.cumsum([len(one) for one in self._data])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Record:
        file = int(np.searchsorted(self._ends, number, side="right"))
        record = self._data[file][number - int(self._ends[file])]
        red, green, blue = record[1:].reshape(3, -1).astype(np.float64)
        grey = np.rint(0.299 * red + 0.587 * green + 0.114 * blue).astype(np.uint8)
        return grey.tobytes(), str(record[0])


class _Paths(Records):
    """Pathfinder's pictures, as bytes of grey, row by row; ``metadata/*.npy`` are lines of text that say which there
    are: folder, file, a number, whether a path joins the two points, and how it was drawn."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, f"{folder} {name}"
        self._entries = _listed(folder)
        count, part = len(self._entries), PARTS.index(name)
        ends = [0, count * 8 // 10, count * 9 // 10, count]
        self._chosen = permute(np.arange(ends[part], ends[part + 1]), count, 0)
        if not len(self._chosen):
            raise DataError(f"{folder} lists {count} pictures, too few for {name}; expected 10 or more")

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Record:
        name, label = self._entries[self._chosen[number]]
        return self._picture(name).tobytes(), label

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        return self._picture(self._entries[0][0], check=False).shape

    def _picture(self, name: str, check: bool = True) -> np.ndarray:
        path = self.folder / name
        try:
            with Image.open(path) as image:
                grey = np.asarray(image.convert("L"))
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: there is no such file, but the metadata name it; unpack the release again"
            ) from error
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise DataError(
                f"{path} ({path.stat().st_size:,} bytes) is no picture that can be read: {error}"
            ) from error
        if check and grey.shape != self._shape:
            raise DataError(f"{path} is {grey.shape} large; expected {self._shape}, as {self._entries[0][0]}")
        return grey


def _listed(folder: Path) -> list[tuple[str, str]]:
    """File and label of each picture, in the order of the metadata."""
    lists = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not lists:
        inside = sorted(path.parent.name for path in folder.glob("*/metadata"))
        hint = f"choose one of {', '.join(inside)} in it" if inside else "such as pathfinder32/curv_contour_length_14"
        raise DataError(f"{folder} has no metadata/*.npy; expected a difficulty of Pathfinder: {hint}")
    found = []
    for path in lists:
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not text; expected lines such as 'imgs/0 sample_0.png 0 1 ...'") from error
        for line, text in enumerate(lines, 1):
            fields = text.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise DataError(
                    located(path, line, f"'{text[:60]}'; expected 'imgs/0 sample_0.png 0 1 ...', 0 or 1 last")
                )
            if (
                (fields[0], fields[1]) == _EMPTY
                and (empty := folder / "/".join(_EMPTY)).is_file()
                and not empty.stat().st_size
            ):
                log.warning("%s: left out, the release has it without content", empty)
                continue
            found.append((f"{fields[0]}/{fields[1]}", fields[3]))
    return found
