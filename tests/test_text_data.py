"""TextData: batches that are what the files say, for any number of workers and ranks, and go on where they stopped."""

from __future__ import annotations

import bz2
import json
import math
import tarfile
from itertools import chain, islice

import numpy as np
import pytest
import torch
from text_cases import prose, trained

from seqlong.batch import SequenceBatch
from seqlong.datamodules.sampler import Stage
from seqlong.datamodules.text import AutoSplit, DocumentSplit, FileSplit, PositionSplit, Source, TextData
from seqlong.datamodules.text.vocabulary import BOS, EOS
from seqlong.errors import ConfigError, DataError


@pytest.fixture
def make(tmp_path):
    """Write documents as files and make their data module."""

    def build(texts: dict[str, str] | None = None, **settings) -> TextData:
        texts = texts or {"a": prose(900, 0), "b": prose(500, 1), "c": prose(61, 2), "d": prose(20, 3)}
        folder = tmp_path / "books"
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder / f"{name}.txt").write_text(text)
        settings = {"length": 64, "batch_size": 4, "split": PositionSplit(0.1, 0.1), **settings}
        if "sources" not in settings:
            settings.setdefault("path", str(folder))
        data = TextData(cache_dir=str(tmp_path / "cache"), **settings)
        data.texts = {f"{name}.txt": text.encode() for name, text in texts.items()}  # type: ignore[attr-defined]
        return data

    return build


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return trained(tmp_path_factory.mktemp("tokenizer"))


def take(data: TextData, count: int) -> list[SequenceBatch]:
    return list(islice(data.train_dataloader(), count))


def same(first: SequenceBatch, second: SequenceBatch) -> bool:
    for name in ("tokens", "targets", "loss_weight", "segment_ids", "continues", "index"):
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return first.source == second.source


def segments(batch: SequenceBatch, row: int) -> list[tuple[str, int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Document, start, stop, tokens, targets and weights of each piece of a row, by its source (three at most)."""
    names = batch.source[row].split("; ")
    ids = torch.ones_like(batch.tokens[row]) if batch.segment_ids is None else batch.segment_ids[row]
    found = []
    for number, name in enumerate(names, 1):
        document, _, interval = name.rpartition(":")
        start, stop = map(int, interval.split("-"))
        here = ids == number
        assert int(here.sum()) == stop - start
        found.append(
            (document, start, stop, batch.tokens[row][here], batch.targets[row][here], batch.loss_weight[row][here])
        )
    return found


# What a row holds


@pytest.mark.parametrize("documents", ["cut", "fit", "single"])
def test_tokens_and_targets_are_those_of_the_documents(make, documents):
    data = make(documents=documents, batch_size=3)
    limits = dict(
        zip(map(data.corpora[0].name, range(4)), data.parts["text"][1].spans["train"].stop.tolist(), strict=True)
    )
    for batch in take(data, 30):
        for row in range(3):
            if "more" in batch.source[row]:
                continue
            for document, start, stop, tokens, targets, weight in segments(batch, row):
                whole = [BOS, *(byte + 4 for byte in data.texts[document]), EOS]
                assert tokens.tolist() == whole[start:stop]
                following = whole[start + 1 : min(stop + 1, limits[document])]
                if documents == "fit" and stop < limits[document] and stop - start < 64:
                    following = whole[start + 1 : stop]
                following = following + [-1] * (stop - start - len(following))
                assert targets.tolist() == following
                assert weight.tolist() == [float(target >= 0) for target in following]
            padding = 0 if batch.segment_ids is None else int((batch.segment_ids[row] == 0).sum())
            assert (batch.targets[row][64 - padding :] == -1).all() and (batch.tokens[row][64 - padding :] == 0).all()


def test_masked_models_predict_text_alone(make):
    data = make({"a": "x" * 10, "b": "y" * 10, "c": "z" * 10}, targets="same", split=FileSplit(["c.txt"]), length=16)
    for batch in take(data, 6):
        text = batch.tokens >= 4
        assert (batch.targets[text] == batch.tokens[text]).all() and (batch.targets[~text] == -1).all()


@pytest.mark.parametrize("documents", ["cut", "single"])
def test_evaluation_measures_each_byte_once(make, documents):
    data = make(documents=documents, eval_length=48, eval_batch_size=4)
    counted = {name: np.zeros(len(text) + 2, int) for name, text in data.texts.items()}
    size = 0
    for batch in data.val_dataloader():
        assert not (batch.loss_weight[batch.targets == EOS] > 0).any()
        size += int((batch.loss_weight > 0).sum())
        for row in range(batch.shape[0]):
            if batch.index[row] < 0:
                assert (batch.targets[row] == -1).all()
                continue
            for document, start, _stop, _tokens, _targets, weight in segments(batch, row):
                counted[document][start + 1 : start + 1 + len(weight)] += weight.numpy().astype(int)
    spans = data.parts["text"][1].spans["validation"]
    # The first position of each stretch has nothing before it.
    assert size == sum(min(stop, len(text) + 1) - start - 1 for start, stop, text in
                       zip(spans.start, spans.stop, data.texts.values(), strict=True))  # fmt: skip
    for (name, seen), start, stop in zip(counted.items(), spans.start, spans.stop, strict=True):
        assert (seen[start + 1 : min(stop, len(data.texts[name]) + 1)] == 1).all() and seen.sum() <= stop - start - 1


def test_held_out_books_are_measured_whole(make):
    data = make(split=FileSplit(["c.txt"], ["d.txt"]))
    assert sum(int((batch.loss_weight > 0).sum()) for batch in data.val_dataloader()) == len(data.texts["c.txt"])
    assert sum(int((batch.loss_weight > 0).sum()) for batch in data.test_dataloader()) == len(data.texts["d.txt"])
    everything = sum(int((batch.loss_weight > 0).sum()) for batch in data.predict_dataloader())
    assert everything == sum(map(len, data.texts.values()))


# The same, whoever does it


@pytest.mark.parametrize(
    "settings", [{}, {"order": "stream"}, {"documents": "single", "order": "stream"}, {"documents": "fit"}]
)
def test_ranks_share_the_same_batches(make, settings, monkeypatch):
    whole = take(make(**settings), 12)
    for world in (2, 4):
        for rank in range(world):
            monkeypatch.setattr(TextData, "_place", lambda self, rank=rank, world=world: (rank, world))
            for batch, share in zip(whole, take(make(**settings), 12), strict=True):
                assert torch.equal(share.tokens, batch.tokens[rank::world])
                assert torch.equal(share.index, batch.index[rank::world])
                assert share.source == batch.source[rank::world]
                if batch.continues is not None:
                    assert torch.equal(share.continues, batch.continues[rank::world])


def test_resumed_and_with_workers_it_is_the_same(make, tokenizer):
    """In a tar, with a tokenizer, streaming; stopped in the middle of an epoch, then with another number of workers."""
    for settings in ({"order": "stream"}, {"tokenizer": tokenizer}):
        whole = take(make(**settings), 9)
        first = make(workers=2, **settings)
        assert all(same(one, other) for one, other in zip(whole, take(first, 4), strict=False))
        later = make(workers=3, **settings)
        state = {**first.state_dict(), "consumed_batches": 4}
        later.load_state_dict(state)
        assert all(same(one, other) for one, other in zip(whole[4:], take(later, 5), strict=True))


def test_a_checkpoint_of_another_vocabulary(make, tokenizer, caplog):
    state = make(tokenizer=tokenizer).state_dict()
    with pytest.raises(ConfigError, match=r"trained with another vocabulary .* than data\.tokenizer=bytes"):
        make().load_state_dict(state)
    data = make(tokenizer=tokenizer)
    data.load_state_dict({**state, "text": "another"})
    assert "the text is not the one" in caplog.text


def test_streams_go_on_where_they_were(make):
    data = make(order="stream", batch_size=2, length=32)
    before: list[tuple[str, int] | None] = [None, None]
    follows = 0
    for batch in take(data, 60):
        for row in range(2):
            found = segments(batch, row) if "more" not in batch.source[row] and batch.source[row] else []
            if batch.continues[row]:
                assert before[row] == (found[0][0], found[0][1])
                follows += 1
            before[row] = (found[-1][0], found[-1][2]) if found else None
    assert follows > 60


def test_carried_through_a_book_the_model_reads_it_as_one_row(make):
    """Truncated backpropagation: rows in turn with the state carried are the book in one row, document by document."""
    from functools import partial

    from seqlong.backbone import Backbone, BackboneConfig
    from seqlong.mixers import Mamba2

    data = make({"a": prose(300, 5), "b": prose(200, 6)}, order="stream", batch_size=1, length=50,
                split=PositionSplit(0.0, 0.01))  # fmt: skip
    config = BackboneConfig(
        d_model=16, pattern="m", vocab_size=260, mixers={"m": partial(Mamba2, d_state=4, head_dim=8)}
    )
    torch.manual_seed(0)
    model = Backbone(config).eval()
    share = data.layouts[0][0].count
    batches = take(data, share)
    state = model.initial_state(1, "cpu", torch.float32)
    with torch.no_grad():
        streamed = []
        for batch in batches:
            output = model(batch, state)
            streamed.append(output.hidden[0])
            state = output.state
        read: dict[str, dict[int, torch.Tensor]] = {}
        for batch, hidden in zip(batches, streamed, strict=True):
            place = 0
            for document, start, stop, *_ in segments(batch, 0):
                at = read.setdefault(document, {})
                at.update({start + step: hidden[place + step] for step in range(stop - start)})
                place += stop - start
        first = batches[0].source[0].split("; ")[0].rpartition(":")[0]
        for document, found in read.items():
            if document == first:
                continue  # the epoch begins in its middle
            whole = torch.tensor([[BOS, *(byte + 4 for byte in data.texts[document])]])[:, : len(found)]
            alone = model(SequenceBatch(tokens=whole)).hidden[0]
            torch.testing.assert_close(
                torch.stack([found[step] for step in range(len(found))]), alone, atol=1e-5, rtol=1e-4
            )


def test_stages_and_mixtures(make, tmp_path):
    texts = {"a": prose(3000, 0), "b": prose(3000, 1)}
    sources = {
        name: Source(str(tmp_path / "books" / f"{name}.txt"), weight)
        for name, weight in (("a", [0.9, 0.1]), ("b", [0.1, 0.9]))
    }
    data = make(texts, sources=sources, stages=[Stage(16, 8, 25), Stage(32, 8)])
    shares = []
    taken = take(data, 50)
    for batches in (taken[:25], taken[25:]):
        names = [source.split(".")[0] for batch in batches for source in batch.source]
        shares.append(names.count("a") / len(names))
    assert abs(shares[0] - 0.9) < 0.07 and abs(shares[1] - 0.1) < 0.07
    assert data.describe()["stages"][0]["share of a"] == "90 %"
    streams = make(
        texts, sources={"a": Source(sources["a"].path, 3.0), "b": Source(sources["b"].path, 1.0)}, order="stream"
    )
    for batch in take(streams, 5):
        assert [source[0] for source in batch.source] == ["a", "a", "a", "b"]
    with pytest.raises(ConfigError, match=r"sources\.b has no weight, but others have"):
        make(texts, sources={"a": Source("x", 1.0), "b": Source("y")})
    with pytest.raises(ConfigError, match=r"sources\.a\.weight has 3 values for 1 stages"):
        make(texts, sources={"a": Source("x", [1.0, 2.0, 3.0])})
    with pytest.raises(ConfigError, match=r"needs data\.path.*or data\.sources"):
        make(texts, sources=sources, path="x")
    with pytest.raises(ConfigError, match=r"order=stream walks through documents"):
        make(order="stream", documents="fit")


# Splits and floors


def names(data: TextData) -> dict[str, list[str]]:
    corpus, split = data.parts["text"]
    return {name: split.names(corpus, name, 99) for name in split.spans}


def test_books_are_held_out_whole_and_never_twice(make, tmp_path):
    texts = {f"book{number:02}": prose(200 + 10 * number, number % 15) for number in range(20)}
    data = make(texts, split=None)
    found = names(data)
    assert sorted(chain.from_iterable(found.values())) == [f"{name}.txt" for name in texts]
    size = {name: data.split_size(name)["bytes"] for name in found}
    assert 0.02 < size["validation"] / sum(size.values()) < 0.12 and 0.02 < size["test"] / sum(size.values()) < 0.12
    # books 15 to 19 have the first words of books 0 to 4, but are longer; the same text falls together
    copies = make({**texts, **{f"copy{name}": text for name, text in texts.items()}}, split=DocumentSplit(0.2, 0.2))
    for part in names(copies).values():
        assert {name.removeprefix("copy") for name in part} == {name for name in part if not name.startswith("copy")}
    assert copies.parts["text"][1].how["duplicates"] == 20


def test_large_documents_are_not_held_out_for_small_fractions(make):
    texts = {"huge": prose(50_000, 0), **{f"s{number}": prose(2000, number) for number in range(1, 6)}}
    for seed in range(6):
        found = names(make(texts, split=AutoSplit(0.05, 0.05, seed)))
        assert "huge.txt" in found["train"] and found["validation"] and found["test"]


def test_a_single_book_is_split_by_position(make):
    data = make({"a": prose(1000, 0)}, split=None)
    spans = data.parts["text"][1].spans
    edges = [(spans[name].start[0], spans[name].stop[0]) for name in ("train", "validation", "test")]
    assert [edge[0] for edge in edges] == [0, *(edge[1] for edge in edges[:-1])] and edges[-1][1] == 1003
    assert abs(edges[0][1] / 1003 - 0.9) < 0.01


def test_files_that_lie_beside_may_be_held_out(make, tmp_path):
    beside = tmp_path / "valid.txt"
    beside.write_text("held out")
    data = make(split=FileSplit([str(beside)], ["c.txt"]))
    assert names(data)["validation"] == ["valid.txt"] and names(data)["test"] == ["c.txt"]
    with pytest.raises(DataError, match=r"split\.validation: no file is called 'z\.txt'; there are a\.txt"):
        _ = make(split=FileSplit(["z.txt"])).parts
    with pytest.raises(DataError, match=r"named in validation and again in test"):
        _ = make(split=FileSplit(["c.txt"], ["[cd].txt"])).parts
    with pytest.raises(DataError, match=r"must be fractions"):
        DocumentSplit(0.6, 0.5)


def test_floors_are_those_of_the_tools(make, tokenizer):
    held = prose(5000, 7)
    data = make({"a": prose(40_000, 0), "b": held}, split=FileSplit(["b.txt"]))
    floors = {floor["name"]: floor["bits"] for floor in data.floors()}
    assert floors["bz2"] == pytest.approx(8 * len(bz2.compress(held.encode())) / len(held))
    counts = np.zeros((256, 256))
    codes = np.frombuffer(prose(40_000, 0).encode(), np.uint8)
    np.add.at(counts, (codes[:-1], codes[1:]), 1)
    known = np.frombuffer(held.encode(), np.uint8)
    counts += 0.01
    rough = -np.mean(np.log2(counts[known[:-1], known[1:]] / counts[known[:-1]].sum(axis=1)))
    assert floors["order-1"] == pytest.approx(rough, abs=0.02)
    tokens = make({"a": prose(40_000, 0), "b": held}, split=FileSplit(["b.txt"]), tokenizer=tokenizer)
    size = tokens.split_size("validation")
    for floor in tokens.floors():
        assert floor["bits_per_byte"] == pytest.approx(floors[floor["name"]])
        assert floor["bits"] == pytest.approx(floors[floor["name"]] * size["bytes"] / size["tokens"])


# With a tokenizer


def test_tokens_fill_rows_and_metrics_are_per_byte(make, tokenizer):
    data = make(tokenizer=tokenizer, split=FileSplit(["b.txt"]), length=32)
    lengths = data.vocabulary.byte_lengths()
    total = 0
    for batch in data.val_dataloader():
        total += int(lengths[batch.targets[batch.loss_weight > 0].numpy()].sum())
    assert total == len(data.texts["b.txt"]) == data.split_size("validation")["bytes"]
    said = data.describe()
    assert said["unit"] == "token" and said["vocabulary"]["size"] == 290
    json.dumps(said)


# In tars


def test_tars_are_read_the_same_whoever_reads_them(make, tmp_path, monkeypatch):
    """Every document once an epoch, with 0, 2 and 3 workers, 1 and 2 ranks, and both changed between stop and start."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, count in enumerate((5, 3, 7)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(count):
                (tmp_path / "one").write_text(f"{shard}.{number} " + prose(30, number))
                tar.add(tmp_path / "one", f"doc.v{number}.txt")
    settings = {
        "path": str(folder),
        "documents": "single",
        "length": 48,
        "batch_size": 6,
        "split": DocumentSplit(0.1, 0.0),
    }
    whole = take(make(**settings), 12)
    size = make(**settings).layouts[0][0].count
    seen = [source for batch in whole for source in batch.source]
    for epoch in range(len(seen) // size):
        assert len(set(seen[epoch * size : (epoch + 1) * size])) == size
    place = lambda rank, world: monkeypatch.setattr(TextData, "_place", lambda self: (rank, world))  # noqa: E731
    for world, workers, then_world, then_workers in ((1, 2, 2, 3), (2, 3, 1, 0), (2, 0, 2, 2)):
        for rank in range(world):
            place(rank, world)
            head = take(make(workers=workers, **settings), 5)
            assert all(
                torch.equal(one.tokens, other.tokens[rank::world]) for one, other in zip(head, whole, strict=False)
            )
        for rank in range(then_world):
            place(rank, then_world)
            data = make(workers=then_workers, **settings)
            data.load_state_dict({"consumed_batches": 5})
            assert all(
                torch.equal(one.tokens, other.tokens[rank::then_world])
                for one, other in zip(take(data, 7), whole[5:], strict=True)
            )
    (folder / "1.tar").write_bytes((folder / "1.tar").read_bytes()[:-9000])
    with pytest.raises(
        DataError, match=r"1\.tar: the tar is truncated or damaged: .* stop (after sample|in its first)"
    ):
        _ = make(**settings).parts


def test_perplexity_and_bits_are_by_hand(make, tokenizer, tmp_path):
    """TextMetrics against the definition, on a model that knows nothing: each token costs log2(size) bits."""
    from lightning.pytorch import Trainer

    from seqlong.backbone import BackboneConfig
    from seqlong.datamodules.text import TextMetrics
    from seqlong.mixers import Attention
    from seqlong.tasks import CausalLM

    data = make(tokenizer=tokenizer, split=FileSplit(["b.txt"]), length=32)
    config = BackboneConfig(
        d_model=8, pattern="a", vocab_size=290, mixers={"a": lambda width: Attention(width, heads=1)}
    )
    model = CausalLM(config)
    torch.nn.init.zeros_(model.backbone.embedding.weight)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                      use_distributed_sampler=False, callbacks=[TextMetrics()], default_root_dir=str(tmp_path),
                      enable_model_summary=False)  # fmt: skip
    trainer.validate(model, data, verbose=False)
    size = data.split_size("validation")
    bits = math.log2(290) * size["tokens"] / size["bytes"]
    found = trainer.callback_metrics
    assert float(found["val/bits"]) == pytest.approx(math.log2(290), abs=1e-4)
    assert float(found["val/bits_per_byte"]) == pytest.approx(bits, abs=1e-4)
    assert size["words"] == len(data.texts["b.txt"].split())
    assert math.log2(float(found["val/word_perplexity"])) == pytest.approx(
        bits * size["bytes"] / size["words"], rel=1e-3
    )
