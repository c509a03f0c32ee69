"""Values of videos, features of another model, and starting from a pretrained backbone."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from video_cases import write_video

from seqlong.backbone import BackboneConfig
from seqlong.datamodules.video import Sampling, Tubelets, VideoData
from seqlong.embeddings import PatchEmbedding
from seqlong.errors import CheckpointError, ConfigError, DataError
from seqlong.labels import LabelledBatch
from seqlong.mixers import Bidirectional, Mamba2
from seqlong.tasks import MaskedVideo, VideoClassification, VideoRegression

PATCH = Tubelets(2, 16, 16)
MIXERS = {
    "m": partial(Mamba2, d_state=8, head_dim=8),
    "b": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8)),
}


def config(pattern: str, size: int = PATCH.size) -> BackboneConfig:
    patches = partial(PatchEmbedding, size=size)
    return BackboneConfig(vocab_size=4, d_model=16, pattern=pattern, mixers=MIXERS, patches=patches)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files; a list with numbers, and a folder of vectors."""
    root = tmp_path_factory.mktemp("values")
    lines = ["path,label,split"]
    (root / "features" / "clips").mkdir(parents=True)
    (root / "clips").mkdir()
    for number in range(6):
        pictures = np.full((8, 32, 32, 3), 30 * number + 20, dtype=np.uint8)
        write_video(root / "clips" / f"{number}.mp4", pictures=pictures)
        lines.append(f"clips/{number}.mp4,{number * 1.5 - 2},{'val' if number == 5 else 'train'}")
        ending = "mp4.npy" if number % 2 else "npy"
        np.save(root / "features" / "clips" / f"{number}.{ending}", np.array([number, -number, 7.0]))
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return root


def data(folder: Path, values: str | None, **settings: Any) -> VideoData:
    return VideoData(
        str(folder / "list.csv"), Sampling("whole", 8), size=32, tubelets=PATCH, batch_size=5, values=values, flip=0.0,
        **settings,
    )  # fmt: skip


def test_labels_may_be_numbers(folder: Path) -> None:
    videos = data(folder, "label")
    batch = next(iter(videos.train_dataloader()))
    assert isinstance(batch, LabelledBatch) and videos.kind == "value" and videos.classes == 1
    for row, (label, source) in enumerate(zip(batch.labels, batch.source, strict=True)):
        assert float(label) == int(Path(source.partition(":")[0]).stem) * 1.5 - 2
        assert (int(batch.starts[row]), int(batch.ends[row])) == (row * 16, row * 16 + 15)
    assert videos.label_names.mean == pytest.approx([np.mean(np.arange(5) * 1.5 - 2)])
    (row,) = videos.val_dataloader()
    assert row.labels.tolist() == [[5.5]] and videos.floors() == []


def test_features_are_found_by_the_name_of_the_video(folder: Path) -> None:
    videos = data(folder, str(folder / "features"))
    batch = next(iter(videos.train_dataloader()))
    numbers = torch.tensor([float(Path(source.partition(":")[0]).stem) for source in batch.source])
    assert torch.equal(batch.labels, torch.stack([numbers, -numbers, torch.full((5,), 7.0)], dim=1))
    assert videos.classes == 3 and videos.label_names.deviation[2] == 1.0


def test_a_clip_that_cannot_be_read_has_no_value(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    good = folder / "clips" / "1.mp4"
    (tmp_path / "list.csv").write_text(f"path,label,split\nbad.mp4,3,train\n{good},1,train\n")
    videos = VideoData(
        str(tmp_path / "list.csv"), Sampling("whole", 8), size=32, tubelets=PATCH, batch_size=2, values="label",
        broken="skip",
    )  # fmt: skip
    batch = next(iter(videos.train_dataloader()))
    task = VideoRegression(config("m"))
    assert sorted(batch.labels.flatten().tolist(), key=math.isnan) == [1.0, pytest.approx(math.nan, nan_ok=True)]
    loss, figures = task.objective(batch)
    assert int(figures["count"]) == 1 and bool(loss.isfinite())


def test_brightness_is_learnt(folder: Path) -> None:
    videos = data(folder, "label")
    task = VideoRegression(config("m"))
    task._trainer = SimpleNamespace(
        datamodule=videos, ckpt_path=None, state=SimpleNamespace(fn="fit"), strategy=None, is_global_zero=True
    )
    task.setup("fit")
    assert float(task.mean) == pytest.approx(1.0)
    optimizer = torch.optim.AdamW([weight for weight in task.parameters() if weight.requires_grad], lr=1e-2)
    batches = iter(videos.train_dataloader())
    for _ in range(40):
        loss, _ = task.objective(next(batches))
        optimizer.zero_grad()
        loss.backward()
        assert all(w.grad is not None for w in task.parameters() if w.requires_grad)
        optimizer.step()
    batch = next(batches)
    said = task.eval().predict_step(batch, 0)
    torch.testing.assert_close(said["answers"], batch.labels, atol=0.5, rtol=0)


def fit_of(task: Any, videos: Any) -> Any:
    task._trainer = SimpleNamespace(datamodule=videos, ckpt_path=None, state=SimpleNamespace(fn="fit"), strategy=None)
    return task


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_training_starts_from_a_masked_model(kind: str, folder: Path, tmp_path: Path) -> None:
    pretrained = MaskedVideo(config("bb"))
    path = tmp_path / "masked.ckpt"
    torch.save({"state_dict": pretrained.state_dict(), "global_step": 3}, path)
    settings: dict[str, Any] = {"init_from": str(path), "freeze": 1}
    if kind == "classification":
        task, videos = VideoClassification(config("bb"), 6, **settings), None
    else:
        task, videos = VideoRegression(config("bb"), **settings), data(folder, "label")
    fit_of(task, videos).setup("fit")
    for name, value in pretrained.backbone.state_dict().items():
        assert torch.equal(value, task.backbone.state_dict()[name]), name
    frozen = {name.split(".")[1] for name, w in task.backbone.named_parameters() if not w.requires_grad}
    assert frozen == {"weight", "projection", "0"}  # embeddings and the first block
    other = type(task)(config("b"), **({"classes": 6} if kind == "classification" else {}), init_from=str(path))
    with pytest.raises(CheckpointError, match="is of another architecture"):
        fit_of(other, videos).setup("fit")


def test_blocks_learn_at_rates_of_their_own(folder: Path) -> None:
    task = fit_of(VideoClassification(config("mm"), 6, layer_decay=0.5, backbone_lr=0.1), data(folder, None))
    task._trainer.max_steps, task._trainer.precision_plugin = 10, SimpleNamespace()
    rates = {
        id(weight): group["initial_lr"]
        for group in task.configure_optimizers()["optimizer"].param_groups
        for weight in group["params"]
    }
    first, second = (rates[id(block.mixer.out_proj.weight)] for block in task.backbone.blocks)
    assert (first, second, rates[id(task.head.weight)]) == pytest.approx((5e-5, 1e-4, 1e-3))


def test_words_for_values_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"VideoClassification learns classes, but data\.values"):
        fit_of(VideoClassification(config("m"), 2), data(folder, "label")).setup("fit")
    with pytest.raises(ConfigError, match=r"has 3 values, but the model puts out 1; set task\.values=3"):
        fit_of(VideoRegression(config("m")), data(folder, str(folder / "features"))).setup("fit")
    with pytest.raises(ConfigError, match="VideoRegression learns values of videos"):
        fit_of(VideoRegression(config("m")), data(folder, None)).setup("fit")
    with pytest.raises(DataError, match=r"data.values has neither .*clips/0.mp4.npy nor 0.npy"):
        _ = data(folder, str(tmp_path)).label_names
    (tmp_path / "list.csv").write_text(f"path,label\n{folder}/clips/0.mp4,cat\n")
    with pytest.raises(DataError, match="its label 'cat' is no number"):
        _ = VideoData(str(tmp_path / "list.csv"), tubelets=PATCH, values="label", validation=0.0, test=0.0).label_names
    (tmp_path / "clips").mkdir()
    for number in range(6):
        np.save(tmp_path / "clips" / f"{number}.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match="expected one vector of finite numbers"):
        _ = data(folder, str(tmp_path)).label_names
