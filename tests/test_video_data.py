"""Clips of video files: which videos, which frames, which rows; and what becomes of files that are broken."""

from __future__ import annotations

import logging
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from video_cases import number_of, write_audio, write_video

from seqlong.batch import SequenceBatch
from seqlong.datamodules.video import Sampling, Tubelets, VideoData
from seqlong.datamodules.video.datamodule import _Streams
from seqlong.datamodules.video.index import DecodeError, read_index
from seqlong.datamodules.video.listing import Video, classes_of, divide, read_videos
from seqlong.datamodules.video.reading import Reader, augmented
from seqlong.errors import ConfigError, DataError

PATCH = Tubelets(2, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five files."""
    root = tmp_path_factory.mktemp("clips")
    for name, frames in (("cat", 12), ("dog", 20)):
        (root / name).mkdir()
        for number in range(5):
            write_video(root / name / f"v_{name}_g{number // 2:02}_c{number}.mp4", frames)
    return root


def data(path: Path, **settings: object) -> VideoData:
    given: dict[str, object] = {"sampling": Sampling("rate", 8, 10.0), "size": 32, "tubelets": PATCH, "batch_size": 4}
    return VideoData(str(path), **{**given, **settings})  # type: ignore[arg-type]


def seen(batch: SequenceBatch, row: int) -> list[int]:
    """Numbers of the frames that a row's patches show: the last column of patches is plain."""
    assert batch.patches is not None
    real = slice(None) if batch.segment_ids is None else batch.segment_ids[row] != 0
    patches = batch.patches[row][real]
    clip = PATCH.paste(patches, (len(patches) // 4, 2, 2))
    return [number_of(frame.numpy()) for frame in clip]


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders(folder: Path) -> None:
    videos = read_videos(folder)
    assert len(videos) == 10 and classes_of(videos, folder) == ["cat", "dog"]
    assert {video.label for video in videos if "cat" in video.path.parent.name} == {"cat"}


def test_folders_named_after_splits(tmp_path: Path, folder: Path) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / part).mkdir()
        for name in ("cat", "dog"):
            (tmp_path / part / name).symlink_to(folder / name)
    parts = divide(read_videos(tmp_path))
    assert {name: len(videos) for name, videos in parts.items()} == {"train": 10, "validation": 10, "test": 10}


def test_lists_say_what_is_known(folder: Path, tmp_path: Path) -> None:
    name = folder / "cat" / "v_cat_g00_c0.mp4"
    (tmp_path / "a.csv").write_text(f"path,label,start,end,split\n{name},cat,0.2,0.8,train\n{name},cat,,,val\n")
    with pytest.raises(DataError, match=r"its group .* is in train and in validation"):
        divide(read_videos(tmp_path / "a.csv"))
    (tmp_path / "b.jsonl").write_text(
        f'{{"path": "{name}", "label": 3, "start": 0.5, "group": "x"}}\n\n'
        f'{{"path": "{name}", "label": 10, "group": "y"}}\n'
    )
    videos = read_videos(tmp_path / "b.jsonl")
    assert [(v.label, v.start, v.end, v.group) for v in videos] == [("3", 0.5, None, "x"), ("10", 0.0, None, "y")]
    assert classes_of(videos, "b") == ["3", "10"]  # numbers in their order, not the alphabet's


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\nnone.mp4,cat\n", r"a.csv:2: there is no file none.mp4"),
        ("file,label\nx.mp4,cat\n", r"a.csv:1: the header has no column 'path', only file, label"),
        ("path,label\n,cat\n", r"a.csv:2: names no path"),
        ("path,start,end\nx.mp4,2,1\n", r"a.csv:2: end 1.0 must be later than start 2.0"),
        ("path,start\nx.mp4,soon\n", r"a.csv:2: start 'soon' is no number of seconds"),
        ("path,split\nx.mp4,trian\n", r"a.csv:2: split 'trian' is none of train, val and test"),
        ("path,label\nx.mp4,cat,7\n", r"a.csv:2: has more fields than the header's 2"),
        ("path\n", r"a.csv: has no videos"),
    ],
)
def test_words_for_bad_lists(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"1")
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_videos(tmp_path / "a.csv")


def test_words_for_other_bad_sources(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_videos(tmp_path / "none")
    with pytest.raises(DataError, match="has no videos; a folder needs one folder for each class"):
        read_videos(tmp_path)
    with pytest.raises(DataError, match="all 5 videos are of one class, 'cat'"):
        classes_of([video for video in read_videos(folder) if video.label == "cat"], folder)
    with pytest.raises(DataError, match="5 of 5 videos have no label"):
        _ = data(folder / "cat").classes
    (tmp_path / "a.jsonl").write_text('{"path": 1\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: is no JSON"):
        read_videos(tmp_path / "a.jsonl")


def test_a_group_is_never_parted() -> None:
    videos = [Video(Path(f"{c}{n}.mp4"), c, group=f"{n // 3}") for c in "abc" for n in range(30)]
    for seed in range(5):
        parts = divide(videos, 0.2, 0.2, seed)
        groups = [{video.group for video in parts[part]} for part in ("train", "validation", "test")]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
        assert all(groups) and sum(map(len, parts.values())) == 90


def test_groups_are_found_in_names(folder: Path) -> None:
    videos = read_videos(folder, r"_(g\d+)_")
    assert {video.group for video in videos} == {"g00", "g01", "g02"}
    with pytest.raises(ConfigError, match="is no regular expression"):
        read_videos(folder, "(")


# --- frames of a clip ------------------------------------------------------------------------------------------------


def test_sampling_is_by_time(tmp_path: Path) -> None:
    index = read_index(write_video(tmp_path / "a.mp4", 40))  # 4 s at 10 frames a second
    assert Sampling("spread", 4).frame_numbers(index).tolist() == [5, 15, 25, 35]
    assert Sampling("rate", 4, 5.0).frame_numbers(index, place=0.0).tolist() == [0, 2, 4, 6]
    assert Sampling("rate", 4, 5.0).frame_numbers(index, place=1.0).tolist() == [32, 34, 36, 38]
    assert Sampling("rate", 4).frame_numbers(index, place=1.0).tolist() == [36, 37, 38, 39]
    assert Sampling("rate", 4, 5.0).frame_numbers(index, 1.0, 1.8, place=0.5).tolist() == [10, 12, 14, 16]
    assert len(Sampling("whole", 100).frame_numbers(index)) == 40
    assert Sampling("whole", 100, 5.0).frame_numbers(index, 3.0).tolist() == [30, 32, 34, 36, 38]


def test_a_video_that_is_too_short(tmp_path: Path) -> None:
    index = read_index(write_video(tmp_path / "a.mp4", 6))
    assert Sampling("rate", 8, 10.0).frame_numbers(index).tolist() == [0, 1, 2, 3, 4, 5]
    assert Sampling("rate", 8, 10.0, "repeat").frame_numbers(index).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    for kind in ("rate", "spread"):
        with pytest.raises(ValueError, match="has 6 frames"):
            Sampling(kind, 8, 10.0, "error").frame_numbers(index)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="begins behind the end"):
        Sampling("spread", 8).frame_numbers(index, start=2.0)


@pytest.mark.parametrize("fps", [None, 5.0])
def test_clips_that_follow_each_other_leave_no_frame_out(fps: float | None, tmp_path: Path) -> None:
    index = read_index(write_video(tmp_path / "a.mp4", 38))
    sampling = Sampling("rate", 8, fps)
    found = [sampling.following(index, clip).tolist() for clip in range(sampling.clips_in(index))]
    assert list(chain.from_iterable(found)) == list(range(0, 38, 1 if fps is None else 2)) and found[-1]


# --- tubelets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["space", "time"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 8, 4), (3, 2, 16)])
def test_tubelets_are_the_clip(shape: tuple[int, int, int], order: str) -> None:
    cut = Tubelets(*shape, order=order)  # type: ignore[arg-type]
    clip = torch.randint(0, 256, (6, 16, 32, 3), dtype=torch.uint8)
    patches, grid = cut.cut(clip), cut.grid(6, 16, 32)
    assert patches.shape == (cut.count(6, 16, 32), cut.size)
    assert torch.equal(cut.paste(patches, grid), clip)
    where = cut.positions(grid)
    t, y, x = (int(p) for p in where[len(where) // 2 + 1])
    piece = clip[
        t * shape[0] : (t + 1) * shape[0], y * shape[1] : (y + 1) * shape[1], x * shape[2] : (x + 1) * shape[2]
    ]
    expected = (piece.reshape(-1).float() / 255 - cut.mean) / cut.deviation
    torch.testing.assert_close(patches[len(where) // 2 + 1], expected, atol=1e-5, rtol=1e-5)


def test_orders_of_tubelets() -> None:
    assert Tubelets(1, 1, 1).positions((2, 1, 2)).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert Tubelets(1, 1, 1, "time").positions((2, 1, 2)).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]]


def test_the_last_frame_fills_the_last_tubelet_and_pictures_must_divide() -> None:
    cut = Tubelets(2, 4, 4)
    clip = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 4, 4, 3).contiguous()
    assert cut.paste(cut.cut(clip), (2, 1, 1))[:, 0, 0, 0].tolist() == [0, 1, 2, 2]
    with pytest.raises(ConfigError, match="do not divide into patches"):
        cut.grid(2, 6, 8)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_hold_what_the_files_show(folder: Path) -> None:
    videos = data(folder, flip=0.0, seed=1)
    batch = next(iter(videos.train_dataloader()))
    assert batch.patches.shape == (4, 16, PATCH.size) and batch.positions.shape == (4, 16, 3)
    for row in range(4):
        numbers = seen(batch, row)
        assert numbers == list(range(numbers[0], numbers[0] + 8))
        assert f"v_{['cat', 'dog'][int(batch.targets[row, -1])]}_" in batch.source[row]
        first = float(batch.source[row].rpartition(":")[2].partition("-")[0])
        assert round(first * 10) == numbers[0]
    assert (batch.targets[:, :-1] == -1).all()


def test_batches_are_a_function_of_their_number(folder: Path) -> None:
    whole = [batch for batch, _ in zip(data(folder, seed=3).train_dataloader(), range(4), strict=False)]
    resumed = data(folder, seed=3, workers=2)
    resumed.load_state_dict({"consumed_batches": 2})
    for expected, found, _ in zip(whole[2:], resumed.train_dataloader(), range(2), strict=False):
        assert torch.equal(expected.patches, found.patches) and expected.source == found.source
    assert not torch.equal(whole[0].patches, whole[1].patches)


def test_an_epoch_shows_every_video_once(folder: Path) -> None:
    videos = data(folder, batch_size=2)
    count = len(videos.videos["train"])
    assert count == 6 and len(videos.videos["validation"]) == len(videos.videos["test"]) == 2
    loader = iter(videos.train_dataloader())
    names = [source.rpartition(":")[0] for _ in range(count) for source in next(loader).source]
    assert sorted(names[:count]) == sorted(names[count:]) and len(set(names)) == count


def test_evaluation_sees_every_clip_and_crop(folder: Path) -> None:
    videos = data(folder, eval_clips=3, eval_crops=3, eval_batch_size=9)
    batches = list(videos.val_dataloader())
    assert videos.views == 9 and len(batches) == 2
    firsts = [seen(batches[0], row)[0] for row in (0, 3, 6)]
    assert firsts == sorted(firsts) and firsts[0] == 0 and firsts[-1] == (4 if "cat" in batches[0].source[0] else 12)
    left, right = batches[0].patches[0], batches[0].patches[2]
    assert left[0].mean() != right[0].mean()  # the red third is seen on the left only


def test_a_short_clip_leaves_padding_or_repeats(folder: Path) -> None:
    batch = next(iter(data(folder, sampling=Sampling("rate", 16, 10.0), flip=0.0).val_dataloader()))
    cats = [row for row, source in enumerate(batch.source) if "cat" in source]
    assert (batch.segment_ids[cats[0]] != 0).sum() == 6 * 4 and batch.targets[cats[0], 23] == 0
    assert seen(batch, cats[0]) == list(range(12))
    again = data(folder, sampling=Sampling("rate", 16, 10.0, "repeat"), flip=0.0)
    row = next(iter(again.val_dataloader()))
    assert seen(row, cats[0]) == [*range(12), *range(4)]


def test_streams_walk_through_whole_videos(folder: Path) -> None:
    videos = data(folder, order="stream", batch_size=3, sampling=Sampling("rate", 8), flip=0.0)
    loader = iter(videos.train_dataloader())
    clips = -(-12 // 8) * 3 + -(-20 // 8) * 3
    rows: list[list[tuple[str, list[int], bool, int]]] = [[], [], []]
    for _ in range(clips // 3):
        batch = next(loader)
        for row in range(3):
            name = batch.source[row].rpartition(":")[0]
            rows[row].append((name, seen(batch, row), bool(batch.continues[row]), int(batch.positions[row, 0, 0])))
    for walk in rows:
        assert not walk[0][2]
        for (before, frames, _, _), (name, after, follows, place) in pairwise(walk):
            assert follows == (before == name and after[0] > 0)
            if follows:
                assert after[0] == frames[-1] + 1 and place == after[0] // 2
    everything = [(name, number) for walk in rows for name, frames, _, _ in walk for number in frames]
    assert len(everything) == len(set(everything)) == 3 * 12 + 3 * 20


def test_a_row_that_begins_inside_a_video_follows_on_from_nothing() -> None:
    streams = _Streams(np.array([7, 7, 7, 7]), seed=0)
    for sample in range(3 * 9 * 3):  # three rows of nine clips, three epochs
        _, number, follows, epoch = streams.place(sample, 3)
        step = sample // 3 % 9
        assert follows == (number > 0 and step > 0) and epoch == sample // 27
    assert any(streams.place(row, 3)[1] > 0 for row in range(3))
    with pytest.raises(ConfigError, match="needs a clip for each of 40 rows"):
        streams.place(0, 40)


# --- augmentation ----------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    """Adds one draw to all frames."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return (video.int() + int(torch.randint(0, 100, ()))).clamp(0, 255).byte()


def test_a_transform_draws_once_for_a_clip_and_the_same_for_a_seed() -> None:
    clip = torch.zeros(5, 4, 4, 3, dtype=torch.uint8)
    one, again, other = (augmented(clip, [Shift()], seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len(one.unique()) == 1
    with pytest.raises(ConfigError, match=r"gave \(5, 1, 4, 4\)"):
        augmented(clip, [nn.Sequential(Slice())], 0)


class Slice(nn.Module):
    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return video[:, :1]


def test_torchvision_transforms_take_a_clip(folder: Path) -> None:
    v2 = pytest.importorskip(
        "torchvision.transforms.v2", reason="needs torchvision of torch's own build", exc_type=Exception
    )
    clip = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    out = augmented(clip, [v2.RandomResizedCrop(32), v2.ColorJitter(0.5)], 0)
    assert out.shape == (4, 32, 32, 3) and out.dtype == torch.uint8


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """Six good files and two that are not."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "train" / name / f"{number}.mp4").symlink_to(
                folder / name / f"v_{name}_g0{number // 2}_c{number}.mp4"
            )
    write_audio(tmp_path / "train" / "cat" / "sound.mp4")
    whole = (write_video(tmp_path / "whole.ts", 40, gop=4)).read_bytes()
    (tmp_path / "train" / "dog" / "cut.ts").write_bytes(whole[: len(whole) // 40])
    return tmp_path


def test_a_broken_file_stops_by_default(broken: Path) -> None:
    videos = data(broken, batch_size=8)
    with pytest.raises(DecodeError, match=r"(sound.mp4|cut.ts): .*Set data.broken=skip or partial"):
        next(iter(videos.train_dataloader()))


def test_a_broken_file_is_counted_and_not_replaced(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = data(broken, batch_size=8, broken="skip")
    loader = iter(videos.train_dataloader())
    logging.getLogger("seqlong").propagate = True
    with caplog.at_level(logging.WARNING, "seqlong"):
        for _ in range(2):
            batch = videos.on_before_batch_transfer(next(loader), 0)
            lost = [row for row, source in enumerate(batch.source) if "!skipped" in source]
            assert lost and all(
                (batch.segment_ids[row] == 0).all() and (batch.targets[row] == -1).all() for row in lost
            )
    told = list(dict.fromkeys(record.getMessage() for record in caplog.records))  # twice where seqlong's log propagates
    assert len(told) == 2 and told[0].startswith("train epoch 1: ") and "of 8 clips counted for nothing: " in told[0]
    assert "sound.mp4 (has no video stream that can be decoded, only audio)" in told[0]


def test_partial_takes_what_there_is(tmp_path: Path) -> None:
    shared = Path(__file__).parents[2] / "shared" / "data" / "video" / "decord_corrupted.mp4"
    if not shared.is_file():
        pytest.skip("the real videos (../shared/data/video) are not on this machine")
    asked = np.arange(20, 40)
    clip = Reader((32, 32), 32, "partial").clip(Video(shared, "x"), 1, lambda index: asked, (0.5, 0.5), False)
    assert clip.pixels is not None and len(clip.pixels) == 8 and clip.label == 1
    assert "!in part: cannot be decoded at frame 28" in clip.source
    assert (
        Reader((32, 32), 32, "skip").clip(Video(shared, "x"), 1, lambda index: asked, (0.5, 0.5), False).pixels is None
    )


def test_files_are_opened_by_the_process_that_reads(folder: Path) -> None:
    videos = data(folder, workers=2)
    _ = videos.reader.index(videos.videos["train"][0].path)  # open in this process already
    for _, batch in zip(range(3), videos.train_dataloader(), strict=False):
        assert batch.patches.isfinite().all()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flip": 2.0}, "flip 2.0 must be a probability"),
        ({"size": 30}, "do not divide into patches"),
        ({"size": [32]}, "must be a number of pixels, or"),
        ({"order": "stream", "tubelets": Tubelets(2, 16, 16, "time")}, "needs tubelets.order=space"),
        ({"eval_clips": 0}, "must be 1 or more"),
    ],
)
def test_words_for_bad_settings(settings: dict[str, object], words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        data(folder, **settings)
