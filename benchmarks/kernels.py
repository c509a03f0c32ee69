"""Kernels: our ops, their chunked torch forms, and fla, mamba-ssm and attention in the same run; time and memory.

Rows are ``<op>@<rows>x<positions>``; metrics are ``fwd_ms`` (no gradients kept), ``fwdbwd_ms``, ``extra_mib`` (peak
beside inputs, outputs and gradients), ``peak_mib`` (with outputs and gradients), ``graph_ms`` (a decoding step replayed
from a CUDA graph) and, for us alone, the fraction of two floors: every tensor moved once at the speed of a copy, and
every product at the speed of a large one, both measured in this run.

Every contender runs in a process of its own, so that a crash, a hang or an out-of-memory of one costs its row only.
Each result is compared with our chunked form in float32 (which tests hold against the definition), at the end of the
last row where addresses are largest; one that is wrong says so in its name. Softmax attention and ``once``, which
compute something else, are not compared. ``--log FILE`` keeps every measurement as it comes; ``--read FILE`` makes the
table from it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import torch  # noqa: E402
from _contenders import CONTENDERS, FAMILIES, lift_guard, missing, tune_briefly  # noqa: E402
from _draw_kernels import draw  # noqa: E402
from _measure import ceilings, measure  # noqa: E402

# This script is called kernels.py; transformers would take it for PyPI's package of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER]

from seqlong.bench import Row, main  # noqa: E402

SIZES = "1x131072,16x8192,1x1048576"
TINY = "1x160,2x64"  # on a CPU, where only the logic is of interest
#: Attention is quadratic and our torch form slow: a row of a million would take the time of all others.
LONGEST = {"sdpa-cudnn": 131_072, "sdpa-flash": 131_072, "chunked": 131_072}
PREFIX = "@@"
METRICS = {"fwd_ms": "ms", "graph_ms": "ms", "fwdbwd_ms": "ms", "extra_mib": "MiB", "peak_mib": "MiB"}

Job = tuple[str, str, int, int]  # contender, family, rows, length
Results = dict[tuple[str, str], dict[str, dict[str, Any]]]  # (family, size) -> contender -> measurement


def jobs(group: str, families: list[str], sizes: list[tuple[int, int]]) -> list[Job]:
    """What a contender is to measure; small sizes of decoding are rows at once."""
    found: list[Job] = []
    for family in families:
        if family not in CONTENDERS[group]:
            continue
        if family.startswith("decode"):
            more = [(1, 8)] if family != "decode" else []  # what speculation drafts
            found += [(group, family, rows, tokens) for rows, tokens in [(1, 1), (64, 1), *more]]
            continue
        extra = [(4, 2048)] if family == "simple_gla" and torch.cuda.is_available() and len(sizes) > 1 else []
        for rows, length in sizes + extra:
            if length <= LONGEST.get(group, length):
                found.append((group, family, rows, length))
    return found


def work(todo: list[Job], seconds: float, share: tuple[int, int] = (0, 1)) -> None:
    """In a child: measure each job and print what was found, a line of JSON each. Peers autotune over a share."""
    tune_briefly(*share)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for group, family, rows, length in todo:
        said: dict[str, Any] = {"contender": group, "family": family, "rows": rows, "length": length}
        try:
            if group == "ceilings":
                said.update(ceilings(device, max(seconds, 0.05)))
            else:
                label, contender = CONTENDERS[group][family]
                if group == "fla" and lift_guard() and family != "lightning":
                    label += ", its guard against a miscompile off"
                checked = group != "once" and not group.startswith("sdpa")
                said.update(label=label, **measure(FAMILIES[family], contender, rows, length, seconds, device, checked))
        except torch.OutOfMemoryError:
            said["failed"] = "out of memory"
        except Exception as error:  # a peer may fail in any way; the row tells which
            said["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(PREFIX + json.dumps(said), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run(todo: list[Job], seconds: float, patience: float, until: float) -> Iterator[dict[str, Any]]:
    """Measure in children: one for all jobs, and another for the rest where one crashes or is silent too long."""
    left = list(todo)
    while left:
        if time.monotonic() > until:
            for job in left:
                yield _failed(job, "the time of the whole run was spent")
            return
        child = _start(left, seconds)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_drain, args=(child, lines), daemon=True).start()
        tail: list[str] = []
        reason = ""
        while left:
            try:
                line = lines.get(timeout=max(1.0, min(patience, until - time.monotonic())))
            except queue.Empty:
                reason = f"gave no result within {patience:.0f} s"
                break
            if line is None:
                reason = f"the process ended with status {child.wait()}: {' '.join(' '.join(tail[-3:]).split())[-300:]}"
                break
            if line.startswith(PREFIX):
                left.pop(0)
                yield json.loads(line[len(PREFIX) :])
            elif line.strip():
                tail.append(line)
        child.kill()
        child.wait()
        if left:
            yield _failed(left.pop(0), reason)


def _start(todo: list[Job], seconds: float, share: tuple[int, int] = (0, 1)) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__)), "--work", json.dumps(todo), "--seconds", str(seconds)]
    command += ["--share", "{},{}".format(*share)]
    # fla would keep on disk what it chose while others used the GPU too.
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _drain(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def _failed(job: Job, reason: str) -> dict[str, Any]:
    group, family, rows, length = job
    return {"contender": group, "family": family, "rows": rows, "length": length, "failed": reason}


def compile_ahead(groups: list[str], families: list[str], patience: float) -> None:
    """Let the peers compile all that they autotune over, side by side, so that the timed runs find it in the cache.

    Their choices are made again in the timed runs, when the GPU is theirs alone. Each op is compiled by as many
    processes as there are cores for, each a share of its configurations: one after the other they take minutes.
    """
    todo = [job for group in groups for family in families for job in jobs(group, [family], [(1, 4096)])]
    shares = max(1, (os.cpu_count() or 1) // max(1, len(todo)))
    each = [(job, (share, shares)) for job in todo for share in range(shares)]
    children = [_start([job], 0.0, share) for job, share in each]
    until = time.monotonic() + patience
    for (job, _), child in zip(each, children, strict=True):
        try:
            child.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            print(f"{job[0]} {job[1]} still compiled after {patience:.0f} s", flush=True)


def rows(results: Results, speeds: dict[str, float]) -> Iterator[Row]:
    """One row for each op, size, metric and peer."""
    for (family, size), by_contender in results.items():
        ours = by_contender.get("seqlong", {})
        where = f"{family}@{size}"
        for metric, unit in METRICS.items():
            if not isinstance(ours.get(metric), float):
                continue
            peers = [found for group, found in by_contender.items() if group != "seqlong"]
            if not peers:
                yield Row(where, metric, ours[metric], unit)
            for found in peers:
                yield Row(where, metric, ours[metric], unit, peer_name(found), found.get(metric))
        if speeds and "fwdbwd_ms" in ours and "bytes" in ours:
            least = ours["bytes"] / speeds["bytes_per_s"] * 1e3
            yield Row(where, "byte_floor", 100 * least / ours["fwdbwd_ms"], "% of peak")
            count, length = (int(number) for number in size.split("x"))
            if flops := FAMILIES[family].flops * count * length:
                yield Row(where, "flop_floor", 1e5 * flops / speeds["flops_per_s"] / ours["fwdbwd_ms"], "% of peak")


def peer_name(found: dict[str, Any]) -> str:
    """A contender's name, and what was wrong with it."""
    name = found.get("label") or CONTENDERS[found["contender"]][found["family"]][0]
    if found.get("failed"):
        return f"{name} ({found['failed'][:80]})"
    if found.get("wrong"):
        worst = ", ".join(f"{key} by {found['errors'][key]:.0%}" for key in found["wrong"])
        return f"{name} (WRONG: {worst})"
    return name


def take(found: dict[str, Any], results: Results, speeds: dict[str, float]) -> None:
    """File a measurement, and say it."""
    if found["contender"] == "ceilings":
        speeds.update({key: found[key] for key in ("bytes_per_s", "flops_per_s") if key in found})
    else:
        size = f"{found['rows']}x{found['length']}"
        results.setdefault((found["family"], size), {})[found["contender"]] = found
    numbers = " ".join(
        f"{key}={value:.4g}" for key, value in found.items() if isinstance(value, float) and key not in ("bytes",)
    )
    where = f"{found['family']}@{found['rows']}x{found['length']} {found['contender']}"
    worst = max(found.get("errors", {}).values(), default=0.0)
    said = found.get("failed") or f"{numbers} error={worst:.1e}{' WRONG' if found.get('wrong') else ''}"
    print(f"{where}: {said}", flush=True)


def command() -> None:
    """Measure what the arguments ask for, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(FAMILIES), help="ops, by commas")
    parser.add_argument("--sizes", help=f"ROWSxPOSITIONS, by commas; {SIZES}, on a CPU {TINY}")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="by commas")
    parser.add_argument("--seconds", type=float, default=0.3, help="for one timing")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole run")
    parser.add_argument("--patience", type=float, default=150.0, help="seconds that one measurement may take")
    parser.add_argument("--cold", action="store_true", help="do not let peers compile side by side first")
    parser.add_argument("--name", default="kernels", help="of the result's files")
    parser.add_argument("--log", type=Path, help="append every measurement to this file, as it comes")
    parser.add_argument("--read", type=Path, action="append", default=[], help="take measurements from such a file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--share", default="0,1", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        share, shares = (int(number) for number in given.share.split(","))
        work([tuple(job) for job in json.loads(given.work)], given.seconds, share=(share, shares))
        return
    sizes_given = given.sizes or (SIZES if torch.cuda.is_available() else TINY)
    sizes = []
    for size in filter(None, sizes_given.split(",")):
        if not (found := re.fullmatch(r"0*([1-9]\d*)x0*([1-9]\d*)", size.strip())):
            parser.error(f"--sizes takes ROWSxPOSITIONS, such as 1x131072, by commas; found {size!r}")
        sizes.append((int(found[1]), int(found[2])))
    families = [name for name in given.only.split(",") if name]
    groups = [name for name in given.contenders.split(",") if name]
    for name, known in [*((name, FAMILIES) for name in families), *((name, CONTENDERS) for name in groups)]:
        if name not in known:
            parser.error(f"{name!r} is unknown; there are {', '.join(known)}")

    results: Results = {}
    speeds: dict[str, float] = {}
    for path in given.read:
        for line in path.read_text().splitlines():
            take(json.loads(line), results, speeds)
    if not given.read:
        until = time.monotonic() + 60 * given.minutes
        # A CPU has no one speed: what it copies and multiplies depends on caches and threads.
        todo: list[list[Job]] = [[("ceilings", "ceilings", 1, 1)]] if torch.cuda.is_available() else []
        able = []
        for group in groups:
            can = [family for family in families if family in CONTENDERS[group]] if missing(group) is None else []
            if missing(group) is not None:
                print(f"{group}: {missing(group)}", flush=True)
            if can:
                able.append(group)
                todo.append(jobs(group, can, sizes))
        tuned = [group for group in able if group in ("fla", "mamba-ssm")]
        if tuned and not given.cold:
            compile_ahead(tuned, families, given.patience)
        for each in todo:
            for found in run(each, given.seconds, given.patience, until):
                take(found, results, speeds)
                if given.log:
                    with given.log.open("a") as file:
                        file.write(json.dumps(found) + "\n")
    main(given.name, rows(results, speeds), draw, script="kernels")


if __name__ == "__main__":
    command()
