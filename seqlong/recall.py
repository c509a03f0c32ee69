"""``seqlong recall``: ask a trained model the tasks of the recall suite, or tell the best of a sweep."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from seqlong import runs
from seqlong.callbacks.checkpoints import CONFIG_KEY, read_checkpoint
from seqlong.callbacks.recall_tally import wilson
from seqlong.cli import split
from seqlong.compose import compose, dump, is_override, to_house
from seqlong.config_files import options, summary
from seqlong.errors import CheckpointError, ConfigError, SeqlongError, nearest

HELP = """ask a trained model what it remembers, or tell the best of a sweep

  seqlong recall                                          the tasks there are
  seqlong recall runs/my-run passkey needle               ask the model of a run (its best checkpoint, or a .ckpt file)
  seqlong recall runs/my-run needle 'data.eval_lengths=[4096,32768]' data.generator.init_args.haystack=my.txt
  seqlong recall runs/sweep-...                           accuracy of each job of a sweep, and the best learning rate
  seqlong recall runs/recall-mqar-... runs/recall-...     the same of several runs

A task of its own is trained with seqlong fit experiment=recall/<task>."""
_GROUP = "recall/"


def command(words: Sequence[str]) -> int:
    """Serve the verb; returns the exit status."""
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    overrides, flags = split([word for word in words if is_override(word) or word.startswith("-")])
    plain = [word for word in words if not is_override(word) and not word.startswith("-")]
    if not plain:
        _list()
        return 0
    places = [word for word in plain if Path(word).exists()]
    named = [word.removeprefix(_GROUP) for word in plain if word not in places]
    if unknown := [name for name in named if name not in _tasks()]:
        raise ConfigError(
            f"'{unknown[0]}' is neither a file or folder, nor a recall task{nearest(unknown[0], _tasks()) or '.'} "
            f"There are: {', '.join(_tasks())}"
        )
    if named:
        if len(places) != 1:
            raise ConfigError(f"found {len(places)} checkpoints or runs, expected one: seqlong recall RUN {named[0]}")
        return ask(_checkpoint(Path(places[0])), named, overrides, flags)
    if files := [place for place in places if Path(place).is_file()]:
        raise ConfigError(f"{files[0]}: name the tasks to ask it, such as passkey; seqlong recall lists them")
    return compare([Path(place) for place in places])


def _tasks() -> list[str]:
    return [name.removeprefix(_GROUP) for name in options("experiment") if name.startswith(_GROUP)]


def _list() -> None:
    widest = max(map(len, _tasks()))
    for name in _tasks():
        print(f"  {name:<{widest}}  {summary('experiment', _GROUP + name)}")
    print("\ntrain on one: seqlong fit experiment=recall/<task>     ask a trained model: seqlong recall RUN TASK ...")


# --- ask a trained model ----------------------------------------------------------------------------------------------


def _checkpoint(path: Path) -> Path:
    """A checkpoint file; of a run its best one, or its last where it was never validated."""
    if path.is_file():
        return path
    last = path / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise CheckpointError(f"{path} has no checkpoints/last.ckpt; expected a run that was trained, or a .ckpt file")
    return next(iter((path / "checkpoints").glob("best-*.ckpt")), last)


def ask(checkpoint: Path, tasks: Sequence[str], overrides: Sequence[str], flags: Sequence[str] = ()) -> int:
    """Evaluate a checkpoint on recall tasks, one run folder each, with the model that the checkpoint holds.

    Raises:
        CheckpointError: the checkpoint holds no configuration.
    """
    from seqlong.launch import launch
    from seqlong.report import write_report

    stored = read_checkpoint(checkpoint, weights=False).get(CONFIG_KEY)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{checkpoint} holds no configuration, so its model is not known")
    model = to_house(stored)
    worst, lines = 0, []
    for task in tasks:
        composed = compose([f"experiment={_GROUP}{task}", *overrides])
        house = {**composed.house, "model": model["model"], "task": model["task"]}
        run = house.get("run") or {}
        composed.house.update(house)
        folder = runs.create(run.get("root", "runs"), f"recall-{task}-test", run.get("dir"))
        config = composed.lightning
        config["run"] = {**run, "name": f"recall-{task}", "dir": str(folder)}
        with tempfile.TemporaryDirectory(prefix="seqlong-") as temporary:
            path = Path(temporary) / "config.yaml"
            path.write_text(dump(config))
            status = launch("test", [], [f"--config={path}", f"--ckpt_path={checkpoint}", *flags])
        worst = worst or status
        found = runs.read_json(folder / "recall.json")
        if found:
            lines += [(task, found, line) for line in found["accuracy"]]
            write_report(folder)
    table = Table("task", "length", "items", "right", "95 % interval", "answers", "chance", "state, bytes")
    for task, found, line in lines:
        table.add_row(task, f"{line['length']:,}", f"{line['items']:,}", *_shares(line), _percent(found["chance"]),
                      _whole(line["state_bytes"]))  # fmt: skip
    Console().print(table)
    return worst


# --- the best of a sweep ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        folder: of the run.
        settings: what distinguishes it, but for the learning rate.
        rate: the learning rate.
        right: answers that are right, of all lengths and items.
        answers: all answers.
        found: recall.json.
    """

    folder: Path
    settings: str
    rate: float
    right: int
    answers: int
    found: dict[str, Any]

    @property
    def share(self) -> float:
        """Accuracy over all answers."""
        return self.right / self.answers


def compare(folders: Sequence[Path]) -> int:
    """Print the accuracy of runs: a line for each setting at its best learning rate, and the curve over the rates.

    Writes recall-rates.json and recall-rates.png into the first folder.

    Raises:
        SeqlongError: none of the folders holds a run that was evaluated on a recall task.
    """
    found = [result for folder in folders for result in _results(folder)]
    if not found:
        raise SeqlongError(
            f"{', '.join(map(str, folders))}: no recall.json. Expected runs of seqlong fit experiment=recall/..., or a "
            "sweep of such runs"
        )
    groups: dict[str, list[Result]] = {}
    for result in found:
        groups.setdefault(result.settings, []).append(result)
    ordered = sorted(groups.items(), key=lambda item: -max(one.share for one in item[1]))
    columns = ("settings", "best lr", "right", "95 % interval", "answers", "chance", "state, bytes", "parameters")
    table = Table(*columns, "every lr: % right", "run of the best")
    content = []
    for settings, results in ordered:
        best = max(results, key=lambda one: one.share)
        low, high = wilson(best.right, best.answers)
        line = {"accuracy": best.share, "low": low, "high": high, "answers": best.answers}
        state = max(((one["length"], one["state_bytes"]) for one in best.found["accuracy"]), default=(0, None))[1]
        curve = {one.rate: one.share for one in sorted(results, key=lambda one: one.rate)}
        table.add_row(settings, f"{best.rate:g}", *_shares(line), _percent(best.found["chance"]), _whole(state),
                      _whole(best.found["parameters"]), "  ".join(f"{r:g}: {100 * s:.1f}" for r, s in curve.items()),
                      best.folder.name)  # fmt: skip
        content.append({"settings": settings, "best_lr": best.rate, **line, "chance": best.found["chance"],
                        "state_bytes": state, "parameters": best.found["parameters"], "seed": best.found["seed"],
                        "tokens_seen": best.found["tokens_seen"], "by_length": best.found["accuracy"],
                        "every_lr": [{"lr": rate, "accuracy": share} for rate, share in curve.items()],
                        "run": str(best.folder)})  # fmt: skip
    Console().print(table)
    edge = [one["settings"] for one in content if len(one["every_lr"]) > 1 and one["best_lr"] in _ends(one["every_lr"])]
    if edge:
        print(f"the best learning rate is the smallest or the largest tried of: {'; '.join(edge)}. Try more")
    runs.write_json(folders[0] / "recall-rates.json", content)
    _draw(content, folders[0] / "recall-rates.png")
    print(folders[0] / "recall-rates.png")
    return 0


def _ends(curve: list[dict[str, float]]) -> tuple[float, float]:
    return curve[0]["lr"], curve[-1]["lr"]


def _results(folder: Path) -> list[Result]:
    sweep = runs.read_json(folder / "sweep.json", {}) or {}
    jobs = {folder / job["folder"]: job["settings"] for job in sweep.get("jobs", [])} or {folder: None}
    results = []
    for run, varied in jobs.items():
        found = runs.read_json(run / "recall.json")
        if not found:
            continue
        right = sum(line["right"] for line in found["accuracy"])
        answers = sum(line["answers"] for line in found["accuracy"])
        kept = None if varied is None else [word for word in varied if not word.split("=")[0].endswith("optimizer.lr")]
        settings = "\n".join(kept) if kept else _model(run, found)
        results.append(Result(run, settings, float(found.get("lr") or 0.0), right, answers, found))
    return results


def _model(run: Path, found: dict[str, Any]) -> str:
    """The mixers of a run's model, and its task."""
    path = run / "config.yaml"
    house = to_house(yaml.safe_load(path.read_text())) if path.is_file() else {}
    backbone = (house.get("model") or {}).get("backbone") or {}
    mixers = backbone.get("mixers") or {}
    pattern = str(backbone.get("pattern", ""))
    names = [str(mixers[letter].get("class_path", "?")).rpartition(".")[2] for letter in mixers if letter in pattern]
    return f"{found.get('task')}: {' + '.join(names) or 'model'} ({pattern}, width {backbone.get('d_model', '?')})"


def _draw(content: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the learning rates, and against the bytes of the state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, one in enumerate(content):
        colour = f"C{number % 10}"
        label = one["settings"].replace("\n", ", ")
        rates = [point["lr"] for point in one["every_lr"]]
        left.plot(rates, [100 * point["accuracy"] for point in one["every_lr"]], "o-", color=colour, label=label)
        if one["state_bytes"]:
            x, y = one["state_bytes"] / 1024, 100 * one["accuracy"]
            right.plot([x, x], [100 * one["low"], 100 * one["high"]], color=colour)
            right.plot([x], [y], "o", color=colour)
            right.annotate(label[-40:], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=colour)
    chances = {one["chance"] for one in content if isinstance(one["chance"], float)}
    for axis, title, name in (
        (left, "% right by learning rate; dashed: chance", "learning rate"),
        (right, "% right at the best rate, and the state of the longest row", "KiB of state, all blocks"),
    ):
        axis.set_xscale("log")
        axis.set_ylim(-3, 104)
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.set_xlabel(name, fontsize=9)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(color="#e4e7ea", linewidth=0.7)
        for chance in chances:
            axis.axhline(100 * chance, color="#5d6772", linewidth=0.9, linestyle="--")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    rates = sorted({point["lr"] for one in content for point in one["every_lr"]})
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.margins(x=0.5)
    left.legend(fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=130)


def _shares(line: dict[str, Any]) -> tuple[str, str, str]:
    span = f"{100 * line['low']:.1f} to {100 * line['high']:.1f}"
    return f"{100 * line['accuracy']:.1f} %", span, f"{line['answers']:,}"


def _percent(chance: float | None) -> str:
    return "" if chance is None else f"{100 * chance:.2g} %"


def _whole(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
