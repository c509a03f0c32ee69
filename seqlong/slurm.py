"""``seqlong launch``: a SLURM job script that goes on by itself, or command lines for torchrun."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from seqlong.errors import ConfigError, SeqlongError, nearest

HELP = """Writes a job script for SLURM, or command lines for torchrun, to the terminal.

The job has a process a GPU. Before its time is over, or when it is preempted, it finishes the step, saves, and is
queued again; it then goes on from checkpoints/last.ckpt, with the next batch, in the same run folder. A setting with
several values makes an array, a job a combination. What the words mean is checked here, before anything is queued."""
EXAMPLES = """examples:
  seqlong launch slurm experiment=dna/pretrain data.path=/data/my.fa.gz --nodes 2 --gpus 8 > job.sh && sbatch job.sh
  seqlong launch slurm experiment=dna/pretrain data.path=/data/my.fa.gz seed=1,2,3 --gpus 4 --time 12:00:00 > sweep.sh
  seqlong launch slurm experiment=dna/pretrain data.path=/data/my.fa.gz --site my_cluster.yaml > job.sh
  seqlong launch torchrun experiment=dna/pretrain data.path=/data/my.fa.gz --nodes 2 --gpus 8"""


@dataclass(frozen=True)
class Site:
    """What a cluster is asked for; ``configs/launch/slurm/default.yaml`` says what each means."""

    nodes: int = 1
    gpus: int = 8
    time: str = "24:00:00"
    cpus: int = 8
    partition: str | None = None
    account: str | None = None
    memory: str = "0"
    warn: int = 300
    retries: int = 3
    logs: str = "%x-%A.out"
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus", 0), ("cpus", 1), ("warn", 1), ("retries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"launch: {name} is a whole number of at least {least}, found {value!r}")
        if not re.fullmatch(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}", str(self.time)):
            raise ConfigError(f"launch: time is HH:MM:SS or D-HH:MM:SS, found {self.time!r}")
        for name in ("sbatch", "setup"):
            if not isinstance(getattr(self, name), list):
                raise ConfigError(f"launch: {name} is a list of lines, found {getattr(self, name)!r}")

    @property
    def tasks(self) -> int:
        """Processes of a node: one a GPU, or a single one."""
        return max(1, self.gpus)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SeqlongError(f"seqlong launch: {message}; `seqlong launch --help` lists what it takes")


def command(arguments: Sequence[str]) -> int:
    """``seqlong launch``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the arguments, the site or the configuration.
    """
    parser = _Parser(
        prog="seqlong launch", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("slurm", "torchrun"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for seqlong fit")
    parser.add_argument("--site", metavar="FILE", help="settings of a cluster; configs/launch/slurm/default.yaml")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus", type=int, help="of a node; 0: one process without")
    parser.add_argument("--time", help="HH:MM:SS or D-HH:MM:SS")
    parser.add_argument("--cpus", type=int, help="of a process")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--name", help="of the job; the run's if left out")
    given = parser.parse_intermixed_args(list(arguments))
    site = read_site(Path(given.site) if given.site else None)
    chosen = {name: getattr(given, name) for name in ("nodes", "gpus", "time", "cpus", "partition", "account")}
    site = replace(site, **{name: value for name, value in chosen.items() if value is not None})
    words = [word for word in given.overrides if not word.startswith("run.dir=")]
    if not any(word.startswith("hardware=") for word in words):  # the machine that writes this may be of another kind
        words.append(f"hardware={'gpu' if site.gpus else 'cpu'}")
    jobs = _jobs(words)
    name = given.name or _name(jobs[0])
    if given.kind == "torchrun":
        if len(jobs) > 1:
            raise ConfigError("launch torchrun starts one run; for several values take launch slurm, or seqlong sweep")
        print(torchrun(jobs[0], site, name, _root(words)))
    else:
        print(script(jobs, site, name, _root(words), ["seqlong", "launch", *arguments]))
    return 0


def read_site(path: Path | None) -> Site:
    """Settings of a cluster from a file; those of the default for what it leaves out.

    Raises:
        ConfigError: a setting that there is not, or a value that cannot be.
    """
    from seqlong.config_files import CONFIGS, load_yaml

    content: dict[str, Any] = {}
    for file in (CONFIGS / "launch" / "slurm" / "default.yaml", path):
        if file is not None:
            known = [entry.name for entry in fields(Site)]
            read = {str(key): value for key, value in load_yaml(file).items()}
            for key in read:
                if key not in known:
                    raise ConfigError(f"{file}: '{key}' is unknown{nearest(key, known)}; known are {', '.join(known)}")
            content |= read
    for key in ("sbatch", "setup"):
        value = content.get(key)
        content[key] = [str(line) for line in value] if value is not None and not isinstance(value, str) else value
    return Site(**content)


def script(jobs: Sequence[Sequence[str]], site: Site, name: str, root: str, said: Sequence[str]) -> str:
    """The job script.

    Args:
        jobs: overrides of each job; several make an array.
        site: what is asked for.
        name: of the job.
        root: folder of the runs.
        said: the command line that asked for it.
    """
    many = len(jobs) > 1
    asked = [
        f"--job-name={name}",
        f"--nodes={site.nodes}",
        f"--ntasks-per-node={site.tasks}",
        *([f"--gpus-per-node={site.gpus}"] if site.gpus else []),
        f"--cpus-per-task={site.cpus}",
        f"--mem={site.memory}",
        f"--time={site.time}",
        *([f"--partition={site.partition}"] if site.partition else []),
        *([f"--account={site.account}"] if site.account else []),
        f"--output={site.logs.replace('%A', '%A_%a') if many and '%a' not in site.logs else site.logs}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{site.warn}",
        *([f"--array=0-{len(jobs) - 1}"] if many else []),
        *(line.removeprefix("#SBATCH").strip() for line in site.sbatch),
    ]
    common = [f"trainer.devices={site.tasks}", f"trainer.num_nodes={site.nodes}"]
    if many:
        cases = [f"  {number}) settings=({_words(job)}) ;;" for number, job in enumerate(jobs)]
        settings = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
        label = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    else:
        settings, label = [f"settings=({_words(jobs[0])})"], "${SLURM_JOB_ID}"
    given = " ".join(word.partition("=")[0] for word in jobs[0])
    parallel = site.nodes * site.tasks > 1 and "trainer.strategy" not in given
    common += ["trainer.strategy=ddp"] if parallel else []
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in asked),
            f"# Written by: {shlex.join(said)}",
            "",
            "set -u",
            *settings,
            f'run_dir={shlex.quote(root)}/{shlex.quote(name)}-"{label}"',
            *site.setup,
            "export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}",
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{site.cpus}}}",
            "",
            "# A job that was queued again goes on from its last checkpoint.",
            "resume=()",
            'if [ -f "$run_dir/checkpoints/last.ckpt" ]; then resume=(--ckpt_path last); fi',
            "",
            f'srun --kill-on-bad-exit=0 --wait=120 seqlong fit "${{settings[@]}}" {" ".join(common)} \\',
            '  run.dir="$run_dir" "${resume[@]+"${resume[@]}"}" &',
            "step=$!",
            "requeue=no",
            "# SLURM says that the time is nearly over: finish the step, save, and be queued again.",
            "trap 'told=yes; requeue=yes; kill -USR1 \"$step\"' USR1",
            "# Preempted or cancelled: finish the step and save.",
            "trap 'told=yes; kill -TERM \"$step\"' TERM",
            "told=yes",
            'while [ "$told" = yes ]; do told=no; wait "$step"; status=$?; done',
            "",
            'if [ "$requeue" = yes ] && [ "$status" -eq 143 ]; then',
            '  scontrol requeue "$SLURM_JOB_ID" && exit 0',
            'elif [ "$status" -eq 143 ]; then',
            "  # SLURM queues a preempted job again by itself, a cancelled one not: it decides when this script ends.",
            '  sleep "${SEQLONG_GRACE:-600}" & wait $!',
            "# A mistake in the settings (2) would be made again.",
            'elif [ "$status" -ne 0 ] && [ "$status" -ne 2 ] \\',
            f'    && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {site.retries} ]; then',
            '  echo "failed with status $status: queued again"',
            '  scontrol requeue "$SLURM_JOB_ID" && exit 0',
            "fi",
            'exit "$status"',
        ]
    )


def torchrun(words: Sequence[str], site: Site, name: str, root: str) -> str:
    """Command lines, the same on every node."""
    run = [
        "$(which seqlong)", "fit", _words(words), f"trainer.devices={site.tasks}", f"trainer.num_nodes={site.nodes}",
    ]  # fmt: skip
    if not any(word.startswith("trainer.strategy") for word in words) and site.nodes * site.tasks > 1:
        run.append("trainer.strategy=ddp")
    run.append(f"run.dir={shlex.quote(f'{root}/{name}-1')}")
    if site.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {site.tasks} {' '.join(run)}"
    meet = f"--rdzv-id {shlex.quote(name)} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    return "\n".join(
        [
            "# On every node; FIRST_NODE is the name of one of them. To go on later, add: --ckpt_path last",
            f"torchrun --nnodes {site.nodes} --nproc-per-node {site.tasks} {meet} \\",
            f"  {' '.join(run)}",
        ]
    )


def _jobs(words: Sequence[str]) -> list[list[str]]:
    """The words of each job, the first one composed: a mistake is told before it waits in a queue."""
    from seqlong.compose import compose
    from seqlong.sweep import grid

    jobs = [job for job, _ in grid(words)]
    compose(jobs[0])
    return jobs


def _name(words: Sequence[str]) -> str:
    from seqlong.compose import compose

    name = str((compose(words).house.get("run") or {}).get("name") or "seqlong")
    return re.sub(r"[^\w.-]+", "-", name)


def _root(words: Sequence[str]) -> str:
    given = [word.partition("=")[2] for word in words if word.startswith("run.root=")]
    return given[-1] if given else "runs"


def _words(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
