"""The command line from end to end, in this process, on a toy."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from seqlong.cli import VERBS, main  # noqa: E402

TOY = [f"experiment={HERE / 'toy.yaml'}", "data.path=x"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def the_run(pattern: str = "*") -> Path:
    (found,) = Path("runs").glob(pattern)
    return found


def metric(run: Path, name: str) -> list[tuple[int, float]]:
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["value"])) for row in csv.DictReader(file) if row["name"] == name]


def test_fit_writes_a_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TOY, "--trainer.max_steps=4"]) == 0
    run = the_run("toy-*")
    names = {path.name for path in run.iterdir()}
    assert names >= {"run.json", "config.yaml", "data.json", "model.json", "floors.json", "metrics.csv", "tensorboard"}
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"last.ckpt"}
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 4, "flags are in the saved configuration"
    assert str(Path.cwd()) not in (run / "config.yaml").read_text(), "which can be used anywhere"
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert lines and "bits" in lines[-1] and "floor 1.5800 (walk)" in lines[-1] and "tokens/s" in lines[-1]
    assert lines[-1].startswith("step 4/4")
    for chatter in ("litlogger", "GPU available", "weights_only", "LeafSpec", "num_workers", "max_steps="):
        assert chatter not in captured.out + captured.err
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["seqlong_config"] == config
    assert "SEQLONG_RUN_DIR" not in __import__("os").environ


def test_config_yaml_repeats_the_run() -> None:
    assert main(["fit", *TOY, "run.name=a", "trainer.max_steps=3"]) == 0
    first = the_run("a-*")
    assert main(["fit", "--config", str(first / "config.yaml"), "run.name=b"]) == 0
    assert metric(the_run("b-*"), "train/loss") == metric(first, "train/loss")


def test_ckpt_path_last_continues_in_the_same_folder_and_a_path_in_a_new_one() -> None:
    assert main(["fit", *TOY, "run.name=whole"]) == 0
    assert main(["fit", *TOY, "run.name=part", "trainer.max_steps=4"]) == 0
    assert main(["fit", *TOY, "run.name=part", "--ckpt_path", "last"]) == 0
    part = the_run("part-*")
    assert metric(part, "train/loss") == metric(the_run("whole-*"), "train/loss")
    assert metric(part, "val/bits") == metric(the_run("whole-*"), "val/bits")
    record = json.loads((part / "run.json").read_text())
    assert record["status"] == "finished" and len(record["history"]) == 1
    assert record["resumed_from"].endswith("part" + part.name.removeprefix("part") + "/checkpoints/last.ckpt")
    assert (part / "config-1.yaml").is_file(), "the configuration before is kept"

    last = str(part / "checkpoints" / "last.ckpt")
    assert main(["fit", "--ckpt_path", last, "trainer.max_steps=8", "run.name=fork"]) == 0
    assert [step for step, _ in metric(the_run("fork-*"), "train/loss")] == [7, 8]


def test_validate_test_and_predict_take_the_configuration_from_the_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", *TOY]) == 0
    bits = metric(the_run("toy-2*"), "val/bits")[-1][1]
    capsys.readouterr()
    assert main(["validate", "--ckpt_path", "last"]) == 0
    assert metric(the_run("toy-validate-*"), "val/bits")[-1][1] == pytest.approx(bits, abs=1e-5)
    assert "val/bits" in capsys.readouterr().out
    assert main(["test", "--ckpt_path", "best", "data.batches_of_validation=1"]) == 0
    config = yaml.safe_load((the_run("toy-test-*") / "config.yaml").read_text())
    assert config["data"]["init_args"]["batches_of_validation"] == 1
    assert main(["predict", "--ckpt_path", "last"]) == 0
    predictions = sorted((the_run("toy-predict-*") / "predictions").iterdir())
    assert len(predictions) == 2 and torch.load(predictions[0], weights_only=True).shape == (4, 15, 8)
    assert main(["validate"]) == 2
    assert "seqlong validate needs --ckpt_path" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TOY, "trainer.max_steps=1"]) == 0
    last = str(the_run() / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert main(["fit", *TOY, "model.backbone.pattern=mmm", "model.backbone.d_model=16", "--ckpt_path", last]) == 2
    text = capsys.readouterr().err
    assert "is of another architecture" in text and "2 not in the checkpoint:\n    blocks.2.inner.weight" in text
    assert "5 of another shape:\n    embedding.weight: (8, 8) in the checkpoint, (8, 16) in the model" in text
    assert main(["fit", *TOY, "model.backbone.pattern=m", "--ckpt_path", last]) == 2
    assert "2 not in the model:\n    blocks.1.inner.weight" in capsys.readouterr().err
    Path(last).write_bytes(Path(last).read_bytes()[:3000])
    assert main(["fit", *TOY, "--ckpt_path", last]) == 2
    assert "last.ckpt (3,000 bytes) cannot be read as a checkpoint" in capsys.readouterr().err


def test_a_crash_leaves_a_record_and_a_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="the toy crashed"):
        main(["fit", *TOY, "task.crash=2"])
    run = the_run()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert (run / "report.html").is_file()

    def broken(folder: Path) -> None:
        raise ValueError("no report today")

    monkeypatch.setattr("seqlong.report.write_report", broken)
    with pytest.raises(RuntimeError, match="the toy crashed"):
        main(["fit", *TOY, "task.crash=2"])
    assert "no report: ValueError: no report today" in capsys.readouterr().err


def test_a_task_that_cannot_be_built_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TOY, "model.backbone.pattern=mx"]) == 2
    assert capsys.readouterr().err.endswith("the pattern has no mixer 'x'\n")
    record = json.loads((the_run() / "run.json").read_text())
    assert record["status"] == "failed" and record["error"] == "ConfigError: the pattern has no mixer 'x'"


def test_print_config_makes_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TOY, "--trainer.max_steps=3", "--print_config"])
    assert stop.value.code == 0 and not Path("runs").exists()
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 3


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb}" in text and example in text for verb, (_, example) in VERBS.items())
    assert "cpu, gpu" in text
    assert main(["fit", *TOY, "--help"]) == 0
    text = capsys.readouterr().out
    assert "data.length = 16  (int)\n      positions a row." in text
    assert "model.backbone.mixers.m.init_args.d_state = 4  (int)\n      size of nothing in particular." in text
    assert "task.lr = 0.01  (float)\n      step size." in text and "trainer.max_steps = 6  (int)" in text
    assert main(["fit", "--help"]) == 0
    assert "Choose an experiment to see its settings" in capsys.readouterr().out


def test_unknown_verbs_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "seqlong has no verb 'fti'; did you mean 'fit'?" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("seqlong ")


def test_help_is_quick_and_imports_no_torch() -> None:
    begun = time.perf_counter()
    code = "import sys; from seqlong.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert time.perf_counter() - begun < 5


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *TOY, "trainer.max_steps=1"]) == 0
    (the_run() / "report.html").unlink()
    assert main(["report", str(the_run())]) == 0
    assert (the_run() / "report.html").is_file()
    assert main(["report", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


# --- sweep -----------------------------------------------------------------------------------------------------------


def test_the_grid() -> None:
    from seqlong.sweep import grid

    jobs = grid(["a=1", "b=2,3", "c=[1,2]", "d=x,y"])
    assert [varied for _, varied in jobs] == [["b=2", "d=x"], ["b=2", "d=y"], ["b=3", "d=x"], ["b=3", "d=y"]]
    assert jobs[0][0] == ["a=1", "b=2", "c=[1,2]", "d=x"]


@pytest.mark.slow
def test_a_sweep_goes_past_a_failed_job_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    assert main(["sweep", *TOY, "trainer.max_steps=3", "task.crash=1,null"]) == 1
    text = capsys.readouterr().out
    sweep = the_run("sweep-toy-*")
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["failed", "finished"]
    assert jobs[1]["val bits"] > 0 and jobs[1]["steps"] == 3
    assert "job-000 failed: RuntimeError: the toy crashed" in text and "task.crash=null" in text
    assert (sweep / "job-001" / "checkpoints" / "last.ckpt").is_file()
    assert main(["sweep", *TOY]) == 2
    assert "a sweep needs a setting with several values" in capsys.readouterr().err
