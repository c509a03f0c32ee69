"""Files of every kind to documents: what they hold comes out whole, and what is wrong with one is said by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tracemalloc

import numpy as np
import pytest
import zstandard

from seqlong.datamodules.text import documents as documents_module
from seqlong.datamodules.text.corpus import Corpus
from seqlong.datamodules.text.documents import Drop, Reading, Start, Tally, read_documents
from seqlong.datamodules.text.files import CHUNK, find_files
from seqlong.datamodules.text.vocabulary import ByteVocabulary
from seqlong.errors import DataError

TEXTS = ["Call me Ishmael.", "caf\u00e9 \u4e16\u754c", "two\nlines\n"]


def read(path, **settings) -> list[str]:
    """The documents of a file."""
    found: list[bytes] = []
    for event in read_documents(path, Reading(**settings), Tally()):
        if isinstance(event, Start):
            found.append(b"")
        elif isinstance(event, Drop):
            found.pop()
        else:
            found[-1] += event
    return [text.decode() for text in found]


def jsonl(texts=TEXTS, field="text") -> bytes:
    return b"".join(json.dumps({field: text, "id": 1}).encode() + b"\n" for text in texts)


# What comes out


@pytest.mark.parametrize(
    ("suffix", "press"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
     (".zst", zstandard.ZstdCompressor().compress)],
)  # fmt: skip
def test_every_compression_gives_the_same(tmp_path, suffix, press):
    rows, plain = tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}"
    rows.write_bytes(press(jsonl()))
    plain.write_bytes(press("".join(TEXTS).encode()))
    assert read(rows) == TEXTS
    assert read(plain) == ["".join(TEXTS)]


def test_zstd_of_several_frames(tmp_path):
    path = tmp_path / "a.txt.zst"
    press = zstandard.ZstdCompressor().compress
    path.write_bytes(press(b"one ") + press(b"") + press(b"two" * 100_000))
    assert read(path) == ["one " + "two" * 100_000]


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, kind in (("a", pyarrow.string()), ("b", pyarrow.large_string())):
        table = pyarrow.table({"body": pyarrow.array([*TEXTS, None], kind)})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        assert read(tmp_path / f"{name}.parquet", field="body") == [*TEXTS, ""]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read(path) == ["hello"]
    rows = tmp_path / "a.jsonl"
    rows.write_bytes(b"\xef\xbb\xbf" + jsonl(["x"]) + b"\n" + jsonl(["y"]))
    assert read(rows) == ["x", "y"]  # and an empty line is no row


@pytest.mark.parametrize("at", range(CHUNK - 4, CHUNK + 1))
def test_letters_may_lie_across_the_edge_of_a_piece(tmp_path, at):
    path = tmp_path / "a.txt"
    text = "a" * at + "\u4e16\u00e9" + "b" * 10
    path.write_text(text)
    assert read(path) == [text]


def test_a_very_long_line_is_read_in_pieces(tmp_path):
    """64 MiB without a line break, in a few MiB of memory."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
    vocabulary = ByteVocabulary()
    size, peak = 0, 0
    tracemalloc.start()
    events = read_documents(path, Reading(), Tally())
    for tokens, _ in vocabulary.write((0, event) for event in events if isinstance(event, bytes)):
        size += len(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 64 << 20
    assert peak < 16 << 20


def test_folders_patterns_and_what_is_left_out(tmp_path):
    for name in ("b/2.txt", "a/1.md", "a/.hidden.txt", "a/x.png", "c.jsonl.gz", ".git/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files, left = find_files(str(tmp_path))
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a/1.md", "b/2.txt", "c.jsonl.gz"]
    assert [file.name for file in left] == ["x.png"]
    files, left = find_files([str(tmp_path / "a" / "*"), str(tmp_path / "a/x.png"), str(tmp_path / "a/1.md")])
    assert [file.name for file in files] == ["1.md", "x.png"]  # named, so read; and none twice
    assert [file.name for file in find_files(str(tmp_path / "**/*.txt"))[0]] == ["2.txt"]


def test_rows_have_the_names_of_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one two", "", "three\tfour  five"]))
    corpus = Corpus(str(path), ByteVocabulary(), Reading(), tmp_path / "cache")
    assert [corpus.name(number) for number in range(len(corpus))] == ["a.jsonl:1", "a.jsonl:3"]
    assert corpus.notes() == ["1 document empty, skipped: " + f"{path}:2"]
    assert corpus.words.tolist() == [2, 3] and corpus.text_bytes.tolist() == [7, 16]
    assert corpus.read(0, 0, 9).tolist() == [2, *(byte + 4 for byte in b"one two"), 3]
    assert corpus.text(1, 0, int(corpus.lengths[1])) == b"three\tfour  five"
    packed = pickle.dumps(corpus)  # for workers that are started, not forked: the way to the file, not what it holds
    assert len(packed) < 10_000 and pickle.loads(packed).read(0, 1, 8).tolist() == corpus.read(0, 1, 8).tolist()


@pytest.mark.parametrize("chunk", [7, 64])
def test_words_are_those_between_white_space(tmp_path, monkeypatch, chunk):
    """Also where a piece ends in the middle of a word, or between two."""
    monkeypatch.setattr(documents_module, "CHUNK", chunk)
    text = " a bb  ccc\n\ndddd eeeee\tffffff ggggggg hhhhhhhh  " * 9
    path = tmp_path / "a.txt"
    path.write_text(text)
    corpus = Corpus(str(path), ByteVocabulary(), Reading(), tmp_path / "cache")
    assert corpus.words.tolist() == [len(text.split())]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_no_piece_ends_inside_a_letter(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents_module, "CHUNK", 7)
    text = "caf\u00e9 \u4e16\u754c \U0001f40b" * 20
    (tmp_path / name).write_bytes(jsonl([text]) if name == "a.jsonl" else text.encode())
    events = [event for event in read_documents(tmp_path / name, Reading(), Tally()) if isinstance(event, bytes)]
    assert len(events) > 20 and "".join(event.decode() for event in events) == text


# What is wrong


def test_undecodable_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\n" + b"x" * CHUNK + b"\nthird \xff line\xe4")
    with pytest.raises(DataError, match=rf"a\.txt:3: byte {CHUNK + 13:,} \(0xff\) is not UTF-8; convert the file"):
        read(path)
    with pytest.raises(DataError, match=r"found no text at all"):
        Corpus(str(path), ByteVocabulary(), Reading(unreadable="skip"), tmp_path / "cache")
    corpus = Corpus(str(path), ByteVocabulary(), Reading(unreadable="replace"), tmp_path / "cache")
    assert corpus.text(0, CHUNK, 2 * CHUNK).decode().endswith("third \ufffd line\ufffd")
    assert corpus.notes() == [f"1 document not UTF-8, bytes replaced by U+FFFD: {path}"]


def test_a_document_that_is_dropped_in_its_middle_leaves_the_others(tmp_path):
    bad, good = tmp_path / "a.txt", tmp_path / "b.txt"
    bad.write_bytes(b"x" * (2 * CHUNK) + b"\xff")
    good.write_text("fine")
    corpus = Corpus([str(bad), str(good)], ByteVocabulary(), Reading(unreadable="skip"), tmp_path / "cache")
    assert len(corpus) == 1 and corpus.text(0, 0, 6) == b"fine" and corpus.name(0) == "b.txt"
    assert corpus.notes() == [f"1 document not UTF-8, skipped: {bad}"]


def test_files_that_are_no_text_can_be_skipped_and_are_counted(tmp_path):
    for name, content in (("a.txt", b""), ("b.txt", b"x\0"), ("c.txt.gz", gzip.compress(b"x" * 10**5, mtime=0)[:-20])):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.txt").write_bytes(b"text")
    with pytest.raises(DataError, match=r"a\.txt: the file is empty"):
        Corpus(str(tmp_path), ByteVocabulary(), Reading(), tmp_path / "cache")
    corpus = Corpus(str(tmp_path), ByteVocabulary(), Reading(unreadable="skip"), tmp_path / "cache")
    assert len(corpus) == 1 and corpus.text(0, 0, 6) == b"text"
    names = f"{tmp_path / 'b.txt'}, {tmp_path / 'c.txt.gz'}"
    assert corpus.notes() == [
        f"1 document empty, skipped: {tmp_path / 'a.txt'}",
        f"2 documents no text in UTF-8, or cut off, skipped: {names}",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty; expected text"),
        ("a.txt", b"ab\0c", r"a\.txt: found a binary file"),
        ("a.txt", b"\xff\xfea\0", r"a\.txt: found UTF-16 text; convert it first \(iconv"),
        ("a.txt", gzip.compress(b"x", mtime=0), r"a\.txt: found gzip-compressed data; call it \.gz"),
        ("a.txt.gz", gzip.compress(b"x" * 10**5, mtime=0)[:-20], r"a\.txt\.gz: the compressed data stop in the middle"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(bytes(range(99)) * 999)[:-9], r"stop in the middle"),
        ("a.txt.bz2", bz2.compress(b"x" * 10**5)[:-9], r"stop in the middle: the file is truncated"),
        ("a.txt.xz", lzma.compress(b"x" * 10**5)[:-9], r"stop in the middle: the file is truncated"),
        ("a.txt.zst", b"no zstd at all, really", r"a\.txt\.zst: the compressed data are damaged"),
        ("a.txt.bz2", b"no bzip2 at all, really", r"a\.txt\.bz2: the compressed data are damaged"),
        ("a.jsonl", jsonl() + b'{"txt": "x"}\n', r"a\.jsonl:4: the row has no field 'text'; did you mean 'txt'\?"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: 'text' is a int, expected text; set data\.field"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a\.jsonl:2: the row is a list, expected an object with 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: the row is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: byte 10 of the row \(0xff\) is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: 'text' has half a surrogate pair at character 0"),
        ("a.parquet", b"", r"a\.parquet: the file is empty"),
        ("a.parquet", b"PAR1 and then nothing of it", r"a\.parquet: cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_name(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["one"]) + b'{"id": 1}\n{"text": "\xff"}\nnothing\n' + jsonl(["two"]))
    tally = Tally()
    events = list(read_documents(path, Reading(unreadable="skip"), tally))
    assert [event for event in events if isinstance(event, bytes)] == [b"one", b"two"]
    assert tally.counts == {"row without text, or not UTF-8, skipped": 2, "not JSON, skipped": 1}
    assert tally.names["not JSON, skipped"] == [f"{path}:4"]
    path.write_bytes(b'{"text": "a\xffb"}\n{"text": "c\\ud800d"}\n')
    assert read(path, unreadable="replace") == ["a\ufffdb", "c\ufffdd"]


def test_a_row_of_json_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "LONGEST_ROW", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["short", "x" * 200]))
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row is longer than"):
        read(path)


def test_a_parquet_without_the_column(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'text' \(there are content, n\); set data"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'n' holds int64, expected strings"):
        read(tmp_path / "a.parquet", field="n")


def test_paths_that_are_not_there(tmp_path):
    (tmp_path / "moby.txt").write_text("x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    for path, message in [
        ("mobi.txt", r"no such file; did you mean 'moby\.txt'"),
        ("nowhere/a.txt", r"the folder .*nowhere does not exist either"),
        ("pictures", r"the folder holds no text \(a\.png\); expected \.txt"),
        ("*.md", r"no file with a known suffix matches"),
    ]:
        with pytest.raises(DataError, match=message):
            find_files(str(tmp_path / path))
    with pytest.raises(DataError, match="found an empty list"):
        find_files([])


def test_token_arrays_in_a_tar(tmp_path):
    import tarfile

    path = tmp_path / "a.tar"
    arrays = {"1.npy": np.arange(4, 20, dtype=np.uint16), "2.tokens.npy": np.array([300])}
    with tarfile.open(path, "w") as tar:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            member = tarfile.TarInfo(name)
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
            if name == "1.npy":
                tar.fileobj.flush()
                whole = tar.fileobj.tell()
    with pytest.raises(DataError, match=r"ids 300 to 300, but the vocabulary's are 4 to 259; set data\.tokenizer"):
        Corpus(str(path), ByteVocabulary(), Reading(), tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:whole] + bytes(1024))
    corpus = Corpus(str(path), ByteVocabulary(), Reading(), tmp_path / "cache")
    assert corpus.read(0, 1, 17).tolist() == list(range(4, 20)) and corpus.text_bytes.tolist() == [16]
