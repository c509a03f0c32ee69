"""Associative recall: accuracy of every mixer and of hybrids, against attention alone, over learning rates and pairs.

Multi-query associative recall (arXiv 2312.04927): rows of 256 tokens begin with 4, 16 or 64 pairs of a key and a value,
and ask for each key once more. Models have width 64, no feed-forward and two blocks; hybrids 3:1 and 7:1 have four and
eight, and stand beside the linear mixer alone at four. One model a mixer and learning rate, since recurrent models
learn in a narrow window of rates (arXiv 2508.19029), trained side by side on the same rows. The rate is chosen on
validation rows; accuracies are of test rows, with Wilson's 95 % intervals.

    seqlong bench mqar                               everything, a process a mixer, many at once
    seqlong bench mqar --minutes 6 --log FILE        what does not get all its steps is said so by name; the same
                                                     command again goes on with the models that FILE lacks
    seqlong bench mqar --small --log FILE            for a CPU: see below; writes mqar_small
    seqlong bench mqar --only "Mamba2;KDA" --rates 1e-3,1e-2

``--small`` asks the same of seven models: 1,600 steps of 12 rows at one learning rate, 5e-3, of which the first 1,000
are a lesson, 48 rows of 64 tokens with 2, 4 or 8 pairs. A model of two blocks takes 1 to 4 minutes of a core, a deeper
one more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from _recall import Setting, models, train  # noqa: E402

# kernels.py beside this script is not PyPI's package of that name, which transformers looks for.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER]

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from seqlong.bench import Row, main  # noqa: E402
from seqlong.callbacks.recall_tally import wilson  # noqa: E402

PREFIX = "@@"
PEER = "Attention"
#: ``--small``: rows as long and as full as without it, fewer of them, one learning rate, and a lesson on short rows.
SMALL = {"batch_size": 12, "steps": 1600, "lesson": 1000, "eval_rows": 96, "rates": "5e-3", "minutes": 60.0}
SMALL_MODELS = ["Attention", "DeltaNet", "GatedDeltaNet", "LinearAttention", "LinearAttention, 4 blocks",
                "LinearAttention + attention 3:1", "Mamba2"]  # fmt: skip
Found = dict[str, list[dict[str, Any]]]  # model -> one result a learning rate


# --- many jobs at once ------------------------------------------------------------------------------------------------


def _child(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    setting = Setting(**{**job["setting"], **{name: tuple(job["setting"][name]) for name in ("pairs", "lesson_pairs")}})
    device = torch.device(job["device"])

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for result in train(job["model"], setting, job["rates"], device, job["seconds"], job["graph"], say):
        print(PREFIX + json.dumps(result), flush=True)


def _run(job: dict[str, Any], patience: float) -> tuple[list[dict[str, Any]], str]:
    """Results of a job in a process of its own, or why there are none."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return [], f"no result within {patience:.0f} s"
    found = [json.loads(line[len(PREFIX) :]) for line in out.splitlines() if line.startswith(PREFIX)]
    if len(found) == len(job["rates"]):
        return found, ""
    said = [line for line in err.strip().splitlines() if line.strip()]
    return [], f"status {process.returncode}: {said[-1][:300] if said else 'no word'}"


def gather(
    names: list[str], setting: Setting, rates: list[float], device: str, jobs: int, minutes: float, graph: bool,
    log: Path | None = None,
) -> Found:  # fmt: skip
    """Run one job a model, ``jobs`` at once, and share the time that is left among those that wait.

    Models that ``log`` has at these settings and rates are taken from there. A job that fails with CUDA graphs is tried
    again without. One that fails then is named on stderr and left out.
    """
    waiting: Queue[tuple[str, bool]] = Queue()
    found = load(log, setting, rates)
    for name in names:
        if name not in found:
            waiting.put((name, graph))
    deadline = time.monotonic() + 60 * minutes
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                try:
                    name, recorded = waiting.get_nowait()
                except Empty:
                    return
                waves = -(-(waiting.qsize() + 1) // jobs)
            seconds = (deadline - time.monotonic()) / waves
            # Starting, compiling kernels and the last evaluation take time too.
            training = max(1.0, seconds - min(45.0, 0.25 * seconds))
            job = {"model": name, "setting": asdict(setting), "rates": rates, "device": device,
                   "seconds": training, "graph": recorded}  # fmt: skip
            begin = time.monotonic()
            results, why = _run(job, max(60.0, 1.5 * seconds))
            with lock:
                if results:
                    found[name] = results
                    best = max(results, key=lambda one: one["validation"])
                    accuracy = ", ".join(f"{value:.3f}" for value in best["test"])
                    print(f"{name}: {accuracy} at {best['lr']:g}, {best['steps']} steps, "
                          f"{time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)  # fmt: skip
                    if log is not None:
                        with log.open("a") as file:
                            more = {"graph": recorded, "setting": asdict(setting)}
                            file.writelines(json.dumps({**one, **more}) + "\n" for one in results)
                else:
                    again = recorded and device == "cuda"
                    print(f"{name} failed{', tried again without CUDA graphs' if again else ''}: {why}",
                          file=sys.stderr, flush=True)  # fmt: skip
                    if again:
                        waiting.put((name, False))

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: found[name] for name in names if name in found}


def load(log: Path | None, setting: Setting, rates: list[float]) -> Found:
    """Models of ``log`` that were trained at ``setting`` and every one of ``rates``."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log is not None and log.is_file() else []
    wanted = json.loads(json.dumps(asdict(setting)))
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for one in lines:
        if one.get("setting") == wanted and one["lr"] in rates:
            found.setdefault(one["model"], {})[one["lr"]] = one
    return {name: [by[rate] for rate in rates] for name, by in found.items() if len(by) == len(rates)}


# --- what is reported -------------------------------------------------------------------------------------------------


def best(results: list[dict[str, Any]]) -> dict[str, Any]:
    return max(results, key=lambda one: one["validation"])


def rows(found: Found, setting: Setting) -> Iterator[Row]:
    """Accuracy at the best rate by pairs, the mean of pairs at every rate, and the state behind it."""
    attention = best(found[PEER]) if PEER in found else None
    for place, pairs in enumerate(setting.pairs):
        what = f"accuracy, {pairs} pairs, {setting.length} tokens"
        theirs = attention["test"][place] if attention else None
        yield Row("chance", what, setting.chance, "accuracy", PEER if attention else None, theirs)
        for name, results in found.items():
            ours = best(results)
            if name != PEER or attention is None:
                label = name if not ours["late"] else f"{name} ({ours['steps']:,} of {setting.steps:,} steps)"
                yield Row(label, what, ours["test"][place], "accuracy", PEER if attention else None, theirs)
    for place, pairs in enumerate(setting.pairs):
        for name, results in found.items():
            share = best(results)["test"][place]
            low, high = wilson(round(share * setting.eval_rows * pairs), setting.eval_rows * pairs)
            for end, value in (("lower", low), ("upper", high)):
                what = f"{end} end of Wilson's 95 % interval, {pairs} pairs, {setting.length} tokens"
                yield Row(name, what, value, "accuracy")
    for name, results in found.items():
        kept = best(results)["state_bytes"] / 1024
        theirs = attention["state_bytes"] / 1024 if attention else None
        yield Row(name, f"state of a row of {setting.length} tokens, all blocks", kept, "KiB", PEER, theirs)
    for name, results in found.items():
        for one in results:
            mean = sum(one["test"]) / len(one["test"])
            yield Row(f"{name}, learning rate {one['lr']:g}", "mean accuracy by learning rate", mean, "accuracy")


def draw(found: Found, setting: Setting, figure: Figure) -> None:
    """Accuracy by pairs and by rate as tables of colour, and against the bytes of the state."""
    names = sorted(found, key=lambda name: -sum(best(found[name])["test"]))
    rates = sorted({one["lr"] for results in found.values() for one in results})
    figure.set_size_inches(18, 1.8 + max(0.27 * len(names), 3.2))
    figure.set_facecolor("white")
    left, middle, right, below = figure.subplots(1, 4, width_ratios=[1.0, 1.0, 1.7, 1.5])
    by_pairs = [best(found[name])["test"] for name in names]
    at = {name: {one["lr"]: sum(one["test"]) / len(one["test"]) for one in found[name]} for name in names}
    by_rate = [[at[name].get(rate, float("nan")) for rate in rates] for name in names]
    for axis, values, columns, title in (
        (left, by_pairs, [str(pairs) for pairs in setting.pairs], "accuracy by pairs, best rate"),
        (middle, by_rate, [f"{rate:g}" for rate in rates], "mean accuracy by learning rate"),
    ):
        axis.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=1.15)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if value > 0.7 else "#14191f")  # fmt: skip
        axis.set_xticks(range(len(columns)), columns, fontsize=8)
        axis.set_yticks(range(len(names)), names if axis is left else [], fontsize=8.5)
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.tick_params(length=0)
    colours = {"attention": "#14191f", "linear": "#1767b3", "hybrid": "#c2410c"}
    asked = setting.eval_rows * setting.pairs[-1]
    for number, name in enumerate(names):
        result = best(found[name])
        colour = colours["hybrid" if "+" in name else "attention" if name.startswith("Attention") else "linear"]
        x, y = result["state_bytes"] / 1024, result["test"][-1]
        low, high = wilson(round(y * asked), asked)
        right.vlines(x, low, high, color=colour, linewidth=1.2)
        right.scatter(x, y, color=colour, s=22, zorder=3)
        # A stair of names where several are as good; below stands the chance line.
        near = sum(abs(best(found[other])["test"][-1] - y) < 0.03 for other in names[:number])
        up = 5 + 9 * near if y < 0.5 else -10 - 9 * near
        side, across = ("right", -4) if x > 64 else ("left", 4)
        right.annotate(name, (x, y), xytext=(across, up), textcoords="offset points", ha=side, fontsize=7, color=colour)
    for kind, colour in colours.items():
        right.scatter([], [], color=colour, s=22, label=kind)
    right.legend(fontsize=7, frameon=False, loc="center left", title="bars: Wilson's 95 %", title_fontsize=7)
    right.axhline(setting.chance, color="#5d6772", linewidth=0.8, linestyle="--")
    right.annotate("chance", (0.01, setting.chance), xycoords=("axes fraction", "data"), ha="left", va="top",
                   fontsize=7.5, color="#5d6772")  # fmt: skip
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.margins(x=0.22)
    right.set_ylim(-0.05, 1.08)
    right.set_title(f"accuracy at {setting.pairs[-1]} pairs against KiB of state, all blocks", fontsize=9.5, loc="left")
    right.grid(color="#e4e7ea", linewidth=0.7)
    every = max(1, setting.steps // 20)  # steps between two points of a curve
    for name in names[:6] + names[6:][-2:]:
        curve = best(found[name])["curve"]
        below.plot([every * (place + 1) for place in range(len(curve))], curve, linewidth=1.4, label=name)
    below.axhline(setting.chance, color="#5d6772", linewidth=0.8, linestyle="--")
    if setting.lesson:
        below.axvline(setting.lesson, color="#5d6772", linewidth=0.8, linestyle=":")
        below.annotate("short rows until here ", (setting.lesson, 1.03), ha="right", fontsize=7, color="#5d6772")
    below.set_ylim(-0.05, 1.08)
    below.set_title("validation accuracy by step, best rate" + (", 6 best and 2 last" if len(names) > 8 else ""),
                    fontsize=9.5, loc="left")  # fmt: skip
    below.grid(color="#e4e7ea", linewidth=0.7)
    below.legend(fontsize=7, frameon=False)
    for axis in (left, middle, right, below):
        for side in ("top", "right", "bottom", "left"):
            axis.spines[side].set_visible(axis in (right, below) and side in ("bottom", "left"))
    figure.suptitle(
        f"Multi-query associative recall: rows of {setting.length} tokens, width {setting.width}, "
        f"at most {setting.steps:,} steps of {setting.batch_size} rows",
        fontsize=12, fontweight="bold", x=0.01, ha="left",
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: [part.strip() for part in text.split(";")],
                        help="models, separated by ;")  # fmt: skip
    parser.add_argument(
        "--small",
        action="store_true",
        help="for a CPU: 12 rows a step, one learning rate, a lesson on short rows first, seven models; 1 to 4 minutes "
        "of a core for a model of two blocks; a result of its own",
    )
    parser.add_argument("--minutes", type=float, default=30, help="for all models together")
    # A recorded step needs little of a core, but all of the GPU's attention: more processes than cores are welcome.
    at_once = len(os.sched_getaffinity(0)) * (2 if torch.cuda.is_available() else 1)
    parser.add_argument("--jobs", type=int, default=at_once, help=f"processes at once ({at_once})")
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2", help="learning rates")
    parser.add_argument("--pairs", default="4,16,64", help="of key and value in a row")
    for name in ("length", "vocab_size", "width", "batch_size", "steps", "eval_rows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Setting, name))
    parser.add_argument("--lesson", type=int, default=0, help="first steps, on rows of a quarter of the length")
    parser.add_argument("--precision", choices=("bf16", "float32"), help="bf16 on a GPU, where nothing is said")
    parser.add_argument("--no-graph", action="store_true", help="launch every kernel, without CUDA graphs")
    parser.add_argument("--log", type=Path, help="append every result, one JSON a line")
    parser.add_argument("--list", action="store_true", help="name the models and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if parser.parse_known_args()[0].small:
        parser.set_defaults(**SMALL)
    return parser.parse_args()


def _main() -> None:
    given = _arguments()
    if given.child:
        return _child(json.loads(given.child))
    known = list(models())
    if given.list:
        return print("\n".join(known))
    names = given.only or (SMALL_MODELS if given.small else known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no model is named {unknown[0]!r}; there are: {'; '.join(known)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(
        tuple(int(pairs) for pairs in given.pairs.split(",")), given.length, given.vocab_size, given.width,
        given.batch_size, given.steps, eval_rows=given.eval_rows, lesson=given.lesson,
        bf16=given.precision == "bf16" or (given.precision is None and device == "cuda"),
    )  # fmt: skip
    # The deepest first: they take longest.
    names = sorted(names, key=lambda name: -len(models()[name][0]))
    rates = [float(rate) for rate in given.rates.split(",")]
    found = gather(names, setting, rates, device, given.jobs, given.minutes, not given.no_graph, given.log)
    name = "mqar_small" if given.small else "mqar"
    main(name, rows(found, setting), lambda _, figure: draw(found, setting, figure), script="mqar")


if __name__ == "__main__":
    _main()
