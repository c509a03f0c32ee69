"""Rows of video, DNA and text: what stands where, who sees whom, and which text is of which video."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from video_text_parallel import LOSSES, batches, config, gradients, matching, pairs, together

from seqlong.backbone import Backbone
from seqlong.batch import SequenceBatch
from seqlong.datamodules.video import MovingShapes, Sampling, SyntheticCaptions, Tubelets, VideoText
from seqlong.datamodules.video.clips import Clip
from seqlong.datamodules.video.multimodal import DNA, MultimodalVocabulary, Rows, Told
from seqlong.embeddings import PatchEmbedding, embed
from seqlong.errors import ConfigError, DataError
from seqlong.tasks import CausalLM, MaskedLM, VideoTextMatching
from seqlong.tasks.retrieval import Retrieval, belong, chance, contrast

TUBELETS = Tubelets(1, 2, 2)
WORDS = MultimodalVocabulary()


def filmed(frames: int = 2, seed: int = 0) -> Clip:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 4, 6, 3), dtype=np.uint8)
    return Clip(torch.from_numpy(pixels))


def joined(rows: Rows, *told: Told, frames: int = 2) -> SequenceBatch:
    return rows.join([filmed(frames, seed) for seed in range(len(told))], told, torch.arange(len(told)))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_video_then_dna_then_text() -> None:
    rows = Rows(TUBELETS, patches=12, text_length=5, dna_length=4)
    batch = joined(rows, Told("hé", "ACn"), Told("too long", "ACGTT"))
    assert batch.shape == (2, rows.length) == (2, 12 + 6 + 7)
    first = [DNA + 2, DNA + 4, DNA + 5, DNA + 8, DNA + 3, 2, *WORDS.encode("hé"), 3]
    assert batch.tokens[0].tolist() == [-1] * 12 + first + [0] * 3
    assert WORDS.decode(first) == "hé"
    assert batch.segment_ids[0].tolist() == [1] * 22 + [0] * 3
    # What follows a byte, of the text alone; patches and bases predict nothing.
    assert batch.targets[0].tolist() == [-1] * 17 + [*WORDS.encode("hé"), 3] + [-1] * 4
    # The second is cut, and so has no end.
    assert batch.tokens[1, 12:].tolist() == [
        DNA + 2,
        DNA + 4,
        DNA + 5,
        DNA + 6,
        DNA + 7,
        2,
        *WORDS.encode("too l"),
        0,
        0,
    ]
    # Patches stand on a grid of 2 x 2 x 3; tokens above all of it, one after the other, the same on every axis.
    assert batch.positions[0, :12].unique(dim=0).shape == (12, 3) and batch.positions[0, :12].max() == 2
    assert batch.positions[0, 12:22].tolist() == [[3 + n] * 3 for n in range(10)]
    both = joined(dataclasses.replace(rows, losses=("text", "dna")), Told("hé", "ACn"))
    assert both.targets[0, 12:16].tolist() == first[1:5] and (both.targets >= 0).sum() == 4 + 4


def test_masked_rows_hide_text_alone() -> None:
    batch = joined(Rows(TUBELETS, 12, 8, 4, "same"), Told("abcdefgh", "ACGT"), Told("hgfedcba", "ACGT"))
    text = (batch.tokens >= 4) & (batch.tokens < DNA)
    assert torch.equal(batch.targets >= 0, text | (batch.tokens == 3))
    assert torch.equal(batch.targets[text], batch.tokens[text])
    task = MaskedLM(config("m"), rate=0.5, mask_share=1.0, random_share=0.0, replacements=list(WORDS.replacements))
    seen = task.prepare(batch)
    hidden = seen.tokens != batch.tokens
    assert 2 < hidden.sum() < 16 and (seen.tokens[hidden] == 1).all() and (hidden <= (batch.targets >= 0)).all()


def test_a_clip_that_could_not_be_read_is_padding() -> None:
    rows = Rows(TUBELETS, 12, 5)
    batch = rows.join([Clip(None), filmed(1)], [Told("a", video=1, name=2), Told("b")], torch.arange(2))
    assert (batch.segment_ids[0] == 0).all() and (batch.targets[0] == -1).all()
    assert batch.tokens[1].tolist() == [-1] * 6 + [2, WORDS.encode("b")[0], 3] + [0] * 10  # the text follows at once


@pytest.mark.parametrize("targets", ["next", "pair"])
def test_a_text_sees_its_video_unless_they_are_to_be_matched(targets: str) -> None:
    torch.manual_seed(0)
    model = Backbone(config("mas")).double().eval()
    batch = joined(Rows(TUBELETS, 12, 8, 0, targets), Told("abcd", video=5, name=7))  # type: ignore[arg-type]
    batch.patches = batch.patches.double()
    other = dataclasses.replace(batch, patches=batch.patches + 0.5)
    text = batch.tokens[0] > 0
    before, after = (model(b).hidden[0, text] for b in (batch, other))
    if targets == "next":
        assert ((before - after).abs().amax(dim=1) > 1e-4).all()
        return
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    assert batch.targets[0, 11] == 5 and batch.targets[0, 17] == 7 and (batch.targets >= 0).sum() == 2
    assert batch.segment_ids[0].tolist() == [1] * 12 + [2] * 6 + [0] * 4
    # ... and stands as a text alone does, on one axis.
    alone = SequenceBatch(tokens=batch.tokens[:, 12:18])
    torch.testing.assert_close(model(alone).hidden[0], before)
    words = dataclasses.replace(batch, tokens=torch.where(batch.tokens > 3, 99, batch.tokens))
    video = batch.tokens[0] < 0
    torch.testing.assert_close(model(words).hidden[0, video], model(batch).hidden[0, video])


def test_each_kind_has_a_vector_of_its_own() -> None:
    torch.manual_seed(0)
    table, patches = torch.nn.Embedding(276, 8), PatchEmbedding(8, 3, modalities=[0, DNA])
    plain = PatchEmbedding(8, 3)
    plain.load_state_dict({k: v for k, v in patches.state_dict().items() if not k.startswith("modal")})
    tokens = torch.tensor([[-1, 0, 259, DNA, 275]])
    numbers = torch.randn(1, 5, 3)
    added = embed(tokens, numbers, None, table, patches) - embed(tokens, numbers, None, table, plain)
    torch.testing.assert_close(added[0], patches.modalities.weight[[0, 1, 1, 2, 2]])  # type: ignore[union-attr]
    for row in ((tokens.clamp(min=0), None), (None, numbers)):  # rows of tokens alone, of patches alone
        added = embed(*row, None, table, patches) - embed(*row, None, table, plain)
        kinds = [1, 1, 1, 2, 2] if row[1] is None else [0] * 5
        torch.testing.assert_close(added[0], patches.modalities.weight[kinds])  # type: ignore[union-attr]
    learnt = PatchEmbedding(8, 3, tables=[2, 2, 2])  # texts go on beyond the tables
    assert embed(tokens, numbers, torch.arange(5)[None, :, None].expand(1, 5, 3), table, learnt).isfinite().all()
    for wrong in ([1, 260], [0, 0]):
        with pytest.raises(ValueError, match="ascending from 0"):
            PatchEmbedding(8, 3, modalities=wrong)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text_length": 0}, "data.text_length 0"),
        ({"targets": "pair", "dna_length": 4}, "set data.dna_length=0"),
        ({"losses": ("dna",)}, "needs data.dna_length above 0"),
        ({"losses": ()}, "must name text, dna or both"),
    ],
)
def test_words_for_rows_that_cannot_be(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Rows(**({"tubelets": TUBELETS, "patches": 4, "text_length": 4} | settings))  # type: ignore[arg-type]


# --- files -----------------------------------------------------------------------------------------------------------


def listed(folder: Path, lines: list[dict[str, object]], name: str = "list.jsonl") -> Path:
    from video_cases import write_video

    for number in range(4):
        write_video(folder / f"{number}.mp4", 4)
    (folder / name).write_text("\n".join(json.dumps(line) for line in lines))
    return folder / name


def read(path: Path, **settings: object) -> VideoText:
    given = {"sampling": Sampling(frames=2), "size": 16, "tubelets": Tubelets(1, 8, 8), "text_length": 16}
    return VideoText(str(path), **(given | {"batch_size": 4, "validation": 0.3, "test": 0.0} | settings))  # type: ignore[arg-type]


def test_a_list_of_videos_with_texts(tmp_path: Path) -> None:
    path = listed(tmp_path, [{"path": f"{n}.mp4", "text": f"{n} {m}", "dna": "ACGT"} for n in range(4) for m in "ab"])
    data = read(path, dna_length=8, targets="next")
    assert data.length == 8 + 10 + 18
    of = {video.path.stem for video in data.videos["validation"]}
    assert len(of) == 1 and len(data.videos["validation"]) == 2  # both texts of a video are in one part
    assert not of & {video.path.stem for video in data.videos["train"]}
    batch = next(iter(data.train_dataloader()))
    for row in range(4):
        text = WORDS.decode(batch.tokens[row][batch.tokens[row] > 0].numpy())
        assert batch.source[row].split("/")[-1][0] == text[0]
        assert (batch.tokens[row] == -1).sum() == 8 and batch.patches[row, :8].std() > 0.1
    (found,) = data.val_dataloader()
    assert (found.index >= 0).sum() == 2
    paired = read(path, targets="pair")
    (found,) = paired.val_dataloader()
    numbers = [row[row >= 0].tolist() for row in found.targets[:2]]
    assert numbers[0][0] == numbers[1][0] and numbers[0][1] != numbers[1][1]
    assert paired.floors() == [{"name": "chance", "bits": 1.0}]
    (floor,) = read(path).floors()
    assert 0 < float(floor["bits"]) < math.log2(276)  # type: ignore[arg-type]
    assert "up to 16" in str(data.describe()["notes"])


def test_words_for_lists_that_cannot_be_used(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"path": f"{n}.mp4", "text": "a"} for n in range(4)]
    lines[2]["text"] = " "
    with pytest.raises(DataError, match=r"1 of 4 videos have no text, such as .*2\.mp4 \(line 3\)"):
        _ = read(listed(tmp_path, lines)).videos
    lines[2] |= {"text": "a", "dna": "ACGE"}
    with pytest.raises(DataError, match=r"list\.jsonl:3: dna has 'E'"):
        _ = read(listed(tmp_path, lines)).videos
    other = SyntheticCaptions(targets="next")
    task = CausalLM(config("m"))
    task._trainer = type("T", (), {"datamodule": other})()
    with pytest.raises(ConfigError, match=r"set\s+model.backbone.patches.init_args.size=384"):
        task.setup("fit")
    with pytest.raises(ConfigError, match="predicts the text that belongs to a video"):
        matched = matching()
        matched._trainer = task._trainer
        matched.setup("fit")
    with pytest.raises(ConfigError, match="needs rows of a video and a text"):
        matching().prepare(SequenceBatch(tokens=torch.zeros(1, 2, dtype=torch.int64)))


# --- made-up captions ------------------------------------------------------------------------------------------------


def test_captions_say_what_is_seen() -> None:
    maker = MovingShapes(1)
    random = np.random.default_rng(0)
    assert maker.captions == 80 and MovingShapes(2).captions == 4 * 3 * 400
    said = set()
    for _ in range(40):
        pixels, text = maker.clip(random, 6, 24)
        _, colour, _, _, way = text.split()
        lit = np.abs(pixels.astype(int) - pixels[0, 0, 0]).sum(-1) > 30
        middles = [np.argwhere(picture).mean(axis=0) for picture in lit]
        step = np.sign(np.round(middles[-1] - middles[0])).astype(int).tolist()
        assert step == {"left": [0, -1], "right": [0, 1], "up": [-1, 0], "down": [1, 0]}[way]
        assert all(picture.any() for picture in lit)
        if colour in ("red", "green", "blue"):
            assert pixels[0][lit[0]].mean(axis=0).argmax() == ("red", "green", "blue").index(colour)
        said.add(text)
    assert len(said) > 25
    data = SyntheticCaptions(MovingShapes(1), targets="pair", batch_size=8)
    one, two = (next(iter(data.train_dataloader())) for _ in range(2))
    assert torch.equal(one.targets, two.targets) and torch.equal(one.patches, two.patches)
    texts = [row[row >= 0][1].item() for row in one.targets]
    assert len(set(texts)) == len(set(one.source or []))  # the same number for the same text


# --- matching --------------------------------------------------------------------------------------------------------


def test_what_fits_too_is_no_wrong_answer() -> None:
    videos, names = torch.tensor([1, 1, 2, -1]), torch.tensor([5, 6, 5, -1])
    fits = belong(videos, names, videos, names)
    assert fits.tolist() == [[True, True, True, False], [True, True, False, False], [True, False, True, False],
                             [False] * 4]  # fmt: skip
    scores = torch.tensor([[1.0, 9.0, 9.0, 9.0], [0.5, 2.0, 1.0, 9.0]])
    nats = contrast(scores, torch.tensor([0, 1]), fits[:2], videos >= 0)
    torch.testing.assert_close(nats, torch.tensor([0.0, math.log(1 + math.exp(-1))]))


def test_recall_is_what_a_count_by_hand_gives() -> None:
    torch.manual_seed(0)
    video, text = torch.randn(40, 6), torch.randn(40, 6)
    videos, names = torch.arange(40), torch.arange(100, 140)
    videos[30:35] = videos[0]  # a video of six texts
    video[30:35] = video[0]
    names[39], text[39] = names[1], text[1]  # a text of two videos
    metric = Retrieval()
    for part in (slice(0, 17), slice(17, 40)):
        numbers = videos[part].clone()
        metric.update(video[part], text[part], numbers, names[part])
    metric.update(video[:2], text[:2], torch.tensor([-1, -1]), names[:2])
    found = metric.compute()
    for way, query, gallery, asked, given in (
        ("video_to_text", video, text, videos, names), ("text_to_video", text, video, names, videos),
    ):  # fmt: skip
        hits: dict[int, list[float]] = {1: [], 5: [], 10: []}
        for number in dict.fromkeys(asked.tolist()):
            row = asked.tolist().index(number)
            order: list[int] = []
            for place in (-(gallery @ query[row])).argsort().tolist():
                if given[place].item() not in order:
                    order.append(int(given[place]))
            right = {int(g) for a, g in zip(asked, given, strict=True) if a == number}
            for at, hit in hits.items():
                hit.append(float(bool(right & set(order[:at]))))
        for at, hit in hits.items():
            assert found[f"{way}/r{at}"].item() == pytest.approx(np.mean(hit)), (way, at)
    same = Retrieval()
    same.update(torch.ones(20, 2), torch.ones(20, 2), torch.arange(20), torch.arange(20))
    assert same.compute()["video_to_text/r10"] == 0  # vectors that are all alike find nothing


def test_chance_is_that_of_drawing() -> None:
    for right, of, at in itertools.product((1, 2, 3), (3, 6), (1, 2, 3)):
        draws = list(itertools.combinations(range(of), at))
        hits = sum(any(one < right for one in draw) for draw in draws)
        assert chance(right, of, at) == pytest.approx(hits / len(draws))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_formula(loss: str) -> None:
    task, batch = matching(loss), pairs(6)
    found, figures = task.objective(batch)
    video, text = task.embed(batch)
    torch.testing.assert_close(video.norm(dim=1)[:5], torch.ones(5, dtype=torch.float64))
    scores = task.pairs.scale * video @ text.T
    scores[0, 1] = scores[1, 0] = -math.inf  # rows 0 and 1 have one text
    known, nats = [0, 1, 2, 3, 4], 0.0  # row 5 has none
    for table in (scores, scores.T):
        nats += -sum(table[row, known].log_softmax(0)[row] for row in known)
    expected = nats / 10
    if loss == "sigmoid":
        expected = 0.0
        plain = task.pairs.scale * video @ text.T + task.pairs.offset
        for i, j in itertools.product(known, known):
            sign = 1 if i == j or {i, j} == {0, 1} else -1
            expected = expected - torch.nn.functional.logsigmoid(sign * plain[i, j]) / 5
    torch.testing.assert_close(found, torch.as_tensor(expected))
    assert figures["count"] == 10
    torch.testing.assert_close(figures["nats"], torch.as_tensor(nats))


def test_two_processes_are_one(tmp_path: Path) -> None:
    store, script = tmp_path / "store", Path(__file__).parent / "video_text_parallel.py"
    other = subprocess.Popen(
        [sys.executable, str(script), "1", "2", str(store)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        found = together(0, 2, str(store))
        assert other.wait(timeout=120) == 0
    finally:
        other.kill()
    for loss in LOSSES:
        exact = gradients(loss, batches(1)[0])
        assert set(found[loss]) == set(exact) and exact["loss"] > 0
        for key, value in exact.items():
            torch.testing.assert_close(found[loss][key], value, atol=1e-9, rtol=1e-7, msg=key)


def test_it_learns_which_is_which() -> None:
    torch.manual_seed(0)
    data = SyntheticCaptions(MovingShapes(1), 4, 16, Tubelets(2, 8, 8), 32, "pair", batch_size=12)
    task = VideoTextMatching(config("m", 384), width=32)
    task._trainer = type("T", (), {"strategy": None})()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    batch = next(iter(data.train_dataloader()))
    bits = []
    for _ in range(40):
        loss, figures = task.objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bits.append(float(figures["nats"] / figures["count"]) / math.log(2))
    assert bits[0] > 3.5 and bits[-1] < 2.9


def test_what_predict_gives_finds_its_partner() -> None:
    task, batch = matching().eval(), pairs(4)
    said = task.predict_step(dataclasses.replace(batch, index=torch.tensor([0, 1, -1, 3]), source=list("abcd")), 0)
    assert said["source"] == ["a", "b", "d"] and said["video"].shape == (3, task.pairs.width)
    video, _ = task.embed(batch)
    torch.testing.assert_close(said["video"], video[[0, 1, 3]])


def test_partial_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.width 0"):
        VideoTextMatching(config("m"), width=0)
    with pytest.raises(ConfigError, match="reads patches, but the model embeds tokens only"):
        VideoTextMatching(dataclasses.replace(config("m"), patches=None))
    assert partial(VideoTextMatching, config("m"))().describe()["head"]["name"] == "pairs, 128 wide"
