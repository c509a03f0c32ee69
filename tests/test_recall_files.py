"""BABILong and the Long Range Arena, on made-up files of their forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seqlong.datamodules.synthetic import Babilong, LongRangeArena, SyntheticData
from seqlong.datamodules.synthetic.draw import Draw
from seqlong.errors import ConfigError, DataError

RECORDS = [
    {"input": "Mary went to the hall. It was night.", "question": "Where is Mary? ", "target": "hall"},
    {"input": "John is in the kitchen.", "question": "Where is John? ", "target": "kitchen"},
    {"input": "Ann left for the hall.", "question": "Where is Ann? ", "target": "hall"},
]


def text_of(row: np.ndarray) -> bytes:
    return bytes(int(token) - 4 for token in row if token >= 4)


def asked(generator: object, part: int, count: int, length: int) -> list[tuple[bytes, bytes]]:
    """What is given and what is asked, of the first rows of a part."""
    made = generator.rows(Draw(np.arange(count), 7, part=part), length)  # type: ignore[attr-defined]
    found = []
    for tokens, targets, answer in zip(made.tokens, made.targets, made.answer, strict=True):
        where = np.flatnonzero(targets >= 0)
        assert (
            (targets[where] == tokens[where + 1]).all() and (answer[where] == 0).all() and (np.diff(where) == 1).all()
        )
        found.append((text_of(tokens[: where[0] + 1]), text_of(targets[where])))
    return found


@pytest.mark.parametrize("rows", [False, True])
def test_babilong(rows: bool, tmp_path: Path) -> None:
    path = tmp_path / "4k.json"
    path.write_text("\n".join(map(json.dumps, RECORDS)) if rows else json.dumps(RECORDS))
    task = Babilong(str(path))
    found = asked(task, 2, 4, 80)
    assert found[1] == (b"John is in the kitchen.\nWhere is John? \nAnswer:", b" kitchen")
    assert found[3] == found[0] and found[0][1] == b" hall"
    assert task.chance() == 0.5
    assert {answer for _, answer in asked(task, 0, 30, 80)} == {b" hall", b" kitchen"}
    with pytest.raises(ConfigError, match=r"record 1 and its answer need rows of 6\d positions, found length 40"):
        asked(task, 2, 1, 40)
    data = SyntheticData(task, length=80, batch_size=2, eval_rows=3)
    batch = next(iter(data.test_dataloader()))
    assert text_of(batch.tokens[1].numpy()).startswith(b"John") and batch.answer.max() == 0
    other = tmp_path / "0k.json"
    other.write_text(json.dumps(RECORDS[1:2]))
    assert {one for _, one in asked(Babilong(str(path), train=str(other)), 0, 9, 80)} == {b" kitchen"}


def test_listops(tmp_path: Path) -> None:
    for name, label in (("train", 3), ("val", 4), ("test", 5)):
        lines = "".join(f"( ( ( [MAX {n} ) 2 ) ] )\t{label}\n" for n in range(6))
        (tmp_path / f"basic_{name}.tsv").write_text(f"Source\tTarget\n{lines}")
    task = LongRangeArena("listops", str(tmp_path))
    assert asked(task, 1, 3, 60)[2] == (b"[MAX 2 2 ]\nAnswer:", b" 4")
    assert asked(task, 2, 1, 60)[0][1] == b" 5" and {one for _, one in asked(task, 0, 5, 60)} == {b" 3"}
    assert asked(task, 2, 1, 14)[0] == (b"[MAX\nAnswer:", b" 5")  # cut at its end
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n1\t2\n1 2 3\n")
    with pytest.raises(DataError, match=r"basic_val.tsv:3: 1 fields; expected 2"):
        asked(LongRangeArena("listops", str(tmp_path)), 1, 2, 60)
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n1\t12\n")
    with pytest.raises(DataError, match=r"basic_val.tsv:2: the label '12'; expected 0 to 9"):
        asked(LongRangeArena("listops", str(tmp_path)), 1, 1, 60)


def test_retrieval(tmp_path: Path) -> None:
    (tmp_path / "new_aan_pairs.test.tsv").write_bytes(
        b"1.0\tA1\tB2\tb'one\\nmore'\tb'two'\n0.0\tA\tB\tb'three'\tb'four'"
    )
    found = asked(LongRangeArena("retrieval", str(tmp_path)), 2, 2, 60)
    assert found == [(b"one\nmore\n\ntwo\nAnswer:", b" 1"), (b"three\n\nfour\nAnswer:", b" 0")]
    assert asked(LongRangeArena("retrieval", str(tmp_path)), 2, 1, 18)[0][0] == b"one\n\ntwo\nAnswer:"


def test_text(tmp_path: Path) -> None:
    for side in ("pos", "neg"):
        (tmp_path / "test" / side).mkdir(parents=True)
        (tmp_path / "test" / side / f"{'12'[side == 'neg']}_7.txt").write_text(f"a {side} film")
    task = LongRangeArena("text", str(tmp_path))
    assert asked(task, 2, 2, 60) == [(b"a pos film\nAnswer:", b" 1"), (b"a neg film\nAnswer:", b" 0")]
    with pytest.raises(DataError, match=r"train has no pos/\*.txt"):
        asked(task, 0, 1, 60)


def test_image(tmp_path: Path) -> None:
    data = np.zeros((3, 3073), dtype=np.uint8)
    data[:, 0] = [7, 8, 9]
    data[1, 1:1025], data[1, 1025:2049], data[1, 2049:] = 100, 50, 10
    data[0].tofile(tmp_path / "data_batch_1.bin")
    data[1:].tofile(tmp_path / "data_batch_2.bin")
    (tmp_path / "test_batch.bin").write_bytes(data.tobytes()[:-1])
    task = LongRangeArena("image", str(tmp_path))
    records = task.records(0)
    assert len(records) == 3 and [records[n][1] for n in range(3)] == ["7", "8", "9"]
    assert records[1][0] == bytes([round(29.9 + 29.35 + 1.14)]) * 1024
    with pytest.raises(DataError, match="expected a multiple of 3,073"):
        task.records(2)


def pathfinder(folder: Path, count: int) -> Path:
    """A difficulty of Pathfinder as the release has it: pictures of 4 x 4 in two folders, and what they are."""
    for part in range(2):
        lines = []
        (folder / "imgs" / str(part)).mkdir(parents=True)
        for number in range(170, 170 + count):
            grey = np.arange(16, dtype=np.uint8).reshape(4, 4) + part * 100 + number - 170
            Image.fromarray(grey).save(folder / "imgs" / str(part) / f"sample_{number}.png")
            lines.append(f"imgs/{part} sample_{number}.png {number} {(part + number) % 2} 1.8 2 14 6.0\n")
        (folder / "metadata").mkdir(exist_ok=True)
        (folder / "metadata" / f"{part}.npy").write_text("".join(lines))
    return folder


def test_pathfinder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = pathfinder(tmp_path / "pathfinder32" / "curv_baseline", 20)
    (folder / "imgs" / "0" / "sample_172.png").write_bytes(b"")
    with caplog.at_level("WARNING", "seqlong"):
        task = LongRangeArena("pathfinder", str(folder))
        parts = [task.records(part) for part in range(3)]
    assert "sample_172.png" in caplog.text
    assert [len(part) for part in parts] == [31, 4, 4]
    seen = {}
    for part in parts:
        for number in range(len(part)):
            picture, label = part[number]
            first = picture[0]
            assert picture == bytes(range(first, first + 16)) and first not in seen
            assert int(label) == ((first % 100) + first // 100) % 2  # 170 is even
            seen[first] = label
    assert len(seen) == 39 and 2 not in seen
    (given, answer), = asked(task, 2, 1, 26)  # fmt: skip
    assert given == parts[2][0][0] + b"\nAnswer:" and answer == b" " + parts[2][0][1].encode()
    assert task.chance() == 0.5


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [("root", "no metadata.*choose one of curv_baseline"), ("label", r"0.npy:1: 'imgs/0 sample_170.png 170 2'"),
     ("missing", "sample_17.*no such file, but the metadata"), ("torn", "no picture that can be read"),
     ("size", r"\(4, 6\) large; expected \(4, 4\)"), ("few", "lists 2 pictures, too few for validation")],
    ids=["root", "label", "missing", "torn", "size", "few"],
)  # fmt: skip
def test_pathfinder_of_another_form(broken: str, complaint: str, tmp_path: Path) -> None:
    folder = pathfinder(tmp_path / "curv_baseline", 1 if broken == "few" else 10)
    for picture in sorted(folder.glob("imgs/*/*.png"))[1:]:
        if broken == "missing":
            picture.unlink()
        elif broken == "torn":
            picture.write_bytes(picture.read_bytes()[:40])
        elif broken == "size":
            Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(picture)
    if broken == "label":
        (folder / "metadata" / "0.npy").write_text("imgs/0 sample_170.png 170 2\n")
    with pytest.raises(DataError, match=complaint):
        asked(LongRangeArena("pathfinder", str(tmp_path if broken == "root" else folder)), 1, 2, 40)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [('[{"input": "a"}]', "record 1 has input; expected input, question and target"), ("[]", "holds no record"),
     ('{"input": \n', "expected JSON")],
    ids=["keys", "empty", "json"],
)  # fmt: skip
def test_files_of_another_form(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "qa1.json"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        Babilong(str(path))
    with pytest.raises(DataError, match="there is no such file"):
        Babilong(str(tmp_path / "none.json"))
