"""Recall from the command line: whole answers are judged, written, drawn, asked of a trained model and compared."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from seqlong.backbone import BackboneConfig
from seqlong.callbacks import Recall
from seqlong.callbacks.recall import judge
from seqlong.callbacks.recall_tally import wilson
from seqlong.cli import main
from seqlong.compose import compose
from seqlong.config_files import options
from seqlong.datamodules.sampler import BatchSampler
from seqlong.datamodules.synthetic import KeyedCopy, SyntheticData
from seqlong.mixers import Attention, Mamba2
from seqlong.report.recall import recall_section
from seqlong.report.record import RunRecord
from seqlong.tasks import CausalLM

PNG = b"\x89PNG"


def test_wilsons_interval() -> None:
    for right, answers in ((0, 9), (3, 17), (50, 100), (12, 12)):
        low, high = wilson(right, answers)
        assert 0 <= low <= right / answers <= high <= 1
        for p in (low, high):  # where the share is 1.96 standard deviations of a binomial of p away
            assert (right / answers - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / answers, abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


def test_an_answer_is_right_if_all_of_it_is() -> None:
    random = np.random.default_rng(0)
    answer = np.full((5, 40), -1)
    told = np.full((5, 40), -1)
    right = random.random((5, 40)) < 0.7
    expected = []
    for row in range(5):
        for number, start in enumerate((20, 25, 33)):
            size = 1 + (row + number) % 3
            answer[row, start : start + size] = number
            known = number != 1
            said = int(random.integers(0, start))
            if known:
                told[row, start : start + size] = said + np.arange(size)
            depth = min(9, int(10 * said / start)) if known else -1
            distance = 2 ** int(np.log2(start - said)) if known else -1
            expected.append((depth, distance, int(right[row, start : start + size].all())))
    assert list(judge(answer, told, right)) == expected and len({one[2] for one in expected}) == 2


class _Oracle(CausalLM):
    """Knows the answers of some rows: those with an even first token."""

    def _evaluate(self, batch, part):  # type: ignore[no-untyped-def]
        found = super()._evaluate(batch, part)
        found["right"] = (batch.tokens[:, :1] % 2 == 0).expand_as(found["right"])
        return found


def test_what_is_written_is_what_was_answered(tmp_path: Path) -> None:
    mixers = {"a": lambda width: Attention(width, heads=2), "m": lambda width: Mamba2(width, d_state=8, head_dim=8)}
    task = _Oracle(BackboneConfig(16, 16, "am", mixers, layers=2, ffn=None))
    data = SyntheticData(KeyedCopy("suffix", 2, 3, 16), length=24, batch_size=8, eval_lengths=[24, 48], eval_rows=50)
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[Recall()], logger=False, accelerator="cpu",
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.test(task, datamodule=data, verbose=False)
    right = dict.fromkeys((24, 48), 0)
    for batch in data.test_dataloader():
        right[batch.shape[1]] += int((batch.tokens[:, 0] % 2 == 0).sum())
    with (tmp_path / "recall.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = json.loads((tmp_path / "recall.json").read_text())
    for length, line in zip((24, 48), found["accuracy"], strict=True):
        cells = [one for one in lines if int(one["length"]) == length]
        assert sum(int(one["answers"]) for one in cells) == line["answers"] == 50
        assert sum(int(one["right"]) for one in cells) == line["right"] == right[length]
        assert (line["low"], line["high"]) == pytest.approx(wilson(right[length], 50))
        # Keys and values of two heads of 8 in float32; Mamba2's state 32 x 8, and three inputs of its convolution.
        assert line["state_bytes"] == 2 * 16 * 4 * length + (32 * 8 + 3 * (32 + 2 * 8)) * 4
    assert float(trainer.callback_metrics["test/answers"]) == pytest.approx(sum(right.values()) / 100)
    assert found["chance"] == 15.0**-3 and found["part"] == "test"
    assert len({int(one["depth"]) for one in lines}) > 6 and (tmp_path / "recall.png").read_bytes()[:4] == PNG
    page = recall_section(RunRecord(tmp_path))
    assert page is not None and "data:image/png;base64," in page and f"{2 * right[24]:.1f} %" in page


TASKS = [name for name in options("experiment") if name.startswith("recall/")]


@pytest.mark.parametrize("name", TASKS)
def test_every_experiment_makes_rows_that_its_model_can_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "qa1.json").write_text(
        '[{"input": "Ann is in the hall.", "question": "Where is Ann?", "target": "hall"}]'
    )
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n[MAX 1 2 ]\t2\n")
    own = {"recall/babilong": tmp_path / "qa1.json", "recall/arena": tmp_path}  # those of files that users have
    more = [f"data.generator.init_args.path={own[name]}"] if name in own else []
    house = compose([f"experiment={name}", *more], hardware="cpu").house
    given = {key: value for key, value in house["data"].items() if key != "class_path"}
    node = given.pop("generator")
    import seqlong.datamodules.synthetic as synthetic

    generator = getattr(synthetic, node["class_path"].rpartition(".")[2])(**(node.get("init_args") or {}))
    for key, kind in (("mixture", synthetic.Cell), ("evaluation", synthetic.Cell)):
        given[key] = given[key] and [kind(**one) for one in given[key]]
    if given["stages"]:
        from seqlong.datamodules.sampler import Stage

        given["stages"] = [Stage(**one) for one in given["stages"]]
    data = SyntheticData(generator, **given)
    assert data.vocabulary.size <= house["model"]["backbone"]["vocab_size"]
    batch = data.training_batches()[BatchSampler(data.stages).request(0)]
    assert batch.tokens is not None and int(batch.tokens.max()) < data.vocabulary.size
    said = house["trainer"]["callbacks"]
    assert (
        said["recall"]["class_path"] == "seqlong.callbacks.Recall" and said["checkpoints"]["init_args"]["mode"] == "max"
    )


def test_train_sweep_ask_and_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    tiny = ["data.batch_size=32", "data.length=12", "data.eval_rows=32", "data.eval_lengths=[12,24]"]
    tiny += ["trainer.max_steps=60", "trainer.val_check_interval=60", "model.backbone.d_model=32"]
    tiny += ["task.optimizer.lr=1e-2"]
    for name, more in (
        ("good", []),
        ("bad", ["task.optimizer.lr=1e-6", "trainer.max_steps=4", "trainer.val_check_interval=4"]),
    ):
        assert main(["fit", "experiment=recall/induction", f"run.dir={name}", *tiny, *more]) == 0
    good = json.loads((tmp_path / "good" / "recall.json").read_text())
    assert good["accuracy"][0]["accuracy"] > 0.5 > 4 * good["chance"], "induction is learnt in seconds"
    assert "Recall" in (tmp_path / "good" / "report.html").read_text()
    capfd.readouterr()

    assert main(["recall", "good", "induction", "data.eval_rows=16", "data.eval_lengths=[12]"]) == 0
    said = capfd.readouterr().out
    (asked,) = (tmp_path / "runs").iterdir()
    found = json.loads((asked / "recall.json").read_text())
    assert found["part"] == "test" and found["accuracy"][0]["answers"] == 16 and (asked / "report.html").is_file()
    assert "induction" in said and "16" in said

    assert main(["recall", "good", "bad"]) == 0
    said = capfd.readouterr().out
    assert "0.01" in said and "1e-06" in said and "good" in said
    (line,) = json.loads((tmp_path / "good" / "recall-rates.json").read_text())
    assert line["best_lr"] == 0.01 and [point["lr"] for point in line["every_lr"]] == [1e-6, 0.01]
    assert (tmp_path / "good" / "recall-rates.png").read_bytes()[:4] == PNG

    (tmp_path / "sweep").mkdir()
    jobs = []
    for name, settings in (
        ("good", ["task.optimizer.lr=1e-2", "model.backbone.pattern=ma"]),
        ("bad", ["task.optimizer.lr=1e-6", "model.backbone.pattern=ma"]),
    ):
        os.rename(name, tmp_path / "sweep" / name)
        jobs.append({"folder": name, "settings": settings})
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert main(["recall", "sweep"]) == 0
    (line,) = json.loads((tmp_path / "sweep" / "recall-rates.json").read_text())
    assert line["settings"] == "model.backbone.pattern=ma" and line["accuracy"] > 0.5

    for words, error in (
        (["recall", "nowhere", "induction"], "'nowhere' is neither a file or folder, nor a recall task"),
        (["recall", "sweep", "inducton"], "did you mean 'induction'?"),
        (["recall", "sweep", "induction"], "has no checkpoints/last.ckpt"),
        (["recall", "passkey"], "found 0 checkpoints or runs, expected one"),
        (["recall", "runs"], "no recall.json. Expected runs of"),
    ):
        assert main(words) == 2
        assert error in capfd.readouterr().err
    assert main(["recall"]) == 0 and "passkey" in capfd.readouterr().out
