"""The contract matrix: every mixer against every law of tests/test_mixers.py, as a table and a picture.

The laws are written once, as tests. This runs pytest on them here and sets what it reports in a matrix: a row for each
mixer and variant in ``MIXERS``, a column for each law, in a cell how many tests passed. Empty cells are laws that do
not apply: a mixer that sees both sides has no future to hide and no state to carry. Status 1 if any test failed.

    seqlong bench contract                     about 3 minutes of one core, then as long again for the compiler
    seqlong bench contract --no-compile        leaves torch.compile out
    seqlong bench contract --only "mamba2 or kda"      what pytest's -k selects; prints, and writes no files
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[1]
TESTS = CLONE / "tests" / "test_mixers.py"
#: A test of tests/test_mixers.py -> the law that it holds mixers to, as short as a heading.
LAWS = {
    "test_no_token_sees_a_later_one": "causal",
    "test_the_future_has_no_gradient_even_when_it_is_nan": "future: no gradient",
    "test_a_mixer_that_sees_both_sides_does": "both sides seen",
    "test_split_anywhere_with_the_state_carried_is_the_whole": "split = whole",
    "test_one_token_at_a_time_is_the_whole": "decode = whole",
    "test_gradients_flow_through_the_carried_state": "state: gradient",
    "test_packed_segments_are_as_if_separate": "packing",
    "test_what_stands_in_padding_changes_nothing": "padding",
    "test_packed_rows_split_anywhere_are_the_whole": "packed, split",
    "test_a_row_goes_on_after_a_window_that_ended_in_padding": "goes on after padding",
    "test_a_row_that_is_not_kept_starts_afresh": "fresh rows",
    "test_gradients_agree_with_the_reference": "gradients = float64 loop",
    "test_bfloat16_stays_near_float64": "bfloat16",
    "test_no_state_in_none_out_and_zero_length_windows": "no state, no tokens",
    "test_state_dict_is_strict_and_complete": "state dict",
    "test_checkpointing_changes_memory_only": "checkpointing",
    "test_every_block_compiles": "torch.compile",
}
COMPILED = "test_every_block_compiles"
Cells = dict[str, dict[str, list[str]]]  # mixer -> law -> outcome of each test: passed, failed or skipped


class Collector:
    """A pytest plugin that keeps outcomes by mixer and law.

    Attributes:
        cells: outcomes of the laws.
        failed: names of all tests that failed, laws or not, each with the last line of what was said.
        others: how many tests were run that are no law for every mixer.
        mixers: names in ``MIXERS`` that were selected, in its order.
    """

    def __init__(self, show: Any = None) -> None:
        self.cells: Cells = {}
        self.failed: list[tuple[str, str]] = []
        self.others = 0
        self.mixers: list[str] = []
        self._named: dict[str, tuple[str, str | None]] = {}
        self._show = show

    def pytest_collection_finish(self, session: Any) -> None:
        order: dict[str, int] = {}
        for item in session.items:
            name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
            self._named[item.nodeid] = (item.originalname, name)
            order = order or {key: place for place, key in enumerate(item.module.MIXERS)}
        found = {name for _, name in self._named.values() if name}
        self.mixers = sorted(found, key=order.__getitem__)
        self.cells = {name: {} for name in self.mixers}
        if self._show is not None:
            self._show(0, len(self._named))

    def pytest_runtest_logreport(self, report: Any) -> None:
        bad = report.failed
        if report.when != "call" and not bad and not report.skipped:
            return
        law, name = self._named[report.nodeid]
        if bad:
            said = str(report.longreprtext).strip().splitlines()
            self.failed.append((report.nodeid.split("::")[-1], said[-1] if said else ""))
        if law == COMPILED:
            done = {value for key, value in report.user_properties if key == "compiled"}
            missing = [one for one in self.mixers if one not in done]
            for one in self.mixers:  # in their order, until one fails: those behind it were not reached
                self.cells[one][law] = ["passed" if one in done else "failed" if one == missing[0] else "skipped"]
        elif law in LAWS and name:
            self.cells[name].setdefault(law, []).append(report.outcome)
        else:
            self.others += 1
        if self._show is not None:
            self._show(1, len(self._named))


def collect(select: str | None = None, no_compile: bool = False, show: Any = None) -> Collector:
    """Run the laws in this process, before anything of seqlong is imported, so that shapes are checked as in tests.

    Args:
        select: an expression for pytest's ``-k``; all if None.
        no_compile: leave out torch.compile.
        show: told how many tests are done since the last call, and how many there are.
    """
    if not TESTS.is_file():
        sys.exit(
            f"found no {TESTS}: the laws are the tests of the repository, which are not installed. "
            "Clone it, and run `seqlong bench contract` inside the clone"
        )
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("beartype") is None:
        sys.exit("the laws are tests: they need pytest and beartype. Install them with pip install -e '.[test]'")
    import pytest

    found = Collector(show)
    words = [str(TESTS), f"--rootdir={CLONE}", "-p", "no:terminal", "-p", "no:cacheprovider",
             "-o", "addopts=--import-mode=importlib"]  # fmt: skip
    words += ["-k", select] if select else []
    words += ["--deselect", f"tests/{TESTS.name}::{COMPILED}"] if no_compile else []
    os.environ["SEQLONG_EVERY_VARIANT"] = "1"  # compile them all
    status = pytest.main(words, plugins=[found])
    if not found.mixers:
        sys.exit(f"pytest ran no law (status {int(status)}){f': nothing matches {select!r}' if select else ''}")
    return found


def rows(found: Collector) -> list[dict[str, Any]]:
    """One line of JSON for each cell that has tests: ``value`` of ``tests`` passed."""
    made = []
    for name, laws in found.cells.items():
        for law in LAWS:
            if outcomes := laws.get(law):
                counts = {what: outcomes.count(what) for what in ("passed", "failed", "skipped")}
                made.append({"name": name, "metric": LAWS[law], "value": counts["passed"], "unit": "tests passed",
                             "peer": None, "peer_value": None, "tests": len(outcomes), "failed": counts["failed"],
                             "skipped": counts["skipped"], "test": law})  # fmt: skip
    return made


def table(found: Collector) -> Any:
    """The matrix for a terminal; columns have numbers, which the caption explains."""
    from rich import box
    from rich.table import Table

    laws = [law for law in LAWS if any(law in cells for cells in found.cells.values())]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    shown.add_column("mixer", no_wrap=True)
    for number in range(1, len(laws) + 1):
        shown.add_column(str(number), justify="right", no_wrap=True)
    for name, cells in found.cells.items():
        shown.add_row(name, *(_cell(cells.get(law, [])) for law in laws))
    said = [f"{number} {LAWS[law]}" for number, law in enumerate(laws, 1)]
    shown.caption = "Tests passed. " + ", ".join(said) + ". A dot: the law does not apply."
    shown.caption_justify = "left"
    return shown


def _cell(outcomes: list[str]) -> str:
    if not outcomes:
        return "[dim]·[/dim]"
    bad = outcomes.count("failed")
    if bad:
        return f"[bold red]{bad}✗[/]"
    passed = outcomes.count("passed")
    return f"[green]{passed}[/]" if passed else "[yellow]–[/]"


def draw(found: Collector, figure: Any, said: str) -> None:
    """The matrix as a picture: green passed, red failed, yellow skipped, white does not apply."""
    laws = [law for law in LAWS if any(law in cells for cells in found.cells.values())]
    figure.set_size_inches(11.5, 1.9 + 0.185 * len(found.cells))
    figure.set_facecolor("white")
    axis = figure.subplots()
    for y, (_, cells) in enumerate(found.cells.items()):
        for x, law in enumerate(laws):
            outcomes = cells.get(law, [])
            bad, passed = outcomes.count("failed"), outcomes.count("passed")
            colour = "#f4f5f6" if not outcomes else "#c4322b" if bad else "#2f8f57" if passed else "#d9a400"
            axis.barh(y, 0.94, height=0.88, left=x - 0.47, color=colour)
            text = f"{bad} failed" if bad else str(passed) if passed else "not run" if outcomes else ""
            axis.text(x, y, text, ha="center", va="center", fontsize=6.5, color="white")
    axis.set_yticks(range(len(found.cells)), list(found.cells), fontsize=7.5)
    axis.set_xticks(range(len(laws)), [LAWS[law] for law in laws], fontsize=8, rotation=40, ha="left")
    axis.xaxis.tick_top()
    axis.set_xlim(-0.5, len(laws) - 0.5)
    axis.set_ylim(len(found.cells) - 0.5, -0.5)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.suptitle(said, fontsize=11, fontweight="bold", x=0.01, ha="left")


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="an expression for pytest's -k, such as 'mamba2 or kda'; writes no files")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, half of the time")
    given = parser.parse_args()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(width=None if sys.stdout.isatty() else 120)
    begin = time.monotonic()
    with Progress(TextColumn("laws"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("laws", total=None)
        found = collect(given.only, given.no_compile, lambda n, total: bar.update(task, advance=n, total=total))
    lines = rows(found)
    passed, failed = sum(line["value"] for line in lines), len(found.failed)
    said = (
        f"Contract: {len(found.cells)} mixers and variants, {len({line['metric'] for line in lines})} laws, "
        f"{passed:,} tests passed, {failed} failed"
    )
    console.print(table(found))
    for name, why in found.failed:
        console.print(f"failed: {name}: {why}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{said}; {found.others} further tests of single mixers, {time.monotonic() - begin:.0f} s")
    if given.only is None:
        _write(found, lines, said, console)
    return 1 if failed else 0


def _write(found: Collector, lines: list[dict[str, Any]], said: str, console: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from seqlong import runs
    from seqlong.bench import benchmarks_folder, versions

    revision = runs.commit()
    common = {
        "command": shlex.join(["seqlong", "bench", "contract", *sys.argv[1:]]),
        "commit": f"{revision['commit']}{'-dirty' if revision['dirty'] else ''}" if revision["commit"] else None,
        "device": "cpu",
        "versions": versions(["pytest"]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = benchmarks_folder() / "results" / "contract-cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, [{**line, **common} for line in lines])
    figure = Figure(layout="constrained", dpi=150)
    draw(found, figure, said)
    FigureCanvasAgg(figure).print_png(str(path.with_suffix(".png")))
    console.print(f"{path}\n{path.with_suffix('.png')}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(_main())
