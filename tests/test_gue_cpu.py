"""``seqlong bench gue --cpu``: seeds kept, their answers averaged, a stopped run begun again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from seqlong.compose import compose


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "_gue_cpu.py"
    spec = importlib.util.spec_from_file_location("_gue_cpu_tested", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a task of GUE whose test has four records, one of them in training."""
    task = tmp_path / "labelled" / "GUE" / "mouse" / "0"
    task.mkdir(parents=True)
    for name, texts in {"train": ["ACGT", "AACC"], "dev": ["AGAG"], "test": ["ACGT", "AAAA", "CCAA", "CACA"]}.items():
        (task / f"{name}.csv").write_text("sequence,label\n" + "".join(f"{s},{n % 2}\n" for n, s in enumerate(texts)))
    return tmp_path


def test_answers_of_seeds_are_averaged_and_known_records_left_out(
    bench: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [[0.1, 0.9], [0.1, 0.9], [0.9, 0.1], [0.2, 0.8]]  # three of four, and all that are new
    right = [[0.8, 0.2], [0.3, 0.7], [0.95, 0.05], [0.2, 0.8]]
    answers = iter([wrong, right, right])

    def run(place: Path, settings: list[str]) -> Any:
        place.mkdir(parents=True)
        scored = {"mcc": 0.25, "accuracy": 0.5}
        floors = [{"name": "words", "test": scored, "test_unseen": scored | {"mcc": 0.1}}, {"name": "letters"}]
        (place / "floors.json").write_text(json.dumps(floors))
        return torch.tensor(next(answers)), torch.tensor([[0], [1], [0], [1]])

    monkeypatch.setattr(bench, "measured", run)
    found = bench.outcome("mouse/0", data, 3, tmp_path / "runs")
    assert found.each == pytest.approx([1 / 3**0.5, 1.0, 1.0])
    assert found.together == pytest.approx(1.0), "0.9 of one and 0.2 of two are 0.43 for the wrong class"
    assert found.unseen == pytest.approx([1.0, 1.0, 1.0]), "the first record is in training"
    assert found.floors == {"words": 0.25} and found.unseen_floors == {"words": 0.1}
    rows = list(bench.rows_of(found, "DNABERT-2 0.568"))
    assert [row.peer_value for row in rows] == [0.25, 0.25, 0.1, 0.1]
    assert "sd 0.244" in rows[0].name and "DNABERT-2 0.568" in rows[0].metric
    figure = Figure()
    bench.draw([found], {"mouse/0": {"DNABERT-2": 56.76, "HyenaDNA": 5.0}}, figure)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[-1] == "DNABERT-2" and "linear: words" in names


def test_other_settings_are_another_run(bench: ModuleType, tmp_path: Path) -> None:
    folders = {bench.place_of(tmp_path, "tf/0", 1, [word]) for word in ("a=1", "a=2")}
    folders |= {bench.place_of(tmp_path, "tf/0", 1, ["a=1", f"data.folder={place}"]) for place in ("here", "there")}
    assert len(folders) == 2 and all(folder.parent == tmp_path for folder in folders)


def test_settings_compose(bench: ModuleType, data: Path) -> None:
    settings = bench.words("mouse/0", data, 2)[0]
    made = compose([*settings, *bench.SETTINGS["prom/prom_core_tata"]]).house
    assert made["seed"] == 2 and made["task"]["pool"] == "places" and made["model"]["backbone"]["d_model"] == 64
