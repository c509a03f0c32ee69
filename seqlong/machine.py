"""What this machine has, what is outside what seqlong needs, and what would help."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import seqlong
from seqlong.kernels import dispatch, tuning
from seqlong.kernels.runtime import MIN_CAPABILITY, triton_runs_on

#: Releases that must not run, and why.
FORBIDDEN = {("lightning", "2.6.2"): "was withdrawn", ("lightning", "2.6.3"): "was withdrawn"}
LOW_DISK = 5 * 2**30


@dataclass
class Fact:
    """A line about the environment; ``bad`` if it is outside what seqlong needs."""

    name: str
    value: str
    bad: bool = False


def environment(device: torch.device) -> list[Fact]:
    """Versions, machine and disk."""
    facts = [Fact("seqlong", f"{seqlong.__version__}, Python {platform.python_version()}")]
    build = torch.version.cuda or torch.version.hip
    facts.append(Fact("torch", f"{torch.__version__} ({f'CUDA {build}' if build else 'no GPU support'})"))
    facts.append(Fact("Triton", tuning.triton_version()))
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        more = f"; {torch.cuda.device_count()} of them" if torch.cuda.device_count() > 1 else ""
        memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        text = f"{torch.cuda.get_device_name(index)}, {memory}, capability {major}.{minor}{more}"
        facts.append(Fact("GPU", text, (major, minor) < MIN_CAPABILITY))
    else:
        facts.append(Fact("GPU", f"none that torch can use{'; a driver is there' if _driver() else ''}"))
    if driver := _driver():
        facts.append(Fact("driver", driver))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts.append(Fact("CPU", f"{cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB memory"))
    facts += packages()
    folder = Path("runs").absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    facts.append(Fact("disk", f"{free / 2**30:.1f} GiB free at {folder}", free < LOW_DISK))
    return facts


def packages() -> list[Fact]:
    """What seqlong requires, against what is installed: one line if all is well, and one for each that is not."""
    told, bad = [], []
    try:
        required = importlib.metadata.requires("seqlong") or []
    except importlib.metadata.PackageNotFoundError:
        return [Fact("packages", "seqlong is not installed, only on the path: what it requires is unknown")]
    for line in required:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            bad.append(Fact(name, f"not installed; seqlong needs {name}{requirement.specifier}", True))
            continue
        if why := FORBIDDEN.get((name, found)):
            bad.append(Fact(name, f"{found} {why}: remove it now, and install {name}{requirement.specifier}", True))
        elif not requirement.specifier.contains(Version(found), prereleases=True):
            bad.append(Fact(name, f"{found}; seqlong needs {name}{requirement.specifier}", True))
        elif name in ("lightning", "hydra-core", "jsonargparse", "numpy"):
            told.append(f"{name} {found}")
    return [Fact("packages", ", ".join(told) + ("" if bad else "; all as required")), *bad]


def _driver() -> str | None:
    """The version of NVIDIA's driver, or None."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def advise(device: torch.device, facts: Sequence[Fact]) -> list[str]:
    """What to install or do to be faster, or to get more."""
    said = []
    if forced := os.environ.get(dispatch.VARIABLE):
        said.append(f"{dispatch.VARIABLE}={forced} is used by the ops that can; unset it to let seqlong choose.")
    if not torch.cuda.is_available():
        if _driver() and torch.version.cuda is None:
            said.append("There is a GPU, but this torch is built without CUDA: install one from pytorch.org that is.")
        elif _driver():
            said.append(
                f"There is a GPU, but torch cannot use it: driver {_driver()} may be too old for CUDA "
                f"{torch.version.cuda}. Update the driver, or install a torch built for an older CUDA."
            )
        else:
            said.append("No GPU: everything works, in plain torch; long rows want a GPU, from NVIDIA's Ampere on.")
    elif device.type == "cuda" and (why := triton_runs_on(device)):
        if tuning.triton_version() == "none":
            said.append("Triton is missing, so ops run in plain torch: pip install triton (Linux).")
        else:
            said.append(f"No Triton kernels here: {why}. Ops run in plain torch; use precision=32 or 16-mixed.")
    if torch.cuda.is_available() and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        said.append("A newer torch (2.10) has variable-length attention, which makes packed rows faster.")
    for fact in facts:
        if fact.bad and fact.name == "disk":
            said.append("Little disk is left for runs: free some, or choose another place with run.root=FOLDER.")
        elif fact.bad and fact.name != "GPU":
            said.append(f"{fact.name}: {fact.value}.")
    if any(one.source == "default" and one.checked for one in tuning.in_use()):
        said.append("Some configurations are not tuned for this GPU: seqlong doctor --tune")
    return said
