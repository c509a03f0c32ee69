"""Classification and regression of sequences: pooling, strands, fine-tuning, scores, and that they learn."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.cli import main
from seqlong.datamodules.dna.labelled import LabelledData
from seqlong.errors import CheckpointError, ConfigError
from seqlong.labels import LabelledBatch
from seqlong.mixers import Attention, Bidirectional, Mamba2
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks import SequenceClassification, SequenceRegression
from seqlong.tasks.finetune import add_low_rank, freeze_blocks, load_backbone, scale_by_depth
from seqlong.tasks.label_scores import LabelScores, scores
from seqlong.tasks.pooling import Pool, Spans, other_strand, repeated

MAMBA = partial(Mamba2, d_state=8, head_dim=8)


def architecture(both: bool = True, layers: int = 2) -> BackboneConfig:
    mixer = partial(Bidirectional, mixer=MAMBA) if both else MAMBA
    attention = partial(Attention, heads=2, causal=not both)
    return BackboneConfig(d_model=16, pattern="ma", layers=layers, mixers={"m": mixer, "a": attention})


def batch_of(sequences: list[list[int]], rows: list[list[int]], width: int) -> LabelledBatch:
    """Records ``rows[r]`` side by side in row r."""
    tokens, ids = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int32)
    starts, ends, order = [], [], []
    for row, numbers in enumerate(rows):
        at = 0
        for place, number in enumerate(numbers, 1):
            size = len(sequences[number])
            tokens[row, at : at + size] = torch.tensor(sequences[number])
            ids[row, at : at + size] = place
            starts.append(row * width + at)
            ends.append(row * width + at + size - 1)
            order.append(number)
            at += size
    labels = torch.tensor([[number % 2] for number in order])
    return LabelledBatch(
        tokens=tokens,
        segment_ids=ids,
        index=torch.arange(len(rows)),
        starts=torch.tensor(starts),
        ends=torch.tensor(ends),
        labels=labels,
        records=torch.tensor(order),
    )


SEQUENCES = [torch.randint(4, 8, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 1, 12, 7)]
ROWS = [[0, 1], [2, 3], [], [4]]


def turned(sequence: list[int]) -> list[int]:
    return [11 - token for token in reversed(sequence)]


@pytest.mark.parametrize("how", ["mean", "last", "max", "attentive", "places", "echo"])
@pytest.mark.parametrize("rc", ["none", "average", "equivariant"])
def test_packed_records_are_read_as_if_alone(how: str, rc: str) -> None:
    task = SequenceClassification(architecture(), 3, pool=how, rc=rc).eval()  # type: ignore[arg-type]
    if task.pool.query is not None:
        torch.nn.init.normal_(task.pool.query)
    if task.pool.places is not None:
        torch.nn.init.normal_(task.pool.places)
    together = task(batch_of(SEQUENCES, ROWS, 14))
    for number, sequence in enumerate(SEQUENCES):
        alone = task(batch_of([sequence], [[0]], len(sequence)))
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["mean", "last", "attentive", "places", "echo"])
@pytest.mark.parametrize(("rc", "same"), [("none", False), ("average", True), ("equivariant", True)])
def test_strands_give_the_same_answer_where_promised(how: str, rc: str, same: bool) -> None:
    task = SequenceClassification(architecture(both=False), 3, pool=how, rc=rc).eval()  # type: ignore[arg-type]
    given = task(batch_of(SEQUENCES, ROWS, 14))
    back = task(batch_of([turned(s) for s in SEQUENCES], ROWS, 14))
    assert torch.allclose(given, back, atol=1e-5) == same


def test_the_other_strand_stays_in_its_place() -> None:
    batch = batch_of(SEQUENCES, ROWS, 14)
    spans = Spans(batch.starts, batch.ends, *batch.shape)
    complement = torch.tensor([0, 1, 2, 3, 7, 6, 5, 4])
    which = torch.tensor([True, False, True, True, False])
    expected = batch_of([turned(s) if which[n] else s for n, s in enumerate(SEQUENCES)], ROWS, 14).tokens
    assert torch.equal(other_strand(batch.tokens, spans, complement, which), expected)
    twice = batch_of([s + s for s in SEQUENCES], ROWS, 28)
    doubled, wide = repeated(batch, spans)
    assert torch.equal(doubled.tokens, twice.tokens)
    assert torch.equal(doubled.segment_ids, twice.segment_ids)
    assert torch.equal(wide.ends, twice.ends)


def test_pooling_is_what_the_formulas_say() -> None:
    batch = batch_of(SEQUENCES, ROWS, 14)
    spans, hidden = Spans(batch.starts, batch.ends, *batch.shape), torch.randn(4, 14, 6)
    pool = Pool(6, "attentive")
    torch.nn.init.normal_(pool.query)  # type: ignore[arg-type]
    found = {how: Pool(6, how)(hidden, spans) for how in ("mean", "last", "max")} | {"attentive": pool(hidden, spans)}
    by_place = Pool(6, "places")
    torch.nn.init.normal_(by_place.places)  # type: ignore[arg-type]
    found["places"] = by_place(hidden, spans)
    flat = hidden.flatten(0, 1)
    for number, (start, end) in enumerate(zip(batch.starts, batch.ends, strict=True)):
        states = flat[start : end + 1]
        weight = (states @ pool.query / math.sqrt(6)).softmax(0)
        each = by_place.places[: len(states)] * states  # type: ignore[index]
        expected = {"mean": states.mean(0), "last": states[-1], "max": states.amax(0)}
        expected |= {"attentive": weight @ states, "places": each.sum(0) / len(states) ** 0.5}
        for how, value in expected.items():
            torch.testing.assert_close(found[how][number], value, atol=1e-5, rtol=1e-5)


def test_places_are_told_apart_from_the_first_step() -> None:
    """Else a thousand steps go by before sequences that are aligned teach anything."""
    spans = Spans(torch.tensor([0]), torch.tensor([59]), 1, 60)
    hidden = torch.randn(1, 60, 32)
    pool = Pool(32, "places")
    given, turned = pool(hidden, spans), pool(hidden.flip(1), spans)
    assert (given - turned).norm() > 0.5 * given.norm()
    assert 0.5 < (given.std() / hidden.std()).item() < 2, "as large as the states"


def test_training_turns_half_of_the_records_and_evaluation_none() -> None:
    task = SequenceClassification(architecture(), 2, rc="augment")
    many = batch_of([[4, 4, 5]] * 400, [[n] for n in range(400)], 3)
    changed = (task.train().prepare(many).tokens != many.tokens).any(1).float().mean()
    assert 0.4 < float(changed) < 0.6
    assert torch.equal(task.eval().prepare(many).tokens, many.tokens)


def test_unknown_labels_count_nothing() -> None:
    task = SequenceClassification(architecture(), 2, rc="none").eval()
    batch = batch_of(SEQUENCES, ROWS, 14)
    loss, figures = task.objective(batch)
    outputs = task(batch)
    expected = torch.nn.functional.cross_entropy(outputs, batch.labels[:, 0])
    torch.testing.assert_close(loss, expected)
    batch.labels[2:] = -1
    loss, figures = task.objective(batch)
    assert int(figures["count"]) == 2
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(outputs[:2], batch.labels[:2, 0]))
    several = SequenceClassification(architecture(), 2, several=True).eval()
    batch.labels = torch.tensor([[1.0, 0.0], [float("nan"), 1.0]] + [[float("nan")] * 2] * 3)
    assert int(several.objective(batch)[1]["count"]) == 3


def test_scores_are_those_by_hand() -> None:
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.0, 3.0]])
    labels = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    found = scores("class", outputs, labels)
    assert float(found["accuracy"]) == 0.75
    assert float(found["mcc"]) == pytest.approx((1 * 2 - 0 * 1) / math.sqrt(2 * 1 * 3 * 2))
    assert float(found["auroc"]) == 1.0
    metric = LabelScores("class", 2)
    metric.update(outputs, labels, torch.tensor([False, False, True, False]))
    assert float(metric.compute()["unseen/accuracy"]) == 1.0
    values = torch.randn(50, 2)
    exact = scores("value", values, values)
    assert [float(exact[name]) for name in ("r2", "mse")] == [1.0, 0.0]
    assert float(exact["spearman"]) == pytest.approx(1)


def test_freezing_low_rank_changes_and_rates() -> None:
    backbone = Backbone(architecture(layers=4))
    freeze_blocks(backbone, 2)
    assert [all(p.requires_grad for p in block.parameters()) for block in backbone.blocks] == [False, False, True, True]
    with pytest.raises(ConfigError, match="has 4 blocks"):
        freeze_blocks(backbone, 5)
    plain = Backbone(architecture())
    batch = batch_of(SEQUENCES, ROWS, 14)
    before = plain(batch).hidden
    assert add_low_rank(plain, 2, 8.0) > 4
    torch.testing.assert_close(plain(batch).hidden, before)
    trained = [name for name, part in plain.named_parameters() if part.requires_grad]
    assert trained
    assert all(".parametrizations.weight.0." in name for name in trained)
    whole = SequenceClassification(architecture(), 2)
    optimizer = Optimizer(lr=1.0).build(whole)
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    scale_by_depth(optimizer, whole.backbone, 0.5, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == count
    at = [
        whole.backbone.embedding.weight,
        *(next(b.parameters()) for b in whole.backbone.blocks),
        whole.head.linear.weight,
    ]
    assert [rates[id(p)] for p in at] == pytest.approx([0.025, 0.05, 0.1, 1.0])


def test_weights_come_from_a_checkpoint_of_another_task(tmp_path: Path) -> None:
    first, second = SequenceClassification(architecture(), 2), SequenceClassification(architecture(), 5, lora_rank=2)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": first.state_dict(), "global_step": 3}, tmp_path / "checkpoints" / "last.ckpt")
    load_backbone(second.backbone, str(tmp_path))
    batch = batch_of(SEQUENCES, ROWS, 14)
    torch.testing.assert_close(second.backbone(batch).hidden, first.backbone(batch).hidden)
    with pytest.raises(CheckpointError, match=r"another architecture than model\.backbone: .*experiment=dna/finetune"):
        load_backbone(Backbone(architecture(layers=1)), str(tmp_path))
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        load_backbone(first.backbone, str(tmp_path / "nowhere"))


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.lora_rank and task\.freeze"):
        SequenceClassification(architecture(), 2, lora_rank=2, freeze=1)
    with pytest.raises(ConfigError, match=r"task\.classes must be 2 or more"):
        SequenceClassification(architecture(), 1)
    task = SequenceClassification(architecture(), 3)
    task.trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"the data has 2 classes \(0, 1\).* set task\.classes=2"):
        task.check_data(labelled(tmp_path))
    with pytest.raises(ConfigError, match=r"kind 'class', but data\.labels=value; set data\.labels=class"):
        task.check_data(labelled(tmp_path, labels="value"))


def labelled(tmp_path: Path, labels: str = "class") -> LabelledData:
    """Whether TATA stands somewhere; or, as a value, the share of G and C."""
    random, path = np.random.default_rng(0), tmp_path / f"{labels}.csv"
    lines = ["sequence,label"]
    for number in range(300):
        text = "".join(random.choice(list("ACGT"), 24, p=[0.4, 0.1, 0.1, 0.4] if number % 3 else [0.1, 0.4, 0.4, 0.1]))
        text = text.replace("TATA", "TACA")
        if number % 2:
            text = text[:10] + "TATATA" + text[16:]
        lines.append(f"{text},{number % 2 if labels == 'class' else sum(c in 'GC' for c in text) / 24}")
    path.write_text("\n".join(lines) + "\n")
    return LabelledData(str(path), labels=labels, folds=5, batch_size=16, floors=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["class", "value"])
def test_small_models_learn_and_report(kind: str, tmp_path: Path) -> None:
    source = labelled(tmp_path, kind)
    optimizer, schedule = Optimizer(lr=1e-2), Schedule(warmup_steps=5)
    if kind == "class":
        task = SequenceClassification(architecture(), 2, optimizer, schedule, rc="average", pool="attentive")
    else:
        task = SequenceRegression(architecture(), 1, optimizer, schedule, rc="equivariant")  # type: ignore[assignment]
    trainer = pl.Trainer(
        max_steps=60, logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        use_distributed_sampler=False, enable_model_summary=False, limit_val_batches=0, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, source)
    (found,) = trainer.test(task, source, verbose=False)
    if kind == "class":
        assert found["test/mcc"] > 0.9
        assert found["test/bits"] < 0.4
    else:
        assert found["test/r2"] > 0.85
        assert float(task.mean) == pytest.approx(source.label_names.mean[0], abs=1e-6)  # type: ignore[arg-type]
        said = trainer.predict(task, source)
        assert said is not None
        answers = torch.cat([part["answers"] for part in said])  # type: ignore[index,call-overload]
        truth = torch.cat([part["labels"] for part in said])  # type: ignore[index,call-overload]
        assert float((answers - truth).abs().mean()) < 0.06


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train.csv"
    texts = ["".join("ACGT"[n >> 2 * k & 3] for k in range(3)) for n in range(60)]
    path.write_text("sequence,label\n" + "".join(f"{text}ACG,{n % 3}\n" for n, text in enumerate(texts)))
    small = ["model.backbone.d_model=16", f"run.root={tmp_path}", "data.floors=false"]
    assert main(["fit", "experiment=dna/classify", f"data.train={path}", *small]) == 2
    assert "the data has 3 classes (0, 1, 2), but the model puts out 2; set task.classes=3" in capsys.readouterr().err
    assert main(["fit", "experiment=dna/gue", f"data.folder={tmp_path}", "data.task=tf/0", *small]) == 2
    assert "has no train.csv" in capsys.readouterr().err
    assert main(["fit", "experiment=dna/finetune", f"data.train={path}"]) == 2
    assert "task.init_from" in capsys.readouterr().err
