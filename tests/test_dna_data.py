"""GenomeData: batches hold the genome's true bases, each sample once, the same for any workers, ranks and restarts."""

from __future__ import annotations

import json
from itertools import islice
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pytest
import torch
import yaml
from Bio.Seq import Seq
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import seqlong.configs
from seqlong.batch import SequenceBatch
from seqlong.datamodules.dna.datamodule import GenomeData
from seqlong.datamodules.dna.splits import BlockSplit, ContigSplit
from seqlong.datamodules.sampler import Stage
from seqlong.errors import ConfigError, DataError

CODES = dict(zip("ACGTNacgtn", [4, 5, 6, 7, 8] * 2, strict=True))


def bases(size: int, seed: int = 0, letters: str = "ACGT") -> str:
    return "".join(np.random.default_rng(seed).choice(list(letters), size))


@pytest.fixture
def make(tmp_path):
    """Write a genome and make its data module; `texts` are its contigs."""

    def build(texts: dict[str, str] | None = None, **settings) -> GenomeData:
        texts = texts or {"a": bases(5000, 0, "ACGTNacgt"), "b": bases(3000, 1), "c": bases(900, 2)}
        path = tmp_path / "genome.fa"
        path.write_text("".join(f">{name}\n{text}\n" for name, text in texts.items()))
        settings = {"length": 64, "batch_size": 4, "split": BlockSplit(block_bases=500, gap_bases=10), **settings}
        data = GenomeData(str(path), cache_dir=str(tmp_path / "cache"), **settings)
        data.texts = texts  # type: ignore[attr-defined]
        return data

    return build


def take(data: GenomeData, count: int) -> list[SequenceBatch]:
    return list(islice(data.train_dataloader(), count))


def span(data: GenomeData, source: str) -> tuple[str, int, int, str]:
    name, interval, strand = source.split(":")
    start, stop = map(int, interval.split("-"))
    return name, start, stop, strand


def expected(data: GenomeData, source: str, extra: int = 0) -> str:
    """The bases that a source names, and `extra` more in reading direction (as they are, whatever the split)."""
    name, start, stop, strand = span(data, source)
    text = data.texts[name] * 3  # type: ignore[attr-defined]
    size = len(data.texts[name])  # type: ignore[attr-defined]
    if strand == "+":
        return text[start : stop + extra]
    return str(Seq(text[size + start - extra : size + stop]).reverse_complement())


def same(first: SequenceBatch, second: SequenceBatch) -> bool:
    for name in ("tokens", "targets", "loss_weight", "segment_ids", "continues", "index"):
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return first.source == second.source


# What a row holds


def test_tokens_targets_and_weights_of_causal_rows(make):
    data = make()
    strands, ends = set(), 0
    for batch in take(data, 30):
        assert batch.shape == (4, 64)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.loss_weight.dtype == torch.float32
        assert batch.segment_ids is None and batch.continues is None
        for row, source in enumerate(batch.source):
            text = expected(data, source, 1)
            strands.add(source[-1])
            assert batch.tokens[row].tolist() == [CODES[base] for base in text[:64]]
            following = list(text[1:].ljust(64, "-"))
            if batch.targets[row, -1] == -1 and following[-1] in CODES:  # the region ends here
                ends += 1
                following[-1] = "-"
            assert batch.targets[row].tolist() == [CODES[base] if base not in "Nn-" else -1 for base in following]
            weights = [0.0 if base in "Nn-" else 0.1 if base.islower() else 1.0 for base in following]
            assert batch.loss_weight[row].tolist() == pytest.approx(weights)
    assert strands == {"+", "-"}
    assert ends < 15  # the base after the window is taken where the region goes on


def test_targets_of_masked_rows_are_the_tokens(make):
    data = make(targets="same", soft_mask_weight=0.5)
    for batch in take(data, 10):
        for row, source in enumerate(batch.source):
            text = expected(data, source)
            assert batch.tokens[row].tolist() == [CODES[base] for base in text]
            assert batch.targets[row].tolist() == [CODES[base] if base not in "Nn" else -1 for base in text]
            weights = [0.0 if base in "Nn" else 0.5 if base.islower() else 1.0 for base in text]
            assert batch.loss_weight[row].tolist() == weights


@pytest.mark.parametrize(("probability", "strands"), [(0.0, {"+"}), (1.0, {"-"})])
def test_reverse_complement_is_a_choice(make, probability, strands):
    found = {source[-1] for batch in take(make(reverse_complement=probability), 5) for source in batch.source}
    assert found == strands


def test_windows_wrap_round_a_ring(make):
    texts = {"ring": bases(1000), "v": bases(300, 1)}
    data = make(texts, circular=["ring"], split=ContigSplit(["v"]), length=96, batch_size=10)
    crossed = 0
    for batch in take(data, 20):
        for row, source in enumerate(batch.source):
            _, start, stop, _ = span(data, source)
            crossed += stop > 1000 or start < 0
            assert batch.tokens[row].tolist() == [CODES[base] for base in expected(data, source)]
            assert (batch.targets[row] >= 0).all()
    assert crossed > 5


# Which rows there are


def positions(data: GenomeData, batches: list[SequenceBatch]) -> np.ndarray:
    seen = np.zeros(len(data.texts["a"]), int)  # type: ignore[attr-defined]
    for batch in batches:
        for source in batch.source:
            name, start, stop, _ = span(data, source)
            if name == "a":
                seen[start:stop] += 1
    return seen


def test_an_epoch_tiles_the_regions_and_epochs_differ(make):
    size = make().training_windows[0].size
    data = make(batch_size=size)
    epochs = take(data, 60)
    assert all(positions(data, [epoch]).max() == 1 for epoch in epochs[:5])
    assert {source[:-2] for source in epochs[0].source} != {source[:-2] for source in epochs[1].source}
    many = positions(data, epochs)
    inside = np.zeros_like(many, bool)
    for contig, start, stop in data.split.regions["train"]:
        if contig == 0:
            inside[start:stop] = True
    assert (many[inside] > 0).mean() > 0.99 and (many[~inside] == 0).all()


@pytest.mark.parametrize("order", ["shuffle", "stream"])
@pytest.mark.parametrize("targets", ["next", "same"])
def test_workers_change_nothing(make, order, targets):
    alone = take(make(order=order, targets=targets), 12)
    shared = take(make(order=order, targets=targets, workers=2), 12)
    assert all(same(one, other) for one, other in zip(alone, shared, strict=True))


@pytest.mark.parametrize("order", ["shuffle", "stream"])
def test_ranks_share_the_same_batches(make, order, monkeypatch):
    whole = take(make(order=order), 8)
    for world in (2, 4):
        for rank in range(world):
            monkeypatch.setattr(GenomeData, "_place", lambda self, rank=rank, world=world: (rank, world))
            for batch, share in zip(whole, take(make(order=order), 8), strict=True):
                assert torch.equal(share.tokens, batch.tokens[rank::world])
                assert torch.equal(share.index, batch.index[rank::world])
                assert share.source == batch.source[rank::world]


def test_the_seed_and_nothing_else_changes_the_order(make):
    first = [batch.source for batch in take(make(), 5)]
    assert first == [batch.source for batch in take(make(), 5)]
    assert first != [batch.source for batch in take(make(seed=1), 5)]
    contigs = [[source[0] for batch in take(make(seed=seed), 20) for source in batch.source] for seed in (0, 1)]
    assert contigs[0] != contigs[1]  # not the shifts and strands alone


def test_stages_warm_the_length_up(make):
    data = make(stages=[Stage(32, 8, 2), Stage(64, 4, 1), Stage(128, 2)])
    batches = take(data, 6)
    assert [batch.shape for batch in batches] == [(8, 32)] * 2 + [(4, 64)] + [(2, 128)] * 3
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(16 + 4 + 6))
    assert (data.length, data.batch_size, data.eval_length) == (128, 2, 128)


def test_streams_walk_along_the_genome(make):
    data = make(order="stream", batch_size=3, length=50)
    before, carried, strands = None, 0, set()
    for batch in take(data, 200):
        assert batch.continues.dtype == torch.bool
        for row, source in enumerate(batch.source):
            name, start, stop, strand = span(data, source)
            if batch.continues[row]:
                carried += 1
                strands.add(strand)
                last = span(data, before.source[row])
                assert last[0] == name and last[3] == strand
                assert (last[2] == start) if strand == "+" else (last[1] == stop)
                assert before.targets[row, -1] in (-1, batch.tokens[row, 0])
        before = batch
    assert carried > 300 and strands == {"+", "-"}
    assert not take(data, 1)[0].continues.any()


def test_streams_need_a_window_for_each_row(make):
    with pytest.raises(DataError, match=r"order stream needs a window of 64 bases for each of 5000 rows"):
        take(make(order="stream", batch_size=5000), 1)


# Short records

SHORT = {"long": bases(1000), "s1": bases(30, 1), "s2": bases(25, 2), "s3": bases(50, 3), "v": bases(400, 4)}


def short_data(make, policy: str, **settings) -> GenomeData:
    return make(SHORT, split=ContigSplit(["v"]), short_records=policy, batch_size=1, **settings)


def test_short_records_are_packed_with_segments(make):
    data = short_data(make, "pack")
    (windows,) = data.training_windows
    rows = [batch for batch in take(data, windows.size) if batch.segment_ids is not None]
    assert len(rows) == 2
    found = set()
    for batch in rows:
        ids = batch.segment_ids[0]
        assert ids.dtype == torch.int32
        for number, source in enumerate(batch.source[0].split("; "), start=1):
            found.add(source.split(":")[0])
            text = expected(data, source)
            here = ids == number
            assert batch.tokens[0][here].tolist() == [CODES[base] for base in text]
            assert batch.targets[0][here].tolist() == [CODES[base] for base in text[1:]] + [-1]
        assert (batch.tokens[0][ids == 0] == 0).all() and (batch.loss_weight[0][ids == 0] == 0).all()
    assert found == {"s1", "s2", "s3"}
    assert (
        "train: 3 regions (105 bases) shorter than 64 are packed several to a row: s1:0-30, s2:0-25, s3:0-50"
        in (data.describe()["notes"])
    )


def test_short_records_are_padded_or_skipped(make):
    padded = short_data(make, "pad").training_windows[0]
    assert padded.size == short_data(make, "skip").training_windows[0].size + 3
    data = short_data(make, "skip")
    assert all(batch.segment_ids is None for batch in take(data, 40))
    assert any("3 regions (105 bases) shorter than 64 are SKIPPED" in note for note in data.describe()["notes"])


def test_short_records_can_be_an_error(make):
    with pytest.raises(
        DataError, match=r"train: 3 of 4 regions do not hold a window of 64 bases \(short_records is error\); .*s1:0-30"
    ):
        take(short_data(make, "error"), 1)


def test_a_window_longer_than_every_record(make):
    with pytest.raises(DataError, match=r"train: no region holds a window of 5,000 bases .* long:0-1000 with 1,000"):
        take(short_data(make, "skip", length=5000), 1)
    (batch,) = take(short_data(make, "pack", length=5000), 1)
    assert batch.segment_ids.max() == 4 and batch.shape == (1, 5000)


# Evaluation


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("targets", ["next", "same"])
def test_every_base_is_evaluated_once(make, monkeypatch, world, targets):
    data = make(targets=targets)
    counted = np.zeros(3, int)
    batches = 0
    for rank in range(world):
        monkeypatch.setattr(GenomeData, "_place", lambda self, rank=rank: (rank, world))
        loaders = (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
        for number, loader in enumerate(loaders):
            assert len(list(loader)) == len(loader)
            for batch in loader:
                batches += 1
                counted[number] += int((batch.loss_weight > 0).sum())
                assert ((batch.loss_weight == 0) | (batch.loss_weight == 1)).all()
                assert (batch.targets[batch.index < 0] == -1).all()
                assert all(source.endswith("+") for source in batch.source)
    regions = [data.split.regions["validation"], data.split.regions["test"], [(0, 0, 5000), (1, 0, 3000), (2, 0, 900)]]
    for number, spans in enumerate(regions):
        texts = [list(data.texts.values())[contig][start:stop] for contig, start, stop in spans]
        if targets == "next":
            texts = [text[1:] for text in texts]
        assert counted[number] == sum(base in "ACGTacgt" for text in texts for base in text)


def test_a_ring_is_evaluated_to_the_last_base(make):
    data = make({"ring": bases(1000), "t": bases(500, 1)}, circular=["ring"], split=ContigSplit(["ring"]))
    assert sum(int((batch.loss_weight > 0).sum()) for batch in data.val_dataloader()) == 1000


def test_evaluation_shapes_and_order(make):
    data = make(eval_length=100, eval_batch_size=3)
    sources = [source for batch in data.val_dataloader() for source in batch.source]
    assert sources == [source for batch in data.val_dataloader() for source in batch.source]
    assert all(batch.tokens.shape[1] == 100 for batch in data.val_dataloader())
    whole = [source for source in sources if ";" not in source]
    assert whole != sorted(whole)
    predicted = [source for batch in data.predict_dataloader() for source in batch.source]
    assert predicted[:3] == ["a:0-100:+", "a:100-200:+", "a:200-300:+"]


def test_training_never_sees_held_out_bases(make):
    data = make(batch_size=100)
    seen = positions(data, take(data, 20))
    for name in ("validation", "test"):
        for contig, start, stop in data.split.regions[name]:
            if contig == 0:
                assert not seen[max(0, start - 10) : stop + 10].any()


# Describing


def test_description_and_floors(make):
    data = make(stages=[Stage(32, 4, 5), Stage(64, 2)])
    record = json.loads(json.dumps(data.describe()))
    assert record["title"] == "genome.fa: 8,900 bases in 3 contigs"
    (source,) = record["sources"]
    assert source["bases"] == 8900 and source["contigs"] == 3 and len(source["records"]) == 3
    assert [(stage["length"], stage["steps"]) for stage in record["stages"]] == [(32, 5), (64, None)]
    assert any("Soft-masked" in note and "0.1" in note for note in record["notes"])
    uniform, chain = json.loads(json.dumps(data.floors()))
    assert uniform == {"name": "uniform", "bits": 2.0}
    assert chain["name"] == f"markov-{chain['order']}" and 1.9 < chain["bits"] < 2.1
    assert data.vocabulary.size == 16 and data.vocabulary.replacements == (4, 5, 6, 7)


def test_the_split_is_printed_once(make, capsys):
    data = short_data(make, "skip")
    data.setup("fit")
    data.setup("validate")
    said = capsys.readouterr().out
    assert said.count("Split by contig") == 1 and "validation" in said and "3 regions" in said and "SKIPPED" in said


@pytest.mark.parametrize("name", ["ecoli", "genome"])
def test_configurations_build(name, tmp_path):
    folder = seqlong.configs.__path__[0]
    with open(f"{folder}/data/genome.yaml") as file:
        config = yaml.safe_load(file)
    with open(f"{folder}/data/{name}.yaml") as file:
        config |= {key: value for key, value in yaml.safe_load(file).items() if key != "defaults"}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(GenomeData, "data")
    settings = {key: value for key, value in config.items() if key != "class_path"}
    settings |= {"seed": 3, "cache_dir": str(tmp_path), "path": "ecoli"}
    settings["stages"] = [{"length": 1024, "batch_size": 2, "steps": 3}, {"length": 2048, "batch_size": 1}]
    built = parser.instantiate(
        parser.parse_object({"data": {"class_path": config["class_path"], "init_args": settings}})
    )
    data = built.data
    assert isinstance(data, GenomeData) and data.seed == 3 and data.length == 2048
    assert take(data, 1)[0].shape == (2, 1024)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reverse_complement": 1.5}, r"reverse_complement is 1\.5; expected a probability"),
        ({"soft_mask_weight": -1.0}, r"soft_mask_weight -1\.0 must be 0 or more"),
        ({"batch_size": 0}, r"length 64 and batch_size 0 must both be 1 or more"),
        ({"eval_length": 0}, r"eval_length 0 .* must be 1 or more"),
    ],
)
def test_bad_settings(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


# Resuming


class Recorder(LightningModule):
    """A model that only notes which samples it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.tokens: list[int] = []

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.index.tolist())
        self.tokens.append(int((batch.tokens * torch.arange(batch.tokens.shape[1])).sum()))
        return self.weight.sum()

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: GenomeData, steps: int, folder, ckpt_path=None, accumulate: int = 1) -> Recorder:
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        val_check_interval=4 * accumulate,
        limit_val_batches=1,
        accumulate_grad_batches=accumulate,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)],
    )
    model = Recorder()
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_sees_what_an_undisturbed_one_would(make, tmp_path, workers, accumulate):
    settings = {"workers": workers, "stages": [Stage(32, 4, 3), Stage(64, 2)]}
    whole = fit(make(**settings), 9, tmp_path / "whole", accumulate=accumulate)
    part = fit(make(**settings), 5, tmp_path / "part", accumulate=accumulate)
    state = torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)
    assert state["GenomeData"] == {"consumed_batches": 5 * accumulate}
    rest = fit(make(**settings), 9, tmp_path / "rest", tmp_path / "part" / "last.ckpt", accumulate)
    assert part.seen + rest.seen == whole.seen and part.tokens + rest.tokens == whole.tokens
    assert len(whole.seen) == 9 * accumulate
    assert [len(rows) for rows in whole.seen] == [4] * 3 * accumulate + [2] * 6 * accumulate


def test_state_without_a_trainer(make):
    data = make()
    assert data.state_dict() == {"consumed_batches": 0}
    data.load_state_dict({"consumed_batches": 7})
    assert data.state_dict() == {"consumed_batches": 7}
    assert same(take(data, 1)[0], take(make(), 8)[7])


def test_a_million_bases_in_a_row(tmp_path):
    data = GenomeData(length=1 << 20, batch_size=1, cache_dir=str(tmp_path))
    (batch,) = take(data, 1)
    assert batch.shape == (1, 1 << 20) and batch.segment_ids is None
    assert int((batch.targets >= 0).sum()) in ((1 << 20) - 1, 1 << 20)


def test_lightnings_own_sampler_is_refused(make):
    data = make()
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=connector, accumulate_grad_batches=1)
    with pytest.raises(ConfigError, match=r"trainer\.use_distributed_sampler is true; .*set it false"):
        data.val_dataloader()
    connector.use_distributed_sampler = False
    data.trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": 1}
    assert take(data, 1)[0].index.tolist() == [1, 3]
