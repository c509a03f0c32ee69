"""Models that read patches: the same whole and in pieces, blind to what is hidden, able to learn an order of events."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.datamodules.video import FlashCount, FlashOrder, SyntheticVideo, Tubelets, VideoNeedle
from seqlong.datamodules.video.synthetic import COLOURS, MovingDigits
from seqlong.embeddings import PatchEmbedding
from seqlong.errors import ConfigError
from seqlong.mixers import Attention, Bidirectional, Mamba2
from seqlong.tasks import MaskedVideo, VideoClassification, VideoPrediction
from seqlong.tasks.video_classification import VideoAccuracy
from seqlong.tasks.video_patches import hide

MIXERS = {
    "m": partial(Mamba2, d_state=16, head_dim=16),
    "a": partial(Attention, heads=2, window=64, rope_axes=[8, 4, 4]),
    "b": partial(Bidirectional, mixer=partial(Mamba2, d_state=16, head_dim=16)),
    "s": partial(Attention, heads=2, causal=False, rope_axes=[8, 4, 4]),
}


def config(pattern: str, size: int = 12, **settings: object) -> BackboneConfig:
    patches = partial(PatchEmbedding, size=size)
    return BackboneConfig(vocab_size=4, d_model=32, pattern=pattern, mixers=MIXERS, patches=patches, **settings)  # type: ignore[arg-type]


def clip(rows: int = 2, grid: tuple[int, int, int] = (6, 3, 4), size: int = 12) -> SequenceBatch:
    """Random patches, a label at the last."""
    positions = Tubelets(1, 1, 1).positions(grid)
    targets = torch.full((rows, len(positions)), -1)
    targets[:, -1] = torch.arange(rows)
    return SequenceBatch(
        targets=targets, positions=positions.expand(rows, -1, 3).clone(), index=torch.arange(rows),
        patches=torch.randn(rows, len(positions), size),
    )  # fmt: skip


def part(batch: SequenceBatch, start: int, stop: int) -> SequenceBatch:
    cut = {
        name: value[:, start:stop]
        for name, value in vars(batch).items()
        if isinstance(value, Tensor) and value.dim() > 1
    }
    return dataclasses.replace(batch, **cut)


# --- patches in the backbone -----------------------------------------------------------------------------------------


def test_a_video_in_pieces_is_the_whole_video() -> None:
    model, batch = Backbone(config("mma")).eval(), clip()
    with torch.no_grad():
        whole = model(batch).hidden
        state = model.initial_state(2, "cpu", torch.float32)
        found = []
        for start in range(0, 72, 20):
            output = model(part(batch, start, start + 20), state)
            state = output.state
            found.append(output.hidden)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_only_differences_of_places_count_on_each_axis(axis: int) -> None:
    model, batch = Backbone(config("ss")).eval(), clip()
    moved = dataclasses.replace(batch, positions=batch.positions.clone())
    moved.positions[..., axis] += 37
    stretched = dataclasses.replace(batch, positions=batch.positions.clone())
    stretched.positions[..., axis] *= 2
    with torch.no_grad():
        here = model(batch).hidden
        torch.testing.assert_close(model(moved).hidden, here, atol=1e-4, rtol=1e-4)
        assert (model(stretched).hidden - here).abs().max() > 1e-3


def test_tokens_may_stand_between_patches() -> None:
    model, batch = Backbone(config("m")).eval(), clip(1)
    tokens = torch.full((1, 72), -1)
    tokens[0, 5] = 2
    mixed = dataclasses.replace(batch, tokens=tokens)
    with torch.no_grad():
        plain, changed = model(batch).hidden, model(mixed).hidden
        assert torch.equal(plain[:, :5], changed[:, :5]) and not torch.allclose(plain[:, 5:], changed[:, 5:])
        other = dataclasses.replace(mixed, patches=mixed.patches.clone())
        other.patches[0, 5] = 100.0  # behind a token, nothing is seen of a patch
        assert torch.equal(model(other).hidden, changed)


def test_learned_tables_are_an_option() -> None:
    embedding = PatchEmbedding(8, 12, tables=[6, 3, 4])
    batch = clip(1)
    plain = PatchEmbedding(8, 12)
    plain.projection = embedding.projection
    added = embedding(batch.patches, batch.positions) - plain(batch.patches)
    expected = sum(table.weight[batch.positions[0, 17, axis]] for axis, table in enumerate(embedding.tables))
    torch.testing.assert_close(added[0, 17], expected)
    with pytest.raises(ValueError, match="need positions"):
        embedding(batch.patches)


def test_words_for_models_and_patches_that_do_not_fit() -> None:
    tokens_only = BackboneConfig(d_model=32, pattern="m", mixers=MIXERS)
    with pytest.raises(ValueError, match=r"set backbone.patches to"):
        Backbone(tokens_only)(clip())
    with pytest.raises(ValueError, match=r"patches of 12 numbers, but backbone.patches was built for 5"):
        Backbone(config("m", size=5))(clip())
    with pytest.raises(ConfigError, match="VideoClassification reads patches, but the model embeds tokens only"):
        VideoClassification(tokens_only, 2)
    with pytest.raises(ConfigError, match="VideoPrediction predicts what comes, but block 1"):
        VideoPrediction(config("b"))
    with pytest.raises(ConfigError, match=r"rate 1.0 must lie between"):
        MaskedVideo(config("b"), rate=1.0)


# --- classification --------------------------------------------------------------------------------------------------


def test_the_mean_is_of_the_clip_without_its_padding() -> None:
    task, batch = VideoClassification(config("m"), 3).eval(), clip()
    batch.segment_ids = torch.ones(2, 72, dtype=torch.int32)
    batch.segment_ids[1, 50:] = 0
    batch.targets[1] = -1
    batch.targets[1, 49] = 1
    with torch.no_grad():
        hidden, logits = task.backbone(batch).hidden, task(batch)
        expected = task.head.logits(hidden[1:, :50].mean(1, keepdim=True))[0, 0]
    torch.testing.assert_close(logits[1, 49], expected, atol=1e-5, rtol=1e-5)
    said = task.predict_step(batch, 0)
    torch.testing.assert_close(said["log_probabilities"][1], expected.log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert said["label"].tolist() == [0, 1]


def test_views_of_a_video_are_averaged() -> None:
    metric = VideoAccuracy(2)
    sure, unsure = [0.9, 0.1], [0.45, 0.55]
    metric.update(torch.tensor([sure, unsure]), torch.tensor([0, 0]), torch.tensor([7, 7]))
    metric.update(torch.tensor([unsure, unsure, sure]), torch.tensor([0, 0, 1]), torch.tensor([8, 8, -1]))
    assert float(metric.compute()) == 0.5  # by clips it would be 1 of 4


def test_a_small_model_learns_an_order_of_events() -> None:
    """Guessing is right half of the time."""
    torch.manual_seed(0)
    data = SyntheticVideo(
        FlashOrder(2, 2), frames=8, size=16, tubelets=Tubelets(1, 16, 16), batch_size=48, eval_rows=128
    )
    task = VideoClassification(config("m", size=768), 2, pool="last")
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for batch, _ in zip(data.train_dataloader(), range(60), strict=False):
        task.train()
        loss, _figures = task.objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.eval()
    right = [
        (task(batch)[:, -1].argmax(-1) == batch.targets[:, -1]).float().mean().item() for batch in data.val_dataloader()
    ]
    assert np.mean(right) > 0.8, right


# --- masked and next -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["row", "clip_row", "tube", "random"])
def test_what_is_hidden_together(mask: str) -> None:
    grid = (8, 8, 16)
    positions = Tubelets(1, 1, 1).positions(grid).expand(40, -1, 3)
    index = torch.arange(40)
    hidden = hide(index, positions, mask, 0.6)  # type: ignore[arg-type]
    assert hidden.float().mean() == pytest.approx(0.6, abs=0.06)
    assert torch.equal(hidden[5:9], hide(index[5:9], positions[5:9], mask, 0.6))  # type: ignore[arg-type]
    by = hidden.reshape(40, *grid)
    whole_rows = bool((by == by[..., :1]).all())
    same_in_time = bool((by == by[:, :1]).all())
    assert (whole_rows, same_in_time) == {
        "row": (True, False), "clip_row": (True, True), "tube": (False, True), "random": (False, False),
    }[mask]  # fmt: skip
    assert not torch.equal(by[0], by[1])


def test_what_is_hidden_cannot_be_seen() -> None:
    task, batch = MaskedVideo(config("bs"), rate=0.5).eval(), clip()
    shown, aim, hidden = task.aims(batch)
    assert 0 < hidden.float().mean() < 1 and torch.equal(aim, batch.patches)
    other = dataclasses.replace(batch, patches=torch.where(hidden[..., None], 99.0, batch.patches))
    with torch.no_grad():
        assert torch.equal(task.predicted(shown), task.predicted(task.aims(other)[0]))
        loss, figures = task.objective(batch)
        guess = task.predicted(shown)
    assert loss.item() == pytest.approx((guess - batch.patches).square().mean(-1)[hidden].mean().item(), rel=1e-5)
    assert int(figures["count"]) == int(hidden.sum())


def test_the_next_picture_is_asked_for() -> None:
    task, batch = VideoPrediction(config("m")).eval(), clip()
    _, aim, counted = task.aims(batch)
    assert torch.equal(aim[:, :60], batch.patches[:, 12:]) and counted[:, :60].all() and not counted[:, 60:].any()
    skipped = dataclasses.replace(batch, segment_ids=torch.tensor([[0], [1]], dtype=torch.int32).expand(2, 72))
    skipped.positions = batch.positions * skipped.segment_ids[..., None]  # a row that could not be read
    assert task.aims(skipped)[2].sum(dim=1).tolist() == [0, 60]
    _, aim, counted = VideoPrediction(config("m"), ahead=0).aims(batch)
    assert torch.equal(aim[:, :71], batch.patches[:, 1:]) and counted.sum() == 2 * 71
    by_place = dataclasses.replace(batch, positions=Tubelets(1, 1, 1, "time").positions((6, 3, 4)).expand(2, -1, 3))
    _, aim, counted = task.aims(by_place)
    assert torch.equal(aim[:, :71], batch.patches[:, 1:])
    assert counted[0].reshape(12, 6).tolist() == [[True] * 5 + [False]] * 12  # never from one place to another


def test_prediction_learns_from_carried_state() -> None:
    task = VideoPrediction(config("m"), carry_state=True)
    batch = clip()
    for follows in (False, True):
        batch.continues = torch.tensor([follows, follows])
        loss, _ = task.objective(batch)
        loss.backward()
    assert task.carried is not None and task.carried.saved()["length"] == 72
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


# --- made-up video ---------------------------------------------------------------------------------------------------


def lit(pixels: np.ndarray, shape: int) -> np.ndarray:
    """Frames in which a shape shows its full colour."""
    return (pixels == COLOURS[shape]).all(-1).any((1, 2))


def test_labels_say_what_is_seen() -> None:
    order, count = FlashOrder(3, 2), FlashCount(4, 1)
    for seed in range(8):
        made = order.clip(np.random.default_rng(seed), 14, 32)
        firsts = [int(lit(made.pixels, shape).argmax()) for shape in range(3)]
        assert tuple(np.argsort(firsts)) == order.orders[made.label]
        made = count.clip(np.random.default_rng(seed), 16, 32)
        flashes = lit(made.pixels, 0).astype(int)
        assert int((np.diff(np.concatenate([[0], flashes])) == 1).sum()) == made.label


@pytest.mark.parametrize("ask", ["which", "when"])
def test_a_needle_is_in_one_frame(ask: str) -> None:
    needle = VideoNeedle(8, ask, parts=4)  # type: ignore[arg-type]
    for seed in range(4):
        made = needle.clip(np.random.default_rng(seed), 100, 8)
        flat = [len(np.unique(frame.reshape(-1, 3), axis=0)) <= 2 for frame in made.pixels]
        assert sum(flat) == 1
        place = flat.index(True)
        signs = sum(1 << f for f in range(4) if (made.pixels[place, f // 2 * 4, f % 2 * 4] == COLOURS[0]).all())
        assert made.label == (signs if ask == "which" else place // 25)


def test_clips_are_named_by_their_number() -> None:
    data = SyntheticVideo(batch_size=4, eval_rows=6, eval_batch_size=4)
    first = next(iter(data.train_dataloader()))
    data.load_state_dict({"consumed_batches": 0})
    again = next(iter(SyntheticVideo(batch_size=4).train_dataloader()))
    assert torch.equal(first.patches, again.patches)
    assert not torch.equal(first.patches, next(iter(SyntheticVideo(batch_size=4, seed=1).train_dataloader())).patches)
    rows = list(data.val_dataloader())
    assert [len(batch.index) for batch in rows] == [4, 2] and rows[0].patches.shape == (4, 108, 192)
    assert data.floors()[0]["bits"] == pytest.approx(np.log2(6))
    assert (next(iter(SyntheticVideo(labels=False).train_dataloader())).targets == -1).all()


def test_moving_digits() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'seqlong[digits]'")
    made = MovingDigits(2).clip(np.random.default_rng(0), 8, 40)
    assert made.pixels.shape == (8, 40, 40, 3) and made.pixels.max() > 200 and 0 <= made.label < 10
    assert (made.pixels[0] > 0).sum() < (made.pixels[5] > 0).sum()  # the second digit comes later


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlashOrder(5), "2 to 4 shapes"),
        (lambda: SyntheticVideo(FlashOrder(3, 2), frames=8), "need clips of 9 frames"),
        (lambda: SyntheticVideo(size=20), "do not divide into patches of 8 x 8"),
        (lambda: VideoNeedle(1), "2 to 16 signs"),
        (lambda: Tubelets(0), "each must be 1 or more"),
    ],
)
def test_words_for_bad_settings(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]
