"""`seqlong launch slurm`: the script that it writes, run by bash with an srun and an scontrol of our own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqlong.cli import main

HERE = Path(__file__).parent
WORDS = (f"experiment={HERE / 'toy.yaml'}", "data.path=x", "hardware=cpu")
#: Starts the tasks of a node as SLURM does, hands on signals, and ends as the worst of them.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    words.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(words, env=dict(os.environ, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), SLURM_NODEID="0"))
    for i in range(count)
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
#: A training that says what it was given, waits if it is told to, and ends as it is told.
TRAINING = """#!/bin/bash
echo "$@" >> said.txt
trap 'exit 143' USR1 TERM
touch started
if [ -f wait ]; then while :; do sleep 0.05; done; fi
exit "$(cat status)"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with bin/, whose programs the script will find first."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "$@" >> scontrol.txt\n'), ("seqlong", TRAINING)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "status").write_text("0")
    return tmp_path


def written(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    assert main(["launch", "slurm", *words]) == 0
    text = capsys.readouterr().out
    (folder / "job.sh").write_text(text)
    assert subprocess.run(["bash", "-n", str(folder / "job.sh")], capture_output=True).returncode == 0
    return text


def start(folder: Path, tasks: int = 1, **more: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE)]),
        "SLURM_JOB_ID": str(40000 + os.getpid() % 10000),
        "SLURM_JOB_NAME": "toy",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_NNODES": "1",
        "SLURM_NODELIST": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "SEQLONG_GRACE": "0.05",
        **more,
    }
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until(path: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    if not path.exists():
        process.kill()
        pytest.fail(f"{path.name} did not come:\n{process.communicate()[0]}")


def test_what_is_asked_of_slurm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nodes, tasks and GPUs agree with what the trainer is told; a site's lines are there; a gap is the default's."""
    site = tmp_path / "site.yaml"
    site.write_text("partition: long\nwarn: 120\nsbatch: ['#SBATCH --constraint=h100']\nsetup: [module load cuda]\n")
    text = written(capsys, tmp_path, *WORDS, "--nodes", "2", "--gpus", "4", "--time", "1-00:00:00", "--site", str(site))
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1-00:00:00", "--partition=long", "--requeue",
        "--signal=B:USR1@120", "--constraint=h100", "--cpus-per-task=8", "--open-mode=append",
    ):  # fmt: skip
        assert wanted in asked
    assert "\nmodule load cuda\n" in text
    assert "trainer.devices=4 trainer.num_nodes=2 trainer.strategy=ddp" in text
    assert not any(line.startswith("--array") for line in asked)


def test_a_strategy_that_is_given_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = written(capsys, tmp_path, *WORDS, "trainer.strategy=sequence_parallel", "--gpus", "2")
    assert "trainer.strategy=ddp" not in text and "trainer.strategy=sequence_parallel" in text


def test_a_sweep_is_an_array_and_each_task_has_its_settings(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    text = written(capsys, cluster, *WORDS, "seed=1,2", "run.name='a b','c d'", "--gpus", "1")
    assert "#SBATCH --array=0-3" in text and "--output=%x-%A_%a.out" in text
    job = start(cluster, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="7")
    out = job.communicate(timeout=30)[0]
    assert job.returncode == 0, out
    said = (cluster / "said.txt").read_text()
    assert "seed=2" in said and "run.name='c d'" in said and "-7_3" in said and "--ckpt_path" not in said


def test_time_over_means_saved_and_queued_again(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    written(capsys, cluster, *WORDS, "--gpus", "1")
    (cluster / "wait").touch()
    job = start(cluster)
    until(cluster / "started", job)
    job.send_signal(signal.SIGUSR1)
    out = job.communicate(timeout=30)[0]
    assert job.returncode == 0, out
    assert (cluster / "scontrol.txt").read_text().split()[0] == "requeue"


def test_preempted_or_cancelled_is_left_to_slurm(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    written(capsys, cluster, *WORDS, "--gpus", "1")
    (cluster / "wait").touch()
    job = start(cluster)
    until(cluster / "started", job)
    job.send_signal(signal.SIGTERM)
    out = job.communicate(timeout=30)[0]
    assert job.returncode == 143, out
    assert not (cluster / "scontrol.txt").exists()


@pytest.mark.parametrize(
    ("status", "restarts", "again"), [(1, 0, True), (137, 2, True), (1, 3, False), (2, 0, False), (0, 0, False)]
)
def test_what_failed_is_queued_again_some_times(
    status: int, restarts: int, again: bool, capsys: pytest.CaptureFixture[str], cluster: Path
) -> None:
    """A crash is; a mistake in the settings is not, nor is what failed again and again."""
    written(capsys, cluster, *WORDS, "--gpus", "1")
    (cluster / "status").write_text(str(status))
    job = start(cluster, SLURM_RESTART_COUNT=str(restarts))
    out = job.communicate(timeout=30)[0]
    assert (cluster / "scontrol.txt").exists() == again, out
    assert job.returncode == (0 if again else status)


@pytest.mark.slow
def test_two_processes_stop_in_time_and_go_on(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    """Two gloo processes train; SIGUSR1 to the script: both save and end, the job is queued again. Started once more,
    the script asks for the last checkpoint."""
    (cluster / "bin" / "seqlong").unlink()
    (cluster / "bin" / "seqlong").symlink_to(Path(sys.executable).with_name("seqlong"))
    written(capsys, cluster, *WORDS, "trainer.max_steps=2000000", "trainer.val_check_interval=1000000", "--gpus", "2")
    job = start(cluster, tasks=2)
    until(cluster / "runs", job)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (rows := list((cluster / "runs").glob("*/metrics.csv"))):
        time.sleep(0.05)
    while time.monotonic() < deadline and rows[0].read_text().count("train/loss") < 2 and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    out = job.communicate(timeout=60)[0]
    assert job.returncode == 0, out
    run = rows[0].parent
    assert (cluster / "scontrol.txt").exists(), out
    assert (run / "checkpoints" / "last.ckpt").is_file(), out
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert (run / "report.html").is_file()
    (cluster / "bin" / "seqlong").unlink()
    (cluster / "bin" / "seqlong").write_text(TRAINING)
    (cluster / "bin" / "seqlong").chmod(0o755)
    again = start(cluster, tasks=2)
    assert again.wait(30) == 0
    assert f"run.dir=runs/{run.name} --ckpt_path last" in (cluster / "said.txt").read_text()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("partion: long", "'partion' is unknown"), ("nodes: 0", "nodes is a whole number"), ("time: soon", "HH:MM:SS")],
)
def test_mistakes_in_a_site(content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.yaml").write_text(content)
    assert main(["launch", "slurm", *WORDS, "--site", str(tmp_path / "site.yaml")]) == 2
    assert complaint in capsys.readouterr().err


def test_mistakes_in_a_configuration_are_told_before_it_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", "experiment=dna/dmo"]) == 2
    assert "dna/demo" in capsys.readouterr().err


def test_torchrun_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "torchrun", *WORDS, "--nodes", "2", "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert "torchrun --nnodes 2 --nproc-per-node 4 " in text and "trainer.devices=4 trainer.num_nodes=2" in text
    assert main(["launch", "torchrun", *WORDS, "seed=1,2"]) == 2
