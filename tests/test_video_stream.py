"""Endless video: clips that follow each other, the state carried on, are the whole video, in the memory of a clip."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from video_cases import number_of, plain, write_audio, write_video

from seqlong import video
from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.callbacks.checkpoints import CONFIG_KEY, DATA_KEY
from seqlong.cli import main
from seqlong.datamodules.video import Sampling, Tubelets, VideoData
from seqlong.datamodules.video.clips import Clip, join
from seqlong.datamodules.video.decode import open_video
from seqlong.datamodules.video.index import DecodeError
from seqlong.datamodules.video.live import watch
from seqlong.datamodules.video.reading import Reader
from seqlong.embeddings import PatchEmbedding
from seqlong.errors import ConfigError
from seqlong.inference.model import Model
from seqlong.mixers import Attention, Bidirectional, Mamba2
from seqlong.tasks import CausalLM, MaskedVideo, VideoClassification, VideoPrediction
from seqlong.video_stream import Watcher, clips

TUBELETS = Tubelets(2, 8, 8)
MIXERS = {
    "m": partial(Mamba2, d_state=8, head_dim=8),
    "w": partial(Attention, heads=2, window=16, rope_axes=[4, 2, 2]),
    "a": partial(Attention, heads=2, rope_axes=[4, 2, 2]),
    "b": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8)),
}


def config(pattern: str) -> BackboneConfig:
    patches = partial(PatchEmbedding, size=TUBELETS.size)
    return BackboneConfig(vocab_size=4, d_model=16, pattern=pattern, mixers=MIXERS, patches=patches)  # type: ignore[arg-type]


def model(task: Any) -> Model:
    return Model(task.eval().requires_grad_(False), Path("toy.ckpt"), torch.device("cpu"))


def pixels(frames: int) -> Tensor:
    return torch.randint(0, 256, (frames, 16, 24, 3), dtype=torch.uint8)


def whole_row(clip: Tensor, label: int = 0) -> SequenceBatch:
    return join([Clip(clip, label)], torch.zeros(1, dtype=torch.int64), TUBELETS, TUBELETS.count(*clip.shape[:3]))


def watched(watcher: Watcher, clip: Tensor, sizes: list[int]) -> tuple[Tensor, dict[str, np.ndarray]]:
    found = [watcher.watch(part) for part in clip.split(sizes)]
    figures = {name: np.concatenate([steps.figures[name] for steps in found]) for name in found[0].figures}
    return torch.cat([steps.hidden for steps in found]), figures


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [None, 7.0, 25.0])
@pytest.mark.parametrize(
    "made",
    [
        {"count": 12},
        {"count": 9, "stamps": [0, 3, 20, 21, 22, 60, 75, 90, 91]},  # variable rate
        {"count": 10, "rotation": 90, "options": {"bf": "3", "crf": "10"}, "gop": 10},
    ],
    ids=["plain", "variable", "turned"],
)
def test_frames_as_they_come_are_those_of_the_whole_file(
    made: dict[str, Any], fps: float | None, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mp4", **made)
    with open_video(path) as reader:
        sampling = Sampling("rate", 1000, fps)
        numbers = sampling.following(reader.index, 0)
        frames = reader.read(numbers, short_side=16)
    live = list(watch(str(path), fps, short_side=16))
    assert np.array_equal(np.stack([picture for _, picture in live]), frames.pixels)
    if fps is None:
        np.testing.assert_allclose([seconds for seconds, _ in live], frames.seconds, atol=1e-6)


def test_frames_come_through_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.ts", 12)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    assert [number_of(picture) for _, picture in watch("-")] == list(range(12))


def test_what_came_before_a_fault_is_given(tmp_path: Path, shared_data: Path) -> None:
    given = []
    with pytest.raises(DecodeError, match="cannot be decoded at frame 28"):
        for times, part in clips(str(shared_data / "video" / "decord_corrupted.mp4"), Reader((32, 32), 32), 8, None):
            given.append((len(times), tuple(part.shape)))
    assert given == [(8, (8, 32, 32, 3))] * 3 + [(4, (4, 32, 32, 3))]
    with pytest.raises(DecodeError, match="has no video stream"):
        list(watch(str(write_audio(tmp_path / "a.m4a"))))


# --- clips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_classes_after_each_step_are_those_of_the_video_so_far(pool: str) -> None:
    task = VideoClassification(config("mw"), 3, pool=pool)  # type: ignore[arg-type]
    clip = pixels(20)
    hidden, shares = watched(Watcher(model(task), TUBELETS, "abc"), clip, [4, 2, 6, 6, 2])
    once, at_once = watched(Watcher(model(task), TUBELETS, "abc"), clip, [20])
    torch.testing.assert_close(hidden, once, atol=1e-4, rtol=1e-4)
    assert list(shares) == ["a", "b", "c"] and len(shares["a"]) == 10
    for name, number in zip("abc", range(3), strict=True):
        np.testing.assert_allclose(shares[name], at_once[name], atol=1e-4)
        for step in (1, 7, 10):  # what the task says of the video up to there
            row = whole_row(clip[: 2 * step])
            assert shares[name][step - 1] == pytest.approx(
                float(task(row)[0, -1].softmax(-1)[number]), abs=1e-4
            )  # fmt: skip


def test_a_mean_may_go_over_the_last_steps_only() -> None:
    task = VideoClassification(config("m"), 2)
    clip = pixels(12)
    _, shares = watched(Watcher(model(task), TUBELETS, window=2), clip, [4, 4, 4])
    row = whole_row(clip)
    mean = task.backbone(row).hidden[0].unflatten(0, (6, 6))[4:].mean(dim=(0, 1))
    assert shares["1"][-1] == pytest.approx(float(task.head.logits(mean[None, None])[0, 0].softmax(-1)[1]), abs=1e-5)


@pytest.mark.parametrize(("ahead", "normalise"), [(1, False), (2, True)])
def test_errors_of_prediction_are_those_of_the_whole(ahead: int, normalise: bool) -> None:
    task = VideoPrediction(config("mw"), ahead=ahead, normalise=normalise)
    clip = pixels(20)
    _, found = watched(Watcher(model(task), TUBELETS), clip, [4, 2, 6, 6, 2])
    error, _, counted, _, _ = task._errors(whole_row(clip))
    steps = error[0].unflatten(0, (10, 6)).mean(dim=1)[: 10 - ahead]
    assert counted.sum() == (10 - ahead) * 6 and np.isnan(found["error"][:ahead]).all()
    np.testing.assert_allclose(found["error"][ahead:], steps.numpy(), atol=1e-4)


def held(watcher: Watcher) -> int:
    """Numbers that a watcher keeps."""
    count = sum(part.numel() for part in [*watcher._sums, watcher._total, *watcher._expected])

    def add(value: Tensor) -> Tensor:
        nonlocal count
        count += value.numel()
        return value

    watcher.state.map(add)
    return count


@pytest.mark.parametrize("kind", ["classes", "errors"])
def test_memory_does_not_grow(kind: str) -> None:
    task = VideoClassification(config("mw"), 2) if kind == "classes" else VideoPrediction(config("mw"))
    watcher = Watcher(model(task), TUBELETS, window=3)
    sizes = []
    for _ in range(12):
        watcher.watch(pixels(8))
        sizes.append(held(watcher))
    assert sizes[1:] == sizes[1:2] * 11 and watcher.steps == 48


@pytest.mark.parametrize(
    ("task", "tubelets", "words"),
    [
        (lambda: CausalLM(dataclasses.replace(config("m"), patches=None)), TUBELETS, "reads tokens, not video"),
        (lambda: MaskedVideo(config("b")), TUBELETS, "sees later frames or keeps every patch"),
        (lambda: VideoPrediction(config("a")), TUBELETS, "give attention a window"),
        (lambda: VideoPrediction(config("m")), Tubelets(1, 8, 8), "reads patches of 384 numbers, but tubelets"),
        (lambda: VideoPrediction(config("m")), Tubelets(2, 8, 8, "time"), "its rows cannot go on in time"),
    ],
    ids=["tokens", "both sides", "unbounded", "size", "order"],
)
def test_words_for_models_that_cannot(task: Any, tubelets: Tubelets, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Watcher(model(task()), tubelets)


# --- training --------------------------------------------------------------------------------------------------------


def test_training_on_clips_that_continue_is_training_on_the_whole(tmp_path: Path) -> None:
    """Loss of every position and hidden states; gradients too, where the state's graph is kept."""
    write_video(tmp_path / "a.mp4", 24, size=(16, 24))
    settings: dict[str, Any] = {"size": [16, 24], "tubelets": TUBELETS, "labels": False, "flip": 0.0}
    settings |= {"validation": 0.0, "test": 0.0, "order": "stream", "batch_size": 1}
    data = VideoData(str(tmp_path), sampling=Sampling("rate", 8), **settings)
    parts: Iterator[SequenceBatch] = iter(data.train_dataloader())
    three = [next(parts) for _ in range(3)]
    whole = next(iter(VideoData(str(tmp_path), sampling=Sampling("rate", 24), **settings).train_dataloader()))
    assert [bool(part.continues) for part in three] == [False, True, True]
    assert torch.equal(torch.cat([part.positions for part in three], dim=1), whole.positions)

    task = VideoPrediction(config("mw"), carry_state=True).train()
    carried = [task._errors(part) for part in three]
    error = task._errors(dataclasses.replace(whole, continues=torch.tensor([False])))[0]
    for number, (found, _, counted, _, _) in enumerate(carried):
        inside = error[:, number * 24 : (number + 1) * 24]
        assert counted.sum() == 18  # the last step of a clip has its aim in the next
        torch.testing.assert_close(found[counted], inside[counted], atol=1e-4, rtol=1e-4)

    def gradient(hidden: Tensor) -> list[Tensor]:
        wanted = [weight for weight in task.backbone.parameters() if weight.requires_grad]
        return [g for g in torch.autograd.grad(hidden.square().mean(), wanted, allow_unused=True) if g is not None]

    state, hidden = task.backbone.initial_state(1, "cpu", torch.float32), []
    for part in three:
        output = task.backbone(part, state)
        state = output.state
        hidden.append(output.hidden)
    at_once = task.backbone(whole).hidden
    torch.testing.assert_close(torch.cat(hidden, dim=1), at_once, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(gradient(torch.cat(hidden, dim=1)), gradient(at_once), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


# --- the command -----------------------------------------------------------------------------------------------------


def save(folder: Path) -> Path:
    """A checkpoint as seqlong fit leaves it."""
    backbone = {
        "vocab_size": 4, "d_model": 16, "pattern": "m",
        "patches": {"class_path": "seqlong.embeddings.PatchEmbedding", "init_args": {"size": TUBELETS.size}},
        "mixers": {"m": {"class_path": "seqlong.mixers.Mamba2", "init_args": {"d_state": 8, "head_dim": 8}}},
    }  # fmt: skip
    task = VideoClassification(config("m"), 2)
    about = {
        "model": {"class_path": "seqlong.tasks.VideoClassification", "init_args": {"backbone": backbone, "classes": 2}},
        "data": {"class_path": "seqlong.datamodules.video.VideoData", "init_args": {
            "size": [16, 24], "tubelets": {"time": 2, "height": 8, "width": 8},
            "sampling": {"kind": "rate", "frames": 4, "fps": 5.0}}},
    }  # fmt: skip
    path = folder / "toy.ckpt"
    torch.save({"state_dict": task.state_dict(), CONFIG_KEY: about, DATA_KEY: {"classes": ["cat", "dog"]}}, path)
    return path


def test_the_command_writes_a_row_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, checkpoint = write_video(tmp_path / "a.mp4", 20), save(tmp_path)  # 2 s
    words = ["video", "stream", str(path), "--ckpt", str(checkpoint), "--embeddings", str(tmp_path / "e.npy")]
    assert main([*words, "--out", str(tmp_path / "o.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [(row["step"], row["start"], row["end"]) for row in rows] == [
        (str(n), f"{n * 0.4:.3f}", f"{n * 0.4 + 0.2:.3f}") for n in range(5)
    ]
    assert all(float(row["cat"]) + float(row["dog"]) == pytest.approx(1, abs=1e-4) for row in rows)
    kept = np.load(tmp_path / "e.npy")
    assert kept.shape == (5, 16) and kept.dtype == np.float32 and np.isfinite(kept).all()
    capsys.readouterr()
    assert main([*words, "--fps", "0", "--frames", "7", "--size", "16"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11 and np.load(tmp_path / "e.npy").shape == (10, 16)
    assert main([*words, "--size", "20"]) == 2 and "do not divide into patches" in capsys.readouterr().err
    assert main([*words[:-1], "e.csv"]) == 2 and "ends in .npy" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected pixels, such as 112"):
        video.command([*words[1:], "--size", "big"])


def test_a_video_that_breaks_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(tmp_path)
    pictures = np.concatenate([plain(6), plain(6)])
    path = write_video(tmp_path / "a.ts", pictures=pictures, codec="mpeg2video", gop=1, options={})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert main(["video", "stream", str(path), "--ckpt", str(checkpoint), "--fps", "0", "--partial"]) == 0
    assert 1 < len(capsys.readouterr().out.splitlines()) < 7
