"""Videos in webdataset tars: read where they lie, split by what their samples say, resumed to the batch."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_cases import number_of, write_video

from seqlong.cli import main
from seqlong.datamodules.video import Sampling, Tubelets, VideoCodes, VideoData
from seqlong.datamodules.video.decode import open_video
from seqlong.datamodules.video.listing import divide, read_videos
from seqlong.datamodules.video.live import watch
from seqlong.errors import DataError

PATCH = Tubelets(2, 16, 16)


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("films")
    return {name: write_video(folder / name, 12).read_bytes() for name in ("a.mp4", "b.mkv", "c.ts")}


@pytest.fixture
def folder(tmp_path: Path, films: dict[str, bytes]) -> Path:
    """Two tars of six samples, two a group."""
    root = tmp_path / "shards"
    root.mkdir()
    for shard in range(2):
        files: dict[str, bytes] = {}
        for place in range(6):
            number = 6 * shard + place
            label = "cat" if place % 2 else "dog"
            files[f"clip.v{number}.mp4"] = films["a.mp4"]
            files[f"clip.v{number}.json"] = json.dumps(
                {"label": label, "group": f"{label}{place // 2}{shard}"}
            ).encode()
        pack(root / f"shard-{shard:06}.tar", files)
    return root


def data(path: Path, **settings: Any) -> VideoData:
    return VideoData(str(path), Sampling("rate", 8), size=32, tubelets=PATCH, batch_size=4, **settings)


def test_a_member_is_read_as_a_file(tmp_path: Path, films: dict[str, bytes]) -> None:
    tar = pack(tmp_path / "x.tar", {"note.txt": b"7", **films})
    for name in films:
        with open_video(tar / name) as video:  # forward, back and forward again
            assert [number_of(video.read([n]).pixels[0]) for n in (2, 9, 0, 11)] == [2, 9, 0, 11], name
        assert [number_of(picture) for _, picture in watch(str(tar / name))] == list(range(12))
    assert [video.path.name for video in read_videos(tar)] == list(films)
    with pytest.raises(DataError, match=r"has no member d\.mp4"):
        open_video(tar / "d.mp4")
    with pytest.raises(DataError, match="there is no such file"):
        open_video(tmp_path / "y.tar" / "a.mp4")


def test_samples_say_what_is_known(folder: Path) -> None:
    videos = read_videos(folder)
    assert len(videos) == 12 and {video.label for video in videos} == {"cat", "dog"}
    parts = divide(videos, 0.2, 0.2)
    groups = [{video.group for video in parts[part]} for part in ("train", "validation", "test")]  # type: ignore[index]
    assert all(groups) and not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]


def test_names_of_tars_may_say_the_split(tmp_path: Path, films: dict[str, bytes]) -> None:
    for part in ("train", "val"):
        pack(tmp_path / f"{part}-000000.tar", {f"{part}.mp4": films["a.mp4"], f"{part}.cls": b"3\n"})
    videos = read_videos(tmp_path)
    assert [(video.split, video.label) for video in videos] == [("train", "3"), ("validation", "3")]


@pytest.mark.parametrize("order", ["shuffle", "stream"])
def test_a_run_resumes_with_other_workers(folder: Path, order: str) -> None:
    batches = list(islice(data(folder, order=order).train_dataloader(), 5))
    again = data(folder, order=order, workers=1)
    again.load_state_dict({"consumed_batches": 3})
    for found, expected in zip(again.train_dataloader(), batches[3:], strict=False):
        assert torch.equal(found.patches, expected.patches) and found.source == expected.source
    assert ".tar/clip.v" in batches[0].source[0] and {int(t) for t in batches[0].targets[:, -1]} <= {0, 1}


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (b"{", r"a.json is no JSON"),
        (b"[1]", r"expected an object"),
        (b'{"split": "trian"}', r"split 'trian' is none of train, val and test"),
        (b'{"start": "soon"}', r"start 'soon' is no number of seconds"),
        (b'{"start": 2, "end": 1}', r"end 1.0 must be later than start 2.0"),
    ],
    ids=["no json", "no object", "split", "start", "end"],
)
def test_words_for_bad_samples(about: bytes, words: str, tmp_path: Path, films: dict[str, bytes]) -> None:
    pack(tmp_path / "x.tar", {"a.mp4": films["a.mp4"], "a.json": about})
    with pytest.raises(DataError, match=words):
        read_videos(tmp_path)


def test_what_is_broken_is_named(tmp_path: Path, films: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    pack(tmp_path / "x.tar", {"a.mp4": films["a.mp4"], "b.mp4": b"", "c.mp4": b"no video"})
    assert main(["video", "check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "x.tar/b.mp4" in said and "the file is empty" in said and "1 decode whole" in said


def test_codes_may_lie_in_tars(tmp_path: Path) -> None:
    files = {}
    for number in range(4):
        file = io.BytesIO()
        np.save(file, 24 * number + np.arange(24, dtype=np.uint16).reshape(4, 2, 3))
        files[f"{number}.codes.npy"] = file.getvalue()
    pack(tmp_path / "x.tar", files)
    codes = VideoCodes(str(tmp_path), codes=96, length=8, batch_size=1, validation=0.0, test=0.0)
    found = torch.cat([batch.tokens.flatten() for batch in islice(codes.train_dataloader(), 12)])
    assert sorted(found.tolist()) == list(range(96))
