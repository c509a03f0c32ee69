"""Every mixer beside Mamba2: CPU time and memory a token, forward and backward, at 2,048, 16,384 and 131,072 tokens.

One row, float32, one thread, width 64 and heads of 32. What counts is CPU time, which what else runs on the machine
changes little, and its ratio to Mamba2's, which is measured in the same process right after. Each mixer has a process
of its own. What takes longer than the limit is ended and reported as more than that many times Mamba2. A benchmark
that was stopped goes on where it was.

    seqlong bench mixers                                  all; --limit ends slow ones sooner or later
    seqlong bench mixers --only "GLA;KDA" --tokens 2048   prints, and writes no files
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from _mixer_cost import REFERENCE, factories, measure  # noqa: E402

# kernels.py beside this script is not PyPI's package of that name, which transformers looks for.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER]

from matplotlib.figure import Figure  # noqa: E402
from rich.progress import track  # noqa: E402

from seqlong.bench import Row, benchmarks_folder, main  # noqa: E402

PREFIX = "@@"
TOKENS = (2048, 16384, 131072)
Found = dict[tuple[str, int], dict[str, Any]]  # mixer and tokens -> what was measured, or why it was not


def run(name: str, given: argparse.Namespace, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """Measure a mixer in a process of its own; a line for each length, also for those that do not end."""
    job = {"name": name, "width": given.width, "lengths": tokens, "repeats": given.repeats, "limit": given.limit}
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    done = []
    for line in process.stdout:
        if line.startswith(PREFIX):
            done.append(json.loads(line[len(PREFIX) :]))
            yield done[-1]
    said = process.stderr.read().strip().splitlines()
    status = process.wait()
    for place, length in enumerate(tokens[len(done) :]):
        slow = status == -24  # SIGXCPU
        why = f"more than {given.limit:g} s of CPU" if slow else f"status {status}: {said[-1][:200] if said else ''}"
        if slow and place:
            why = f"not tried: fewer tokens took {why}"
        yield {"mixer": name, "width": given.width, "tokens": length, "limit": given.limit, "failed": why}


def load(path: Path, given: argparse.Namespace) -> Found:
    """What an earlier run of the same settings has measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    same = [one for one in lines if one["width"] == given.width and one["limit"] == given.limit]
    return {(one["mixer"], one["tokens"]): one for one in same}


def gather(names: list[str], given: argparse.Namespace, log: Path | None) -> Found:
    found = load(log, given) if log is not None else {}
    for name in track(names, description="mixers", disable=not sys.stderr.isatty()):
        missing = [length for length in given.tokens if (name, length) not in found]
        for one in run(name, given, missing) if missing else ():
            found[name, one["tokens"]] = one
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(one) + "\n")
    return found


def rows(found: Found) -> Iterator[Row]:
    """Cost a token over Mamba2's at the same length, and the memory of both."""
    for length in sorted({tokens for _, tokens in found}):
        here = {name: one for (name, tokens), one in found.items() if tokens == length}
        metric = f"CPU time a token, forward and backward, {length:,} tokens"
        for name, one in here.items():
            if "failed" not in one:
                yield Row(name, metric, one["cpu_s"] / one["reference_cpu_s"], f"x {REFERENCE}", REFERENCE, 1.0)
            elif (floor := least(found, name, length)) is not None:
                title = f"{name}: not run to its end, {one['failed']}; at least"
                yield Row(title, metric, floor, f"x {REFERENCE}", REFERENCE, None)
            else:
                print(f"{name}, {length:,} tokens: {one['failed']}", file=sys.stderr)
    for length in sorted({tokens for _, tokens in found}):
        theirs = found.get((REFERENCE, length), {}).get("peak_bytes")
        for (name, tokens), one in found.items():
            if tokens == length and one.get("peak_bytes"):
                metric = f"peak memory a token, forward and backward, {length:,} tokens"
                kept = theirs / length / 1024 if theirs else None
                yield Row(name, metric, one["peak_bytes"] / length / 1024, "KiB", REFERENCE, kept)


def least(found: Found, name: str, length: int) -> float | None:
    """How many times Mamba2's CPU time a mixer took at the least, when it was ended or when fewer tokens were."""
    reference = found.get((REFERENCE, length), {}).get("cpu_s")
    one = found[name, length]
    return one["limit"] / reference if reference and "s of CPU" in one.get("failed", "") else None


def draw(found: Found, figure: Figure) -> None:
    """Time on the left, memory on the right: a line of dots a mixer, a colour a length, sorted by the longest."""
    lengths = sorted({tokens for _, tokens in found})
    colours = dict(zip(lengths, ("#9dc3e6", "#1767b3", "#14191f", "#c2410c", "#2f8f57"), strict=False))

    def time(name: str, length: int) -> tuple[float, bool] | None:
        one = found.get((name, length), {"failed": ""})
        if "failed" not in one:
            return one["cpu_s"] / one["reference_cpu_s"], True
        floor = least(found, name, length) if (name, length) in found else None
        return None if floor is None else (floor, False)

    def last(name: str) -> float:
        known = [value for length in lengths if (value := time(name, length))]
        return known[-1][0] if known else float("inf")

    names = sorted({name for name, _ in found}, key=last, reverse=True)
    figure.set_size_inches(12, 1.6 + 0.24 * len(names))
    figure.set_facecolor("white")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, name in enumerate(names):
        for length in lengths:
            if (value := time(name, length)) is not None:
                ended = value[1]
                left.scatter(value[0], y, s=34, color=colours[length], marker="o" if ended else ">", zorder=3,
                             facecolors=colours[length] if ended else "none")  # fmt: skip
            peak = found.get((name, length), {}).get("peak_bytes")
            if peak:
                right.scatter(peak / length / 1024, y, s=34, color=colours[length], zorder=3)
    for length in lengths:
        left.scatter([], [], s=34, color=colours[length], label=f"{length:,} tokens")
    left.scatter([], [], s=34, facecolors="none", edgecolors="#14191f", marker=">", label="ended: at least")
    left.axvline(1, color="#5d6772", linewidth=0.8, linestyle="--")
    left.set_yticks(range(len(names)), names, fontsize=8.5)
    left.set_title(f"CPU time a token, times {REFERENCE}", fontsize=9.5, loc="left")
    right.set_title("peak memory a token, KiB", fontsize=9.5, loc="left")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(color="#e4e7ea", linewidth=0.7)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    width = next(iter(found.values()))["width"]
    figure.suptitle(
        f"All mixers on a CPU: forward and backward over one row, width {width}, one thread",
        fontsize=12, fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: [part.strip() for part in text.split(";")],
                        help="mixers, separated by ;. Prints, and writes no files")  # fmt: skip
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=list(TOKENS))
    parser.add_argument("--width", type=int, default=64, help="a multiple of 64")
    parser.add_argument("--repeats", type=int, default=5, help="of short rows, of which the quickest counts")
    parser.add_argument("--limit", type=float, default=20, help="CPU seconds that one pass may take")
    parser.add_argument("--afresh", action="store_true", help="forget what a run that was stopped has measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        for one in measure(**json.loads(given.child)):
            print(PREFIX + json.dumps(one), flush=True)
        return
    if given.width % 64:
        sys.exit(f"--width {given.width}: expected a multiple of 64, so that there are pairs of heads of 32")
    known = list(factories(given.width))
    if unknown := [name for name in given.only or () if name not in known]:
        sys.exit(f"no mixer is named {unknown[0]!r}; there are: {'; '.join(known)}")
    given.tokens.sort()
    if given.only:
        for row in rows(gather(given.only, given, None)):
            print(f"{row.name}, {row.metric}: {row.value:.3g} {row.unit}")
        return
    log = benchmarks_folder() / "results" / "mixers.partial.jsonl"
    log.parent.mkdir(exist_ok=True)
    if given.afresh:
        log.unlink(missing_ok=True)
    found = gather(known, given, log)
    main("mixers", rows(found), lambda _, figure: draw(found, figure), on="cpu")
    log.unlink()


if __name__ == "__main__":
    _main()
