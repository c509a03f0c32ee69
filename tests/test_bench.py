"""Benchmarks: one form of result, honest ratios, a clear word where there is nothing to run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

import seqlong
from seqlong import bench
from seqlong.bench import Row
from seqlong.errors import SeqlongError
from seqlong.kernels import tuning

FIELDS = ["name", "metric", "value", "unit", "peer", "peer_value", "command", "commit", "device", "versions", "date"]
ROWS = [
    Row("small", "forward", 1.0, "s", "numpy loop", 3.4),
    Row("large", "forward", 10.0, "s", "numpy loop", None),
    Row("small", "peak memory", 900.0, "MiB", "numpy loop", 450.0),
    Row("small", "loading", 600, "windows/s", "numpy loop", 50.0),
]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmarks folder of our own."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    monkeypatch.setenv(bench.FOLDER_VARIABLE, str(folder))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick"])
    return folder


def script(folder: Path, name: str, body: str = "", doc: str = "What it measures.") -> None:
    (folder / f"{name}.py").write_text(f'"""{doc}\n\nMore."""\n{body}\n')


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row("a", "m", 1.0, "s", "p", 3.4), "3.40x faster"),
        (Row("a", "m", 3.4, "ms", "p", 1.0), "3.40x slower"),
        (Row("a", "m", 600.0, "windows/s", "p", 50.0), "12x faster"),
        (Row("a", "m", 50.0, "tokens/s", "p", 100.0), "2.00x slower"),
        (Row("a", "m", 450.0, "MiB", "p", 900.0), "2.00x less"),
        (Row("a", "m", 900.0, "MiB", "p", 450.0), "2.00x more"),
        (Row("a", "m", 1.9, "bits", "p", 2.0), "1.05x better"),
        (Row("a", "m", 0.9, "accuracy", "p", 0.6), "1.50x better"),
        (Row("a", "m", 0.6, "accuracy", "p", 0.9), "1.50x worse"),
        (Row("a", "m", 1.0, "s", "p", 1.004), "equal"),
        (Row("a", "m", 1.0, "s"), "–"),
        (Row("a", "m", 1.0, "s", "p", None), "–"),
        (Row("a", "m", 0.0, "s", "p", 1.0), "–"),
    ],
)
def test_a_ratio_says_which_way_it_goes(row: Row, said: str) -> None:
    assert bench.verdict(row) == said


def test_main_writes_the_agreed_fields_and_a_chart(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.main("speed", iter(ROWS), on="cpu")
    saved = json.loads(path.read_text())
    assert path.parent == clone / "results" and path.name == f"speed-{bench.device_slug('cpu')}.json"
    assert [list(row) for row in saved] == [FIELDS] * len(ROWS)
    assert [row["value"] for row in saved] == [1.0, 10.0, 900.0, 600]
    assert saved[1]["peer_value"] is None
    assert saved[0]["command"] == "seqlong bench speed --quick"
    assert {"python", "torch", "seqlong", "numpy"} <= set(saved[0]["versions"]), "a peer's version is recorded"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "3.40x faster" in shown and "2.00x more" in shown and "12x faster" in shown and "against numpy loop" in shown


def test_main_measures_row_by_row_and_draws_as_told(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn: list[list[Row]] = []

    def rows():  # type: ignore[no-untyped-def]
        yield ROWS[0]
        assert "small, forward: 1 s" in capsys.readouterr().out, "a row is named as soon as it is measured"
        yield ROWS[2]

    bench.main("speed", rows(), lambda given, figure: drawn.append(given), on="cpu")
    assert drawn == [[ROWS[0], ROWS[2]]]


def test_no_rows_or_a_value_that_is_no_number_is_an_error(clone: Path) -> None:
    with pytest.raises(SeqlongError, match="speed gave no rows"):
        bench.main("speed", [])
    with pytest.raises(SeqlongError, match="small, forward measured nan s; expected a finite number"):
        bench.main("speed", [Row("small", "forward", float("nan"), "s")])
    assert not (clone / "results").exists()


def test_bars_show_the_ratio_and_on_a_cpu_are_drawn_against_the_peer() -> None:
    for device, first_bar in (("cpu-2core", 2.0), ("h100", 900.0)):
        figure = Figure()
        bench.draw_bars(ROWS, figure, "speed", device)
        assert len(figure.axes) == 3, "one panel a metric and unit"
        figure.draw_without_rendering()
        memory = figure.axes[1]
        assert memory.patches[0].get_width() == pytest.approx(first_bar)
        words = [label.get_text() for label in memory.texts]
        assert "  2.00x more" in words and "900 MiB" in words and "numpy loop: 450 MiB" in words
        assert figure.axes[0].patches[0].get_width() == 1.0, "a panel with a row that has no peer stays absolute"


def test_the_table_puts_the_ratio_first_on_a_cpu_only(clone: Path) -> None:
    saved = json.loads(bench.main("speed", ROWS, on="cpu").read_text())
    headings = {
        device: [column.header for column in bench.table([row | {"device": device} for row in saved]).columns]
        for device in ("cpu-2core", "h100")
    }
    assert headings["cpu-2core"][1] == "Against the peer" and headings["h100"][-1] == "Against the peer"


def test_list_names_what_each_measures_and_its_last_result(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(clone, "speed")
    script(clone, "speed-long", doc="The long one.")
    script(clone, "_helper")
    (clone / "broken.py").write_text("def (")
    bench.main("speed", ROWS, on="cpu")
    bench.main("speed-long", ROWS[1:2], on="cpu")
    (clone / "results" / "broken-h100.json").write_text("{")
    capsys.readouterr()
    assert bench.command([]) == 0
    shown = capsys.readouterr().out
    assert "What it measures." in shown and "_helper" not in shown and "More." not in shown
    assert "4 rows; small: 3.40x faster" in shown and re.search(r": 1 row\s*$", shown, flags=re.MULTILINE)
    assert len(re.findall(r"\b1 row\b", shown)) == 1, "results of speed-long are not those of speed"
    assert "does not parse (line 1)" in shown and "broken-h100.json cannot be read" in shown


def test_an_empty_folder_says_where_to_put_one(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.command([]) == 0
    assert "none yet" in capsys.readouterr().out


def test_command_runs_a_script_with_its_arguments_and_returns_its_status(clone: Path) -> None:
    script(
        clone,
        "speed",
        "import sys, pathlib; pathlib.Path(__file__).with_suffix('.log').write_text(repr(sys.argv[1:])); sys.exit(3)",
    )
    assert bench.command(["speed", "--length", "8"]) == 3
    assert (clone / "speed.log").read_text() == "['--length', '8']"
    assert bench.command(["speed.py"]) == 3


def test_a_script_writes_where_the_command_looks(clone: Path) -> None:
    body = "from seqlong.bench import Row, main\nmain('speed', [Row('a', 'm', 1.0, 's', 'numpy', 2.0)], on='cpu')"
    script(clone, "speed", body)
    done = subprocess.run(
        [sys.executable, str(clone / "speed.py")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((clone / "results").glob("speed-cpu-*.json"))) == 1 and "2.00x faster" in done.stdout


def test_an_unknown_name_gets_the_nearest(clone: Path) -> None:
    script(clone, "mamba2")
    with pytest.raises(SeqlongError, match=r"no benchmark is named 'mamab2'; did you mean 'mamba2'\?"):
        bench.command(["mamab2"])
    with pytest.raises(SeqlongError, match="'xyz'; there are: mamba2"):
        bench.command(["xyz"])


def test_without_the_repository_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after pip install without a clone."""
    monkeypatch.delenv(bench.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(seqlong, "__file__", str(tmp_path / "site-packages" / "seqlong" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SeqlongError, match="part of the repository, not of the installed package: clone it"):
        bench.command([])
    (tmp_path / "benchmarks").mkdir()
    assert bench.benchmarks_folder() == tmp_path / "benchmarks", "inside a clone it is found"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("AMD Instinct MI300X", "instinct-mi300x"),
        ("NVIDIA L4", "l4"),
        ("Something", "something"),
    ],
)
def test_a_device_has_a_short_name(name: str, slug: str) -> None:
    assert tuning.gpu_slug(name) == slug


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.00123, "0.00123"), (1.23456, "1.235"), (123.456, "123.5"), (1312.4, "1,312"), (312_345.0, "312 k")],
)
def test_values_have_few_digits(value: float, shown: str) -> None:
    assert bench.format_value(value) == shown


def test_names_with_brackets_are_printed_as_they_are(clone: Path) -> None:
    saved = json.loads(bench.main("speed", [Row("x [bold]y", "m [red]", 1.0, "s", "p [b]", 2.0)], on="cpu").read_text())
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench.table(saved))
    shown = console.export_text()
    assert "x [bold]y" in shown and "m [red]" in shown and "p [b]" in shown
