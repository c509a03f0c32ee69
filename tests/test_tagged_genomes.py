"""Genomes with tags: shares, the token at the head of a row, targets, and generating with a tag."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import causal_model

from seqlong.datamodules.dna.alphabet import BOS, A, C, G, N, T
from seqlong.datamodules.dna.tagged import TaggedGenomes, TaggedSource
from seqlong.errors import ConfigError
from seqlong.inference.generate import draw, prefix
from seqlong.inference.sampling import Sampling


def data(folder: Path, **settings) -> TaggedGenomes:  # type: ignore[no-untyped-def]
    """``at`` is of A and T, ``cg`` of C and G in two files; short records too."""
    random = np.random.default_rng(0)
    for name, letters, sizes in (("at", "AT", (4000, 30)), ("c", "CG", (1500,)), ("g", "CG", (900,))):
        text = [f">{name}{n}\n{''.join(random.choice(list(letters), size))}\n" for n, size in enumerate(sizes)]
        (folder / f"{name}.fa").write_text("".join(text))
    genomes = {
        "at": TaggedSource(str(folder / "at.fa"), 1.0),
        "cg": TaggedSource([str(folder / "c.fa"), str(folder / "g.fa")], 3.0),
    }
    given = {"length": 64, "batch_size": 8, "cache_dir": str(folder / "cache"), "tag_dropout": 0.25} | settings
    return TaggedGenomes(genomes, **given)


@pytest.mark.parametrize("targets", ["next", "same"])
def test_rows_are_headed_by_their_tag(targets: str, tmp_path: Path) -> None:
    made = data(tmp_path, targets=targets)
    assert made.tag_ids == {"at": 9, "cg": 10}
    assert made.vocabulary.size == 16 and made.vocabulary.letters[9:12] == ("<at>", "<cg>", "<reserved-11>")
    for part in made.split.regions.values():  # a small genome is not held out as a whole
        assert {int(made.owner[region.contig]) for region in part} == {0, 1}
    heads: Counter[int] = Counter()
    rows = 0
    for batch in [*islice(made.train_dataloader(), 40), *made.val_dataloader()]:
        training = batch.shape[1] == 64 and rows < 320
        for row in range(batch.shape[0]):
            ids = torch.ones(batch.shape[1]) if batch.segment_ids is None else batch.segment_ids[row]
            for segment in set(ids.tolist()) - {0}:
                inside = torch.nonzero(ids == segment)[:, 0]
                tokens, wanted = batch.tokens[row, inside], batch.targets[row, inside]
                bases = {A, T} if set(wanted.tolist()) & {A, T} else {C, G}
                head = int(tokens[0])
                assert head in ((9,) if bases == {A, T} else (10,)) or (head == BOS and training)
                heads[head] += training
                if targets == "next":
                    assert torch.equal(tokens[1:], wanted[:-1]) and (wanted >= 0).all()
                else:
                    assert torch.equal(tokens[1:], wanted[1:]) and wanted[0] == -1
                    assert batch.loss_weight[row, inside[0]] == 0
            rows += 1
    share = heads[10] / (heads[9] + heads[10])
    assert 0.65 < share < 0.85  # of weights 1 and 3
    assert 0.15 < heads[BOS] / sum(heads.values()) < 0.35


def test_the_same_rows_whoever_asks(tmp_path: Path) -> None:
    made = data(tmp_path)
    whole = made.mixed_windows[0]
    request = next(iter(made.train_dataloader().sampler))
    rows = whole.rows(request).pieces
    part = whole.rows(type(request)(0, 0, 64, request.samples[3:5], request.first, request.rows)).pieces
    assert [piece._replace(row=piece.row + 3) for piece in part] == [piece for piece in rows if piece.row in (3, 4)]
    starts = [
        (piece.contig, piece.start, piece.reverse)
        for batch in islice(made.train_dataloader().sampler, 4)
        for piece in whole.rows(batch).pieces
        if made.owner[piece.contig] == 0
    ]
    assert len(starts) == len(set(starts))  # none twice in an epoch


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="some tags have a weight and some have none"):
        TaggedGenomes({"a": TaggedSource("a.fa", 1.0), "b": TaggedSource("b.fa")})
    with pytest.raises(ConfigError, match=r"data\.tag_dropout is 2"):
        TaggedGenomes({"a": TaggedSource("a.fa")}, tag_dropout=2.0)
    with pytest.raises(ConfigError, match=r"data\.genomes is empty"):
        TaggedGenomes({})
    assert "tags" in data(tmp_path).describe()
    model = causal_model()
    assert prefix(model, None) == []
    with pytest.raises(ConfigError, match="was trained without tags"):
        prefix(model, "human")
    model.card["tags"] = {"human": 9, "yeast": 10}
    assert prefix(model, None) == [BOS] and prefix(model, "yeast") == [10]
    with pytest.raises(ConfigError, match=r"no such tag; did you mean 'human'\?; it has human, yeast"):
        prefix(model, "humn")


def test_a_tag_is_read_before_the_prompt() -> None:
    model = causal_model()
    tokens = torch.tensor([[10, A, C, N - 1]])
    hidden, _ = model.hidden(tokens)
    expected = model.task.head.logits(hidden)[0, -1, A : T + 1].log_softmax(-1).max()
    (block,) = draw(model, iter([b"ACT"]), 1, 1, Sampling(temperature=0.0), [10])
    assert float(block[1][0]) == pytest.approx(float(expected))
    best = Sampling(temperature=0.0)
    first = [float(next(draw(model, iter([]), 1, 1, best, head))[1][0]) for head in ([9], [10], [])]
    assert len(set(first)) == 3 and first[2] == pytest.approx(np.log(0.25))
