"""Videos as whole numbers: finite scalar quantisation, codes in pieces and whole, rows of codes that resume."""

from __future__ import annotations

import csv
import json
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from video_cases import plain, write_video

from seqlong.callbacks.checkpoints import CONFIG_KEY
from seqlong.cli import main
from seqlong.datamodules.video import SyntheticVideo, Tubelets, VideoCodes
from seqlong.datamodules.video.clips import Clip, join
from seqlong.errors import ConfigError, DataError
from seqlong.inference.model import Model
from seqlong.optim import Optimizer
from seqlong.tasks import VideoTokenizer
from seqlong.tasks.video_tokenizer import FSQ, on_grid, real_steps
from seqlong.video_codes import Encoder

TUBELETS = Tubelets(2, 8, 8)


# --- quantisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2, 3], [4]], ids=["usual", "odd and even", "one"])
def test_codes_are_whole_numbers_and_back(levels: list[int]) -> None:
    fsq = FSQ(levels)
    values, codes = fsq(4 * torch.randn(4000, len(levels)))
    assert int(codes.min()) >= 0 and int(codes.max()) < fsq.codes == np.prod(levels)
    torch.testing.assert_close(fsq.values(codes), values, atol=1e-6, rtol=0)
    every = torch.arange(fsq.codes)
    z = fsq.values(every).atanh()
    assert torch.equal(fsq(z)[1], every)  # each code is the code of its own value: all can come up
    assert fsq(torch.full((1, len(levels)), 1e4))[1].item() == fsq.codes - 1


def test_a_value_is_moved_by_less_than_a_level_and_gradients_pass() -> None:
    z = torch.linspace(-3, 3, 500)[:, None].requires_grad_()
    values, _ = FSQ([5])(z)
    assert (values - z.tanh()).abs().max() <= 1 / 5 + 1e-6
    values.sum().backward()
    torch.testing.assert_close(z.grad, 1 - z.detach().tanh() ** 2)


def tokenizer(**settings: object) -> VideoTokenizer:
    return VideoTokenizer(TUBELETS.size, width=16, **settings)  # type: ignore[arg-type]


def test_later_frames_change_no_code() -> None:
    task = tokenizer().eval()
    clip = torch.randint(0, 256, (16, 16, 24, 3), dtype=torch.uint8)
    other = clip.clone()
    other[10:] = 0
    grids = [TUBELETS.cut(part).unflatten(0, (8, 2, 3))[None] for part in (clip, other)]
    with torch.no_grad():
        a, b = (task.decode(task.encode(grid)[0]) for grid in grids)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_codes_of_pieces_are_those_of_the_whole() -> None:
    task = tokenizer(blocks=2).eval()
    task.narrow[1].weight.data.mul_(20)
    clip = torch.randint(0, 256, (40, 16, 24, 3), dtype=torch.uint8)
    encoder = Encoder(Model(task, Path("toy.ckpt"), torch.device("cpu")), TUBELETS)
    found = torch.cat([encoder.encode(part, measure=True) for part in clip.split([4, 2, 10, 20, 4])])
    grid = TUBELETS.cut(clip).unflatten(0, (20, 2, 3))[None]
    with torch.no_grad():
        values, codes = task.encode(grid)
        made = task._bytes(task.decode(values))
    assert torch.equal(found, codes[0]) and len(codes.unique()) > 20
    assert encoder.error / encoder.count == pytest.approx(float((made - task._bytes(grid)).square().mean()), rel=1e-4)


def test_padding_is_not_learnt() -> None:
    clips = [
        Clip(torch.full((8, 16, 16, 3), 200, dtype=torch.uint8)),
        Clip(torch.zeros(4, 16, 16, 3, dtype=torch.uint8)),
    ]
    batch = join(clips, torch.arange(2), TUBELETS, 16)
    assert on_grid(batch).shape == (2, 4, 2, 2, 384) and real_steps(batch).sum(dim=1).tolist() == [4, 2]


def test_it_learns_to_tell_pixels(tmp_path: Path) -> None:
    data = SyntheticVideo(frames=9, size=16, tubelets=Tubelets(1, 8, 8), batch_size=8, labels=False, eval_rows=16)
    task = VideoTokenizer(192, levels=[8, 8, 8], width=24, blocks=1, optimizer=Optimizer(lr=1e-2))
    trainer = Trainer(
        max_steps=50, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=50, use_distributed_sampler=False,
        num_sanity_val_steps=0, max_epochs=-1, check_val_every_n_epoch=None, inference_mode=False,
    )  # fmt: skip
    before = trainer.validate(task, data, verbose=False)[0]["val/psnr"]
    trainer.fit(task, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["val/psnr"] > before + 3 and found["val/bits_a_patch"] == 9
    assert 0 < found["val/codes_used"] <= 1
    batch = next(iter(data.val_dataloader()))
    pixels = task._bytes(on_grid(batch))
    frame = task._bytes(on_grid(batch).mean(dim=1, keepdim=True)).expand_as(pixels)
    errors = [float((frame - pixels).square().mean())]
    assert found["val/psnr_mean_frame"] == pytest.approx(-10 * np.log10(np.mean(errors)), abs=0.5)


def test_words_for_tokenizers_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"task.levels \[1, 4\]: expected numbers of 2 or more"):
        VideoTokenizer(12, levels=[1, 4])
    task = VideoTokenizer(12)
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(tubelets=TUBELETS), strategy=None)
    with pytest.raises(ConfigError, match=r"set task\.size=384"):
        task.setup("fit")
    task._trainer = SimpleNamespace(datamodule=None, strategy=SimpleNamespace(sequence=(None, 0, 2)))
    with pytest.raises(ConfigError, match="reads whole clips"):
        task.setup("fit")


# --- rows of codes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five videos of 2 x 3 codes a step; code n of video v is 100 v + n."""
    root = tmp_path / "codes"
    root.mkdir()
    for video, steps in enumerate([4, 1, 7, 3, 5]):
        codes = 100 * video + np.arange(steps * 6, dtype=np.uint16).reshape(steps, 2, 3)
        np.save(root / f"v{video}.npy", codes)
    (root / "codes.json").write_text('{"codes": 600}')
    return root


def data(path: Path, **settings: object) -> VideoCodes:
    given: dict[str, object] = {"length": 16, "batch_size": 2, "validation": 0.0, "test": 0.0}
    return VideoCodes(str(path), **{**given, **settings})  # type: ignore[arg-type]


def test_an_epoch_has_every_code_once(folder: Path) -> None:
    codes = data(folder, batch_size=1)
    rows = list(islice(codes.train_dataloader(), 7))  # 120 codes
    seen = torch.cat([row.tokens.flatten() for row in rows])
    assert len(seen.unique()) == 7 * 16
    for row in rows:
        real = row.targets >= 0
        assert (row.targets[real] == row.tokens[real] + 1).all() and (
            row.targets[real] // 100 == row.tokens[real] // 100
        ).all()
        ids = torch.zeros_like(row.tokens) if row.segment_ids is None else row.segment_ids
        assert len({(int(i), int(t) // 100) for i, t in zip(ids[0], row.tokens[0], strict=True)}) == len(ids.unique())
        place = row.tokens % 100
        expected = torch.stack([place // 6, place // 3 % 2, place % 3], dim=-1)
        assert torch.equal(row.positions, expected)
        inner = (~real[0]).nonzero().flatten().tolist()  # nothing is asked at a video's last code
        assert all(int(row.tokens[0, n]) % 100 + 1 in (24, 6, 42, 18, 30) for n in inner)
    assert codes.vocabulary.size == 600
    assert data(folder, positions="line").training_batches().grid is False  # type: ignore[attr-defined]


def test_streams_go_on_where_they_were_and_runs_resume(folder: Path) -> None:
    codes = data(folder, order="stream")
    rows = list(islice(codes.train_dataloader(), 6))
    assert rows[0].continues.tolist() == [False, False] and any(row.continues.any() for row in rows)
    for before, after in pairwise(rows):
        for row in range(2):
            if after.continues[row]:
                assert int(after.tokens[row, 0]) == int(before.tokens[row, -1]) + 1
    again = data(folder, order="stream", workers=1)
    again.load_state_dict({"consumed_batches": 4})
    found = next(iter(again.train_dataloader()))
    assert torch.equal(found.tokens, rows[4].tokens) and torch.equal(found.continues, rows[4].continues)


def test_evaluation_and_floors(folder: Path) -> None:
    codes = data(folder, validation=0.4, eval_batch_size=4)
    count = sum(np.load(video.path).size for video in codes.videos["validation"])
    rows = list(codes.val_dataloader())
    assert (
        sum(int((row.segment_ids != 0).sum()) if row.segment_ids is not None else row.tokens.numel() for row in rows)
        == count
    )
    assert [floor["name"] for floor in codes.floors()] == ["chance", "frequency"]
    assert codes.floors()[0]["bits"] == pytest.approx(np.log2(600))


def test_words_for_bad_codes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="make 1 rows of 100, and 2 or more are needed"):
        data(folder, length=100, order="stream").training_batches()
    with pytest.raises(DataError, match=r"has code \d+, but data.codes=50 are 0 to 49"):
        list(islice(data(folder, codes=50, batch_size=1).train_dataloader(), 7))
    (folder / "codes.json").unlink()
    with pytest.raises(ConfigError, match=r"set data\.codes"):
        _ = data(folder).vocabulary
    np.save(folder / "x.npy", np.zeros((2, 2), np.float32))
    with pytest.raises(DataError, match=r"x.npy: holds float32 of shape \(2, 2\); expected codes of uint8"):
        data(folder, codes=600).setup("fit")
    (folder / "x.npy").write_bytes(b"no")
    with pytest.raises(DataError, match=r"x.npy: is no .npy file"):
        data(folder, codes=600).setup("fit")


# --- the command -----------------------------------------------------------------------------------------------------


def test_videos_become_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        write_video(tmp_path / "clips" / name / "a.mp4", pictures=plain(10, (16, 24)))
    task = tokenizer()
    about = {
        "model": {"class_path": "seqlong.tasks.VideoTokenizer", "init_args": {"size": TUBELETS.size, "width": 16}},
        "data": {"class_path": "seqlong.datamodules.video.VideoData", "init_args": {
            "size": [16, 24], "tubelets": {"time": 2, "height": 8, "width": 8},
            "sampling": {"kind": "rate", "frames": 4}}},
    }  # fmt: skip
    torch.save({"state_dict": task.state_dict(), CONFIG_KEY: about}, tmp_path / "toy.ckpt")
    words = ["video", "codes", str(tmp_path / "clips"), "--ckpt", str(tmp_path / "toy.ckpt")]
    assert main([*words, "--out", str(tmp_path / "codes"), "--psnr"]) == 0
    found = np.load(tmp_path / "codes" / "cat" / "a.mp4.npy")
    assert found.shape == (5, 2, 3) and found.dtype == np.uint16
    assert json.loads((tmp_path / "codes" / "codes.json").read_text())["codes"] == 1000
    rows = list(csv.DictReader((tmp_path / "codes" / "codes.csv").open()))
    assert [(row["path"], row["label"]) for row in rows] == [("cat/a.mp4.npy", "cat"), ("dog/a.mp4.npy", "dog")]
    codes = data(tmp_path / "codes" / "codes.csv", batch_size=1)
    assert codes.vocabulary.size == 1000 and next(iter(codes.train_dataloader())).tokens.max() < 1000
    (tmp_path / "list.csv").write_text("path,start\nclips/cat/a.mp4,0.5\n")
    assert main(["video", "codes", str(tmp_path / "list.csv"), *words[3:], "--out", str(tmp_path / "c")]) == 2
    assert "is a stretch of a file" in capsys.readouterr().err
