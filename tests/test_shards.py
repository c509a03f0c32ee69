"""Tar shards: every sample by number, exactly once an epoch, and a tar that is not whole is never taken for one."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from seqlong.cli import main
from seqlong.datamodules import remote
from seqlong.datamodules.sampler import BatchSampler, Stage
from seqlong.datamodules.shards import (
    EpochOrder,
    Shards,
    beside,
    open_index,
    read_index,
    scan,
    split_name,
    write_index,
)
from seqlong.datamodules.text.files import find_files
from seqlong.errors import ConfigError, DataError
from seqlong.shards import check, index, make


def write(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """5, 3 and 7 samples of two fields, with dots in their keys."""
    paths = []
    for number, count in enumerate((5, 3, 7)):
        members = {}
        for sample in range(count):
            members[f"clip{number}.v{sample}.mp4"] = bytes([number, sample]) * (sample + 1)
            members[f"clip{number}.v{sample}.json"] = json.dumps({"n": sample}).encode()
        paths.append(write(tmp_path / f"{number}.tar", members))
    return paths


@pytest.mark.parametrize(
    ("name", "key", "field"),
    [
        ("0001.mp4", "0001", "mp4"),
        ("clip.v1.mp4", "clip.v1", "mp4"),
        ("a.b/c.d.json", "a.b/c.d", "json"),
        ("7.tokens.npy", "7", "tokens.npy"),
        ("7.seq.gz", "7", "seq.gz"),
        ("7.x.gz", "7", "x.gz"),
        ("7", "7", ""),
    ],
)
def test_keys_and_fields(name, key, field):
    assert split_name(name) == (key, field)


def test_fields_with_dots_of_their_own():
    assert split_name("7.a.left.png", ["left.png", "png"]) == ("7.a", "left.png")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_read_by_number(tmp_path, form):
    long = "folder/" + "n" * (90 if form == tarfile.USTAR_FORMAT else 180)
    members = {f"{long}{number}.txt": f"text {number}".encode() * number for number in range(4)}
    found = Shards([write(tmp_path / "a.tar", members, form)], cache_dir=tmp_path)
    assert [found.key(number) for number in range(4)] == [name[:-4] for name in members]
    assert [found.read(number, "txt") for number in range(4)] == list(members.values())


def test_samples_of_several_tars(shards, tmp_path):
    found = pickle.loads(pickle.dumps(Shards(shards, cache_dir=tmp_path)))
    assert len(found) == 15 and found.first.tolist() == [0, 5, 8, 15]
    for number in range(15):
        shard, place = found.locate(number)
        assert found.key(number) == f"clip{shard}.v{place}"
        sample = found.sample(number)
        assert sample == {"mp4": bytes([shard, place]) * (place + 1), "json": json.dumps({"n": place}).encode()}
        path, offset, size = found.span(number, "mp4")
        assert path.read_bytes()[offset : offset + size] == sample["mp4"]
    with pytest.raises(DataError, match=r"2\.tar: sample 'clip2\.v0' has no field 'mp3'; did you mean 'mp4'"):
        found.read(8, "mp3")
    with pytest.raises(DataError, match=r"there is no sample 15"):
        found.key(15)
    found.close()


def test_more_tars_than_may_be_open(tmp_path):
    paths = [write(tmp_path / f"{number}.tar", {"a.txt": bytes([number])}) for number in range(70)]
    found = Shards(paths, cache_dir=tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [found.read(number, "txt")[0] for number in [*range(70), *range(70)]] == [*range(70), *range(70)]
    assert len(os.listdir("/proc/self/fd")) - before <= 32
    found.close()
    assert len(os.listdir("/proc/self/fd")) == before


# Tars that are not whole


def test_a_tar_cut_anywhere_is_an_error_by_name(tmp_path):
    whole = write(tmp_path / "a.tar", {f"{number}.txt": b"x" * 700 for number in range(3)}).read_bytes()
    members = 3 * (512 + 1024)
    path = tmp_path / "b.tar"
    for cut in [*range(1, members + 1, 97), 512, 1536, 3072, members]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"b\.tar: (the tar is truncated or damaged|found no tar)"):
            scan(path)
    path.write_bytes(whole[: members + 512])
    assert scan(path).samples == 3
    damaged = bytearray(whole)
    damaged[1536 : 1536 + 100] = b"?" * 100  # a header in the middle
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"stop after sample '0', the 1th|truncated or damaged"):
        scan(path)


def test_a_tar_cut_after_it_was_indexed(shards, tmp_path):
    found = Shards(shards, cache_dir=tmp_path)
    shards[2].write_bytes(shards[2].read_bytes()[:4096])
    with pytest.raises(DataError, match=r"2\.tar: the tar ends inside sample 'clip2\.v6'"):
        found.read(14, "mp4")
    write_index(found.indexes[2], beside(shards[2]))
    with pytest.raises(DataError, match=r"2\.tar: the tar has 4,096 bytes, but its index 2\.tar\.idx is of one with"):
        Shards(shards, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty; expected a tar"),
        (b"\x1f\x8b whatever", r"the tar is compressed, so that no sample can be read without all before it"),
        (b"no tar at all" * 99, r"found no tar"),
        (bytes(1024), r"the tar holds no files"),
    ],
)
def test_what_is_no_tar(tmp_path, content, message):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        scan(path)


def test_members_that_cannot_be_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "b.txt"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"member 'a\.txt' is a link"):
        scan(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"two members are called 'a\.txt'"):
        scan(tmp_path / "b.tar")


# Indexes


def test_an_index_is_kept_and_not_believed_of_another_tar(shards, tmp_path):
    first = open_index(shards[0], cache_dir=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    again = read_index(shards[0], kept)
    assert again is not None and again.fields == first.fields and (again.offset == first.offset).all()
    assert [again.key(place) for place in range(5)] == [first.key(place) for place in range(5)]
    kept.write_bytes(b"no index")
    assert open_index(shards[0], cache_dir=tmp_path / "cache").samples == 5
    write(shards[0], {"other.txt": b"x"})
    assert open_index(shards[0], cache_dir=tmp_path / "cache").fields == ("txt",)


# The order


@pytest.mark.parametrize("locality", ["shuffle", "shards", "sequential"])
def test_an_epoch_has_every_sample_once(shards, tmp_path, locality):
    found = Shards(shards, cache_dir=tmp_path)
    order = EpochOrder(found.first, 3, locality)
    epochs = [order[np.arange(15) + 15 * epoch].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert (epochs[0] != epochs[1]) == (locality != "sequential")
    assert order[np.array([40, 3, 20])].tolist() == [epochs[2][10], epochs[0][3], epochs[1][5]]
    if locality == "shards":
        read = [found.locate(sample)[0] for sample in epochs[0]]
        assert len([shard for at, shard in enumerate(read) if at == 0 or read[at - 1] != shard]) == 3


class _Batches(Dataset):
    def __init__(self, found: Shards, order: EpochOrder) -> None:
        self.found, self.order = found, order

    def __getitem__(self, request):
        return [self.found.key(number) for number in self.order[request.samples].tolist()]


@pytest.mark.parametrize("locality", ["shuffle", "shards"])
def test_no_sample_is_lost_or_repeated_whoever_reads(shards, tmp_path, locality):
    """0, 2 and 3 workers, 1 and 2 ranks, and both changed between stop and start: the same batches."""
    found = Shards(shards, cache_dir=tmp_path)
    order = EpochOrder(found.first, 1, locality)

    def run(world: int, workers: int, start: int, count: int) -> list[list[str]]:
        ranks = []
        for rank in range(world):
            sampler = BatchSampler([Stage(1, 4)], rank, world, start)
            loader = DataLoader(_Batches(found, order), sampler=sampler, batch_size=None, num_workers=workers)
            ranks.append(list(islice(loader, count)))
        assert len({len(batches) for batches in ranks}) == 1
        return [[row for pair in zip(*rows, strict=True) for row in pair] for rows in zip(*ranks, strict=True)]

    whole = run(1, 0, 0, 15)
    seen = [key for batch in whole for key in batch]
    for epoch in range(4):
        assert len(set(seen[15 * epoch : 15 * epoch + 15])) == 15
    assert run(2, 2, 0, 6) + run(1, 3, 6, 4) + run(2, 0, 10, 5) == whole


# The command


def test_make_check_index(tmp_path, capsys):
    source = tmp_path / "in"
    for name in ("a/clip.v1.mp4", "a/clip.v1.json", "a/clip.v2.mp4", "a/clip.v2.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "rows.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "three"}\n')
    made = make(tmp_path / "out", [str(source)], size=40)
    found = Shards([one.path for one in made])
    samples = {found.key(number): found.sample(number) for number in range(len(found))}
    assert set(samples) == {"a/clip_v1", "a/clip_v2", "rows-000000001", "rows-000000003"}
    assert samples["a/clip_v2"] == {"mp4": b"a/clip.v2.mp4", "json": b"a/clip.v2.json"}
    assert samples["rows-000000003"]["txt"] == b"three"
    assert len(made) == 4 and all(beside(one.path).is_file() for one in made)
    again = make(tmp_path / "again", [str(source)], size=40)
    assert [one.path.read_bytes() for one in made] == [one.path.read_bytes() for one in again]
    assert main(["shards", "check", str(tmp_path / "out")]) == 0
    assert "4 shards, 4 samples" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"has shards already \(shard-000000\.tar\)"):
        make(tmp_path / "out", [str(source)])


def test_check_says_all_that_is_wrong(shards, tmp_path, capsys):
    index(shards)
    shards[0].write_bytes(shards[0].read_bytes()[:-8000])
    data = bytearray(shards[1].read_bytes())
    data[data.index(b'{"n"')] = ord("[")
    shards[1].write_bytes(data)
    write(tmp_path / "3.tar", {"a.txt": b"x", "b.txt": b"", "c.txt": b"y", "a.json": b"{}", "b.json": b"{}"})
    with pytest.raises(DataError) as caught:
        check([tmp_path])
    said = str(caught.value).splitlines()
    text = str(caught.value)
    assert said[0] == "4 problems:" and "0.tar: the tar has 12,480 bytes, but its index" in text
    assert "1.tar: not the bytes that index.json was written for (SHA-256 differs)" in text
    assert "3.tar: 1 of 3 samples have no 'json', such as 'c'" in text
    assert "3.tar: 1 'txt' are empty, such as 'b'" in text
    assert main(["shards", "check", str(tmp_path)]) == 2
    assert main(["shards", "check", str(tmp_path / "none.tar")]) == 2
    assert main(["shards", "frobnicate"]) == 2


# --- at a URL --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(shards) -> fsspec.AbstractFileSystem:
    """The same shards at ``memory://bucket``."""
    system = fsspec.filesystem("memory")
    for path in shards:
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def test_shards_at_a_url_are_read_where_they_lie(bucket, shards, tmp_path, monkeypatch):
    asked = []
    cat = type(bucket).cat_file
    monkeypatch.setattr(type(bucket), "cat_file", lambda self, path, **at: asked.append(at) or cat(self, path, **at))
    urls = remote.find("memory://bucket/*.tar")
    assert [url.rpartition("/")[2] for url in urls] == ["0.tar", "1.tar", "2.tar"] and all(map(remote.is_url, urls))
    here, there = Shards(shards, cache_dir=tmp_path), pickle.loads(pickle.dumps(Shards(urls, cache_dir=tmp_path)))
    assert len(there) == len(here) == 15
    asked.clear()
    for number in range(15):
        assert there.sample(number) == here.sample(number) and there.key(number) == here.key(number)
    assert sum(at["end"] - at["start"] for at in asked) == sum(index.size.sum() for index in here.indexes)
    path, offset, size = there.span(14, "mp4")
    assert path.is_relative_to(tmp_path / "remote") and path.read_bytes()[offset:][:size] == there.read(14, "mp4")
    with pytest.raises(DataError, match=r"memory:.*bucket/0.tar: sample 'clip0.v0' has no field 'mp3'; did you mean"):
        there.read(0, "mp3")


def test_an_index_at_a_url_saves_reading_the_headers(bucket, shards, tmp_path, monkeypatch):
    index([shards[0]])
    bucket.pipe("/bucket/0.tar.idx", beside(shards[0]).read_bytes())
    monkeypatch.setattr(remote, "opened", None)
    assert Shards(["memory://bucket/0.tar"], cache_dir=tmp_path / "new").read(4, "mp4") == b"\x00\x04" * 5


def test_what_is_wrong_at_a_url(bucket, tmp_path, monkeypatch):
    bucket.pipe("/bucket/cut.tar", bucket.cat("/bucket/0.tar")[:3000])
    for url, what in (
        ("memory://bucket/none.tar", "no such file"),
        ("memory://bucket/cut.tar", "truncated"),
        ("memory://bucket", "is a folder"),
        ("nosuch://bucket/a.tar", "Protocol not known"),
    ):
        with pytest.raises(DataError, match=f"{url}: .*{what}"):
            Shards([url], cache_dir=tmp_path)
    with pytest.raises(DataError, match="nothing there matches"):
        remote.find("memory://bucket/*.zip")
    found = Shards(["memory://bucket/2.tar"], cache_dir=tmp_path)
    bucket.pipe("/bucket/2.tar", b"other")
    with pytest.raises(DataError, match="was replaced by another"):
        found.read(6, "mp4")

    def fails(*words, **at):
        raise ConnectionResetError("the line is dead")

    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(type(bucket), "cat_file", fails)
    with pytest.raises(DataError, match="after 4 attempts: the line is dead"):
        found.read(0, "mp4")


def test_text_at_a_url_is_copied_once(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path / "cache"))
    bucket.pipe("/bucket/a.txt", b"some text")
    bucket.pipe("/bucket/b.png", b"none")
    (*_, first), left = find_files("memory://bucket/*.*")
    assert first.read_bytes() == b"some text" and first.name == "a.txt", "sorted: after the tars"
    assert [path.name for path in left] == ["b.png"]
    changed = first.stat().st_mtime_ns
    assert find_files("memory://bucket/a.txt")[0] == [first] and first.stat().st_mtime_ns == changed
    bucket.pipe("/bucket/a.txt", b"some other text")
    assert find_files("memory://bucket/a.txt")[0][0].read_bytes() == b"some other text"
