"""The report of a run: whatever state the folder is in, one honest page that needs nothing beside it."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from seqlong.errors import SeqlongError
from seqlong.report import plots, sections, text, words, write_report
from seqlong.report.record import RunRecord, Series, read_run

STARTED = 1_800_000_000.0
RUN = {
    "name": "demo",
    "command": "seqlong fit experiment=dna/demo",
    "commit": "0123456789abcdef",
    "dirty": False,
    "started": STARTED,
    "ended": STARTED + 372,
    "status": "finished",
    "error": None,
    "host": {"cpu": "A CPU", "cores": 2, "memory_gib": 23.3, "gpu": []},
    "versions": {"seqlong": "0.1.0", "torch": "2.13.0"},
    "resumed_from": None,
}
BLOCKS = [
    {"letter": c, "mixer": {"m": "Mamba2", "a": "Attention"}[c], "ffn": "SwiGLU", "parameters": 1000} for c in "mmma"
]
MODEL = {
    "name": "Backbone",
    "parameters": 4321,
    "d_model": 64,
    "vocab_size": 16,
    "pattern": list("mmma"),
    "blocks": BLOCKS,
}
DATA = {
    "title": "E. coli K-12: 4,639,675 bases in 1 contig",
    "sources": [
        {
            "path": "ecoli.fa.gz",
            "digest": "sha256:abc",
            "contigs": 1,
            "bases": 4_639_675,
            "soft_masked": 463_967,
            "records": [{"name": "chr", "length": 4_639_675}],
        }
    ],
    "split": {
        "kind": "by blocks",
        "gap_bases": 1000,
        "regions": {"train": [["chr", 0, 4_000_000]], "validation": [["chr", 4_001_000, 4_300_000]], "test": []},
    },
    "stages": [],
    "notes": [],
}
FLOORS = [{"name": "uniform", "bits": 2.0}, {"name": "markov-6", "bits": 1.933, "order": 6}]


def rows(steps: int, first: int = 1, at: float = STARTED) -> list[str]:
    lines = []
    for step in range(first, first + steps):
        bits = 1.91 + 0.3 * math.exp(-step / 20)
        values = {
            "train/bits": bits + 0.01 * math.sin(step * 12.9898),
            "lr": 1e-3,
            "grad_norm": 0.5,
            "skipped_steps": float(step > 5),
            "throughput/tokens_per_s": 61_000,
            "memory/peak_gib": 3.1,
            "train/length": 8192,
            "train/tokens": 65_536 * step,
        }
        if step % 10 == 0:
            values["val/bits"] = bits
        lines += [f"{at + step},{step},{name},{value}" for name, value in values.items()]
    return lines


def folder(path: Path, lines: list[str] | None = None, *, tail: str = "\n", **files: object) -> Path:
    """A run folder; ``files`` replace the usual contents of run, model, data and floors; None leaves one out."""
    path.mkdir(exist_ok=True)
    for name, content in ({"run": RUN, "model": MODEL, "data": DATA, "floors": FLOORS} | files).items():
        if content is not None:
            (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (path / "config.yaml").write_text("trainer:\n  max_steps: 100\n")
    if lines is not None:
        (path / "metrics.csv").write_text("\n".join(["time,step,name,value", *lines]) + tail)
    return path


def page(path: Path) -> str:
    return write_report(path).read_text(encoding="utf-8")


def words_of(document: str) -> str:
    """The text that a reader sees, white space folded."""
    shown = re.sub(r"<style>.*?</style>", "", document, flags=re.DOTALL)
    for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#x27;", "'"), ("&amp;", "&")):
        shown = (
            re.sub(r"<[^>]*>", " ", shown).replace(entity, letter)
            if entity == "&lt;"
            else shown.replace(entity, letter)
        )
    return re.sub(r"\s+", " ", shown)


class Balance(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_a_finished_run_says_what_how_and_how_well(tmp_path: Path) -> None:
    shown = words_of(page(folder(tmp_path / "r", rows(100))))
    best = 1.91 + 0.3 * math.exp(-5)
    assert "Finished" in shown and "demo" in shown
    assert (
        "A 4,321 parameter hybrid of Mamba2 and Attention trained on E. coli K-12 for 100 steps (6.55 million bases)."
        in shown
    )
    assert f"{best:.3f} bits per base, best validation, at step 100" in shown
    assert f"{2 - best:.3f} below the uniform floor (2.000), where every base is a guess." in shown
    assert f"{1.933 - best:.3f} below the order-6 Markov model (1.933): more than short words explain." in shown
    assert "2.000 uniform" in shown and "1.933 Markov, order 6" in shown, "the lines of the chart are named"
    for fact in ("6 min 12 s", "61 k/s", "3.10 GiB", "8,192", "1.6 training passes", "1 step skipped for a non-finite"):
        assert fact in shown
    for fact in (
        "4,639,675",
        "sha256:abc",
        "Split by blocks: gap bases 1,000.",
        "4,000,000",
        "93.0 %",
        "10.0 %",
        "4.64 Mb",
    ):
        assert fact in shown
    for fact in (
        "seqlong fit experiment=dna/demo",
        "0123456789ab",
        "A CPU, 2 cores, 23.3 GiB of memory",
        "torch 2.13.0",
    ):
        assert fact in shown
    assert "max_steps" in shown


STATES = {
    "finished": {"lines": rows(100)},
    "three_steps": {"lines": rows(3), "run": RUN | {"status": "stopped"}},
    "one_step": {"lines": rows(1)},
    "no_steps": {"lines": []},
    "no_metrics": {"run": RUN | {"status": "failed", "error": "DataError: my.fa:3: found 'Z'"}},
    "only_run": {"model": None, "data": None, "floors": None},
    "only_metrics": {"lines": rows(40), "run": None, "model": None, "data": None, "floors": None},
    "killed": {"lines": rows(50), "tail": "\n1800000051,51,val/bi", "run": RUN | {"status": "running", "ended": None}},
    "not_finite": {"lines": [*rows(50), "1800000060,60,train/bits,nan", "1800000060,60,grad_norm,inf"]},
    "all_not_finite": {
        "lines": [f"{STARTED},{step},{name},nan" for step in range(60) for name in ("train/bits", "val/bits", "lr")]
    },
    "long": {"lines": rows(4000), "floors": [*FLOORS, {"name": "markov-2", "bits": 1.95, "order": 2}]},
    "torn_json": {"lines": rows(20), "model": '{"name": "Back', "data": "[1, 2]"},
    "hostile_types": {
        "lines": rows(20),
        "run": {"status": 3, "started": "yesterday", "host": "here", "versions": [], "history": 4},
        "model": {"blocks": 7, "parameters": "many", "head": ["x"]},
        "data": {"sources": [3], "split": {"train": "a.fa"}, "stages": [{"length": 8, "steps": None}], "title": None},
        "floors": {"uniform": 2},
    },
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_gives_one_sound_file(state: str, tmp_path: Path) -> None:
    """Balanced HTML, nothing loaded from anywhere, no script, small; the charts are well-formed XML."""
    path = folder(tmp_path / "run", **STATES[state])  # type: ignore[arg-type]
    document = page(path)
    parser = Balance()
    parser.feed(document)
    assert parser.open == []
    for tag, attributes in parser.seen:
        assert tag not in {"script", "link", "iframe", "object", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "href"} and (name != "xlink:href" or str(value).startswith("#"))
    assert "url(http" not in document and "@import" not in document
    for drawing in re.findall(r"<svg role.*?</svg>", document, flags=re.DOTALL):
        ElementTree.fromstring(drawing if "xmlns=" in drawing else drawing.replace("<svg", '<svg xmlns="http://x"', 1))
    assert len(document) < 1_000_000
    assert sorted(entry.name for entry in path.iterdir() if entry.suffix in {".tmp", ".html"}) == ["report.html"]


def test_a_crash_shows_its_message_and_where(tmp_path: Path) -> None:
    run = RUN | {"status": "failed", "error": "TrainingError: gradient of blocks.3 <not> finite"}
    document = page(folder(tmp_path / "r", rows(50), run=run))
    assert "The run failed at step 50 TrainingError: gradient of blocks.3 <not> finite" in words_of(document)
    assert "50 of 100 planned" in words_of(document)
    before = words_of(page(folder(tmp_path / "s", None, run=run)))
    assert "The run failed before the first logged step" in before and "No loss was logged" in before


def test_a_killed_run_says_that_it_had_not_finished(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "r", rows(50), tail="\n1800000051,51,val/bi", run=RUN | {"status": "running", "ended": None}
    )
    shown = words_of(page(path))
    assert (
        "Not finished" in shown
        and "had not finished when this was written; last entry 15 January 2027, 08:00 UTC" in shown
    )
    assert "the last line is torn" in shown


def test_nothing_from_the_files_becomes_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    blocks = [{"letter": evil, "mixer": evil, "ffn": evil, "parameters": 3}]
    split = {evil: [[evil, 0, 5]]}
    path = folder(
        tmp_path / "r",
        [f"{STARTED},1,{name},1.5" for name in ("train/bits", "<script>alert(1)</script>")],
        run=dict.fromkeys(RUN, evil) | {"versions": {evil: evil}, "history": [{"status": evil, "error": evil}]},
        model={"name": evil, "blocks": blocks, "head": evil, "task": evil},
        data={"title": evil, "notes": [evil], "sources": [{"path": evil, "digest": evil}], "split": split},
        floors=[{"name": evil, "bits": 2.0}],
    )
    (path / "config.yaml").write_text(f"{evil}: {evil}\n# {evil}\nkey: {evil}\n")
    document = page(path)
    assert "<script" not in document and "<img" not in document
    assert document.count("&lt;script&gt;") > 15


def test_resumed_steps_replace_the_abandoned_ones(tmp_path: Path) -> None:
    """100 steps, then killed and continued from 60: the first course beyond 60 is no longer part of the run."""
    lines = rows(100) + [f"{STARTED + 1000 + step},{step},train/bits,5.0" for step in range(61, 81)]
    record = read_run(folder(tmp_path / "r", lines))
    series = record.series("train/bits")
    assert series.step == list(range(1, 81))
    assert set(series.value[60:]) == {5.0} and max(series.value[:60]) < 3
    assert series.time == sorted(series.time)


def test_order_in_the_file_does_not_decide_which_duplicate_wins(tmp_path: Path) -> None:
    record = read_run(folder(tmp_path / "r", [f"{STARTED + 9},1,lr,2.0", f"{STARTED},1,lr,1.0"]))
    assert record.series("lr").value == [2.0]


def test_a_torn_last_line_is_left_out_even_if_it_parses(tmp_path: Path) -> None:
    """``...,val/bits,1.9`` may be the beginning of 1.987."""
    record = read_run(folder(tmp_path / "r", [*rows(2), f"{STARTED},3,train/bits,1.9"], tail=""))
    assert record.series("train/bits").step == [1, 2]
    assert any("torn" in problem for problem in record.problems)
    damaged = read_run(folder(tmp_path / "s", ["what", *rows(2), "1,2"]))
    assert damaged.problems == ["metrics.csv: 2 unreadable lines left out"]


@pytest.mark.parametrize(
    ("value", "floor", "expected"),
    [
        (
            1.9,
            plots.Floor("Markov, order 6", 1.933),
            "0.033 below the order-6 Markov model (1.933): more than short words",
        ),
        (
            1.95,
            plots.Floor("Markov, order 6", 1.933),
            "0.017 above the order-6 Markov model (1.933): counting short words",
        ),
        (1.9333, plots.Floor("Markov, order 6", 1.933), "Level with the order-6 Markov model (1.933): no better"),
        (2.0001, plots.Floor("uniform", 2.0), "Level with the uniform floor (2.000): nothing learnt"),
        (2.2, plots.Floor("uniform", 2.0), "0.200 above the uniform floor (2.000): worse than guessing"),
        (1.5, plots.Floor("gzip", 2.1), "0.600 below the gzip floor (2.100)."),
    ],
)
def test_the_distance_to_a_floor_in_words(value: float, floor: plots.Floor, expected: str) -> None:
    assert words_of(words.distance(value, floor)).strip().startswith(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.96, "order 2 (1.965)"), (1.935, "order 3 (1.953)"), (1.999, "order 0 (2.000)"), (2.1, ""), (1.92, "")],
)
def test_a_model_above_the_floor_is_told_how_far_it_came(value: float, expected: str) -> None:
    floor = {"name": "markov-4", "bits": 1.93, "order": 4, "by_order": [2.0, 1.982, 1.965, 1.953, 1.93]}
    said = words.order_passed(RunRecord(Path("x"), floors=[{"name": "uniform", "bits": 2.0}, floor]), value)
    assert said == (f"Among Markov models it has passed {expected}." if expected else "")


def test_the_frame_shows_the_later_course_and_not_the_fall() -> None:
    series = Series(list(range(100)), [0.0] * 100, [1.92 + 2 * math.exp(-step / 5) for step in range(100)])
    low, high = plots._loss_limits(series, Series(), Series(), [plots.Floor("uniform", 2.0)])
    assert low == pytest.approx(1.92, abs=0.02) and high == pytest.approx(2.0, abs=0.02)


def test_the_lowest_markov_floor_is_the_one_to_beat() -> None:
    floors = [{"name": f"markov-{k}", "bits": bits} for k, bits in ((1, 1.98), (6, 1.93), (8, 1.95))]
    record = RunRecord(Path("x"), floors=[{"name": "uniform", "bits": 2.0}, *floors])
    assert words.floors(record) == [plots.Floor("uniform", 2.0), plots.Floor("Markov, order 6", 1.93)]


@pytest.mark.parametrize(
    "split",
    [
        {"train": [["c", 0, 5]], "test": [["c", 6, 9]]},
        {"regions": {"train": [["c", 0, 5]], "test": [["c", 6, 9]]}, "kind": "x", "summary": [{"split": "train"}]},
        {
            "intervals": [
                {"contig": "c", "start": 0, "end": 5, "part": "train"},
                {"contig": "c", "start": 6, "stop": 9, "split": "test"},
            ]
        },
        [["c", 0, 5, "train"], ["c", 6, 9, "test"]],
    ],
)
def test_split_shapes_are_understood(split: object) -> None:
    assert sections.split_intervals(split) == [("train", "c", 0, 5), ("test", "c", 6, 9)]


@pytest.mark.parametrize(
    "split",
    [
        None,
        {},
        [],
        {"train": "a.fa"},
        {"train": ["a.fa"]},
        {"train": [["c", 0, 5], "a.fa"]},
        {"regions": {"train": [["c", 0, "x"]]}},
    ],
)
def test_other_splits_draw_no_bars(split: object) -> None:
    assert sections.split_intervals(split) == []


def test_many_intervals_merge_into_few_rectangles_of_the_right_share() -> None:
    """10,000 intervals, alternating 9 of train and 1 of test: their bins merge, nothing is drawn past the end."""
    given = [("test" if i % 10 == 9 else "train", i * 100, (i + 1) * 100) for i in range(10_000)]
    merged = sections._binned(given, 1_000_000)
    assert len(merged) <= sections._BINS
    assert sum(last - first for _, first, last in merged) == sections._BINS
    halves = [("train", i * 10, i * 10 + 10) for i in range(500)] + [
        ("test", i * 10, i * 10 + 10) for i in range(500, 1000)
    ]
    assert sections._binned(halves, 10_000) == [
        ("train", 0, sections._BINS / 2),
        ("test", sections._BINS / 2, sections._BINS),
    ]


def test_an_interval_past_the_origin_of_a_circular_contig_goes_on_at_its_start() -> None:
    bar = sections._contig_bars([("train", "c", 600, 1200), ("test", "c", 300, 500)], {"c": 1000})
    drawn = re.findall(r'class="s(\d)" x="([\d.]+)" y="0" width="([\d.]+)"', bar)
    shares = {(int(part), float(x) / sections._BINS, float(width) / sections._BINS) for part, x, width in drawn}
    assert shares == {(0, 0.6, 0.4), (0, 0.0, 0.2), (2, 0.3, 0.2)}
    assert "1,000b" in bar


def test_a_drawn_line_keeps_its_spikes_and_is_short() -> None:
    values = np.full(100_000, 1.0)
    values[[0, 77_777, 99_999]] = [3.0, 9.0, 0.1]
    values[500] = np.nan
    steps, shown = plots.thin(np.arange(100_000.0), values)
    assert len(steps) <= plots._POINTS and (np.diff(steps) > 0).all()
    assert {(0.0, 3.0), (77_777.0, 9.0), (99_999.0, 0.1)} <= set(zip(steps.tolist(), shown.tolist(), strict=True))


def test_the_running_mean_is_a_mean_also_at_the_ends_and_beside_nan() -> None:
    values = np.full(200, 1.5)
    values[[0, 50, 199]] = np.nan
    np.testing.assert_allclose(plots.running_mean(values), 1.5)
    ramp = np.arange(300.0)
    np.testing.assert_allclose(plots.running_mean(ramp)[50:250], ramp[50:250])


def test_charts_take_their_colours_from_the_page() -> None:
    series = Series(list(range(50)), [0.0] * 50, [2.0 - i / 500 for i in range(50)])
    drawing = plots.loss_chart(series, series, Series(), [plots.Floor("a $x$ <b>", 1.9)], [(0, 8), (9, 16)])
    assert drawing is not None
    assert "var(--train)" in drawing and "var(--val)" in drawing and "var(--floor)" in drawing
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]", drawing), "a placeholder colour is left"
    assert "1.900 a $x$ &lt;b&gt;" in drawing, "text stays text, and no mathematics"


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (text.count, 0, "0"), (text.count, 9_999, "9,999"), (text.count, 10_000, "10 k"),
        (text.count, 61_234, "61.2 k"), (text.count, 0.25, "0.25"),
        (text.count, 999_999, "1 M"), (text.count, 1_234_567, "1.23 M"), (text.count, 4.82e9, "4.82 G"),
        (text.words_count, 300_000, "300,000"), (text.words_count, 2_920_000, "2.92 million"),
        (text.words_count, 7e9, "7 billion"), (text.duration, 3.14, "3.1 s"), (text.duration, 59.7, "1 min"),
        (text.duration, 372, "6 min 12 s"), (text.duration, 3600, "1 h"), (text.duration, 9000, "2 h 30 min"),
        (text.duration, 200_000, "2 d 7 h"), (text.gibibytes, 0.05, "51 MiB"), (text.gibibytes, 3.141, "3.14 GiB"),
        (text.gibibytes, 71.62, "71.6 GiB"), (text.listed, ["a"], "a"), (text.listed, ["a", "b", "c"], "a, b and c"),
    ],
)  # fmt: skip
def test_numbers_for_people(function, value, expected: str) -> None:  # type: ignore[no-untyped-def]
    assert function(value) == expected


def test_a_folder_that_is_not_there_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "dna-demo-1").mkdir()
    with pytest.raises(
        SeqlongError, match=r"dna-dmo-1 does not exist; did you mean 'dna-demo-1'\? Expected a run folder"
    ):
        write_report(tmp_path / "dna-dmo-1")
    with pytest.raises(SeqlongError, match=r"zzz does not exist; .* holds dna-demo-1\. Expected"):
        write_report(tmp_path / "zzz")
    with pytest.raises(SeqlongError, match="does not exist"):
        write_report(tmp_path / "not" / "here")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SeqlongError, match="is a file, not a folder"):
        write_report(tmp_path / "file")


def test_a_folder_that_is_not_a_run_says_so_and_names_runs_inside(tmp_path: Path) -> None:
    with pytest.raises(SeqlongError, match=r"is not a run folder: it has none of run\.json"):
        write_report(tmp_path)
    folder(tmp_path / "demo-1", [])
    with pytest.raises(SeqlongError, match=r"it holds runs: name one, such as .*demo-1"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
