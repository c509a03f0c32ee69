"""Benchmarks mark what is wrong, survive what breaks, go on where they were, and count what they say."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from seqlong import mixers
from seqlong.datamodules.synthetic import MQAR

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/kernels.py under another name: PyPI has a package ``kernels`` that transformers looks for."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("kernel_benchmark", FOLDER / "kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _measure(bench: ModuleType, change: Callable[[dict[str, Tensor]], Tensor]) -> dict:
    family = bench.FAMILIES["simple_gla"]
    return bench.measure(family, lambda x: lambda: change(x), 1, 80, 0.0, torch.device("cpu"))


def test_a_wrong_contender_is_named(bench: ModuleType) -> None:
    right = bench.FAMILIES["simple_gla"].reference
    assert _measure(bench, right)["wrong"] == []

    def skewed(x: dict[str, Tensor]) -> Tensor:
        return right({**x, "g": x["g"] * 1.2})

    found = _measure(bench, skewed)
    assert {"output", "g"} <= set(found["wrong"])
    found.update(contender="fla", family="simple_gla")
    assert "WRONG: output by" in bench.peer_name(found)


def test_an_error_far_out_in_a_long_row_is_seen(bench: ModuleType) -> None:
    """Only positions beyond 4,096 are wrong, as where an address has overflowed."""
    family = bench.FAMILIES["simple_gla"]

    def late(x: dict[str, Tensor]) -> Tensor:
        output = family.reference(x)
        return torch.cat([output[:, :4500], 1.5 * output[:, 4500:]], dim=1)

    found = bench.measure(family, lambda x: lambda: late(x), 1, 5000, 0.0, torch.device("cpu"))
    assert "output" in found["wrong"]
    assert (
        bench.measure(family, lambda x: lambda: family.reference(x), 1, 5000, 0.0, torch.device("cpu"))["wrong"] == []
    )


def test_bytes_are_every_tensor_once_each_way(bench: ModuleType) -> None:
    found = _measure(bench, bench.FAMILIES["simple_gla"].reference)
    tensor, gate = 80 * 16 * 64, 80 * 16
    # q, k, v, g read twice, grad o read, o and four gradients written
    assert found["bytes"] == 2 * (3 * tensor * 2 + gate * 4) + 3 * tensor * 2 + gate * 4 + 2 * tensor * 2


def test_a_contender_that_crashes_or_hangs_costs_its_row_only(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys, time\n"
        "for job in json.loads(sys.argv[1]):\n"
        "    if job[1] == 'crash': os._exit(7)\n"
        "    if job[1] == 'hang': time.sleep(60)\n"
        "    said = {'contender': job[0], 'family': job[1], 'rows': 1, 'length': 1, 'x': 1.0}\n"
        "    print('@@' + json.dumps(said), flush=True)\n"
    )

    def start(todo: list, seconds: float):  # type: ignore[no-untyped-def]
        return subprocess.Popen([sys.executable, str(script), json.dumps(todo)], stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(bench, "_start", start)
    todo = [("peer", name, 1, 1) for name in ("first", "crash", "hang", "last")]
    found = {one["family"]: one for one in bench.run(todo, 0.0, 2.0, time.monotonic() + 60)}
    assert "failed" not in found["first"] and "failed" not in found["last"]
    assert "status 7" in found["crash"]["failed"] and "no result within" in found["hang"]["failed"]


def test_rows_hold_ours_beside_every_peer(bench: ModuleType) -> None:
    results: dict = {}
    speeds: dict[str, float] = {}
    common = {"family": "simple_gla", "rows": 1, "length": 64}
    bench.take({"contender": "ceilings", **common, "bytes_per_s": 1e12, "flops_per_s": 1e14}, results, speeds)
    bench.take({"contender": "seqlong", **common, "fwdbwd_ms": 2.0, "bytes": 10**9}, results, speeds)
    bench.take({"contender": "fla", **common, "fwdbwd_ms": 8.0}, results, speeds)
    bench.take({"contender": "chunked", **common, "failed": "out of memory"}, results, speeds)
    made = {(row.metric, row.peer): row for row in bench.rows(results, speeds)}
    assert made["fwdbwd_ms", "fla-core simple_gla"].ratio == 4
    assert made["fwdbwd_ms", "seqlong chunked torch (out of memory)"].peer_value is None
    assert made["byte_floor", None].value == pytest.approx(50)


def test_a_size_that_is_none_is_said_and_a_cpu_has_no_peak(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in ("3y", "0x64", "64", "1x-64"):
        monkeypatch.setattr(sys, "argv", ["kernels", "--sizes", size])
        with pytest.raises(SystemExit):
            bench.command()
        assert f"--sizes takes ROWSxPOSITIONS, such as 1x131072, by commas; found '{size}'" in capsys.readouterr().err
    asked: list = []
    monkeypatch.setattr(bench, "run", lambda todo, *_: asked.extend(todo) or [])
    monkeypatch.setattr(bench, "main", lambda *_, **__: None)
    words = ["kernels", "--sizes", "1x64,2x080", "--only", "simple_gla", "--contenders", "seqlong"]
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(sys, "argv", words)
        bench.command()
        assert (("ceilings", "ceilings", 1, 1) in asked) is gpu
    assert asked[:2] == [("seqlong", "simple_gla", 1, 64), ("seqlong", "simple_gla", 2, 80)]


def test_every_benchmark_is_described_and_reads_its_arguments() -> None:
    """One that does not read them would start to measure where ``--help`` is asked."""
    told = (FOLDER / "README.md").read_text()
    for script in FOLDER.glob("[!_]*.py"):
        assert "parse_args(" in script.read_text(), script.name
        assert script.stem in told, script.name


def _script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_recall_rows_made_on_the_device_ask_as_mqar_does(monkeypatch: pytest.MonkeyPatch) -> None:
    recall = _script("_recall", monkeypatch)
    setting = recall.Setting((4, 16), 256, 256)
    for pairs in setting.pairs:
        tokens, targets = recall.rows(setting, 200, pairs, recall.source(torch.device("cpu"), 5))
        for row, asks in zip(tokens.tolist(), targets.tolist(), strict=True):
            told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
            asked = [place for place in range(256) if asks[place] >= 0]
            assert len(told) == pairs and max(told) < 128 <= min(told.values()) and min(asked) >= 2 * pairs
            assert sorted(row[place] for place in asked) == sorted(told)
            assert all(asks[place] == told[row[place]] for place in asked)
            assert not {row[place] for place in range(2 * pairs, 256) if place not in asked} & set(told)
        random = np.random.default_rng(0)
        theirs = np.mean([np.flatnonzero(MQAR(pairs, 256).row(random, 256).targets >= 0).mean() for _ in range(200)])
        mine = (targets >= 0).nonzero()[:, 1].float().mean().item()
        assert abs(mine - theirs) < 0.08 * theirs, "questions stand elsewhere than MQAR puts them"


def test_recall_benchmark_trains_and_reports_every_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    recall, mqar = _script("_recall", monkeypatch), _script("mqar", monkeypatch)
    setting = recall.Setting((2,), 16, 16, 32, 32, 40, eval_rows=64)
    names = ["Attention", "DeltaNet"]
    found = {name: list(recall.train(name, setting, [3e-3, 1e-2], torch.device("cpu"))) for name in names}
    assert max(one["test"][0] for one in found["DeltaNet"]) > 0.3 > 2 * setting.chance
    assert {one["steps"] for one in found["Attention"]} == {40} and len(found["Attention"][0]["curve"]) == 20
    assert found["Attention"][0]["state_bytes"] == 2 * 2 * 16 * 32 * 4  # keys and values of two blocks
    made = list(mqar.rows(found, setting))
    assert [row.name for row in made if row.metric.startswith("accuracy, 2 pairs")] == ["chance", "DeltaNet"]
    assert sum(row.metric == "mean accuracy by learning rate" for row in made) == 4
    intervals = [row for row in made if "Wilson" in row.metric]
    for low, high in zip(intervals[::2], intervals[1::2], strict=True):
        share = mqar.best(found[low.name])["test"][0]
        assert low.name == high.name and low.value < share < high.value < low.value + 0.2


def test_a_lesson_on_short_rows_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    recall = _script("_recall", monkeypatch)
    setting = recall.Setting((4,), 64, 16, 16, 8, 4, eval_rows=8, lesson=3, lesson_pairs=(2, 3), solved=2.0)
    seen = []
    step = recall.Model.step

    def watch(self: Any, given: Any, progress: float) -> None:
        seen.append((tuple(given.tokens.shape), sorted({int(row) for row in (given.targets >= 0).sum(1)})))
        step(self, given, progress)

    monkeypatch.setattr(recall.Model, "step", watch)
    [result] = recall.train("LinearAttention", setting, [1e-3], torch.device("cpu"))
    assert seen == [((32, 16), [2, 3])] * 3 + [((8, 64), [4])]
    assert result["steps"] == 4 and len(result["test"]) == 1, "what is reported is recall of long rows"


def test_recall_benchmark_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recall, mqar = _script("_recall", monkeypatch), _script("mqar", monkeypatch)
    setting, rates, log, started = recall.Setting((2,), 16), [1e-3, 1e-2], tmp_path / "log", []

    def run(job: dict[str, Any], patience: float) -> tuple[list[dict[str, Any]], str]:
        started.append(job["model"])
        return [{"model": job["model"], "lr": rate, "validation": 0.5, "test": [0.5], "steps": 1} for rate in rates], ""

    monkeypatch.setattr(mqar, "_run", run)
    mqar.gather(["Attention"], setting, rates, "cpu", 1, 1.0, False, log)
    found = mqar.gather(["Attention", "KDA"], setting, rates, "cpu", 1, 1.0, False, log)
    assert started == ["Attention", "KDA"] and list(found) == ["Attention", "KDA"]
    assert mqar.load(log, recall.Setting((2,), 32), rates) == {} == mqar.load(log, setting, [3e-3, 1e-2])


def test_cost_of_mixers_knows_every_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = _script("_mixer_cost", monkeypatch)
    known = cost.factories(64)
    made = {type(make(64)).__name__ for make in known.values()}
    kinds = (getattr(mixers, name) for name in mixers.__all__)
    wanted = {kind.__name__ for kind in kinds if isinstance(kind, type) and issubclass(kind, mixers.Mixer)}
    assert made == wanted - {"Mixer"}
    for name in ("GatedMemoryUnit", "SharedAttention", "Parallel"):
        one = cost.Pass(known[name], 64, 40)
        one.run()
        assert one.hidden.grad is not None and one.hidden.grad.abs().sum() > 0


def test_cost_of_mixers_is_a_ratio_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = _script("mixers", monkeypatch)
    given = argparse.Namespace(width=64, limit=20.0, tokens=[2048, 131072], repeats=1)
    log, started = tmp_path / "log", []

    def run(name: str, given: argparse.Namespace, tokens: list[int]) -> Iterator[dict[str, Any]]:
        for length in tokens:
            started.append((name, length))
            same = {"mixer": name, "width": 64, "tokens": length, "limit": 20.0}
            slow = name == "Attention" and length > 2048
            times = {"failed": "more than 20 s of CPU"} if slow else {"cpu_s": 6.0, "reference_cpu_s": 4.0}
            yield {**same, **times}

    monkeypatch.setattr(bench, "run", run)
    bench.gather(["Mamba2"], given, log)
    found = bench.gather(["Mamba2", "Attention"], given, log)
    assert len(started) == len(set(started)) == len(found) == 4
    values = {row.name: row.value for row in bench.rows(found) if "131,072" in row.metric}
    late = next(name for name in values if name.startswith("Attention"))
    assert values["Mamba2"] == 1.5 and "at least" in late and values[late] == pytest.approx(20 / 6)
    bench.draw(found, Figure())


def test_a_mixer_that_takes_too_long_is_ended_by_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = _script("mixers", monkeypatch)
    script = tmp_path / "child.py"
    script.write_text(
        "import resource\n"
        'print(\'@@{"mixer": "GLA", "tokens": 1}\', flush=True)\n'
        "resource.setrlimit(resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))\n"
        "while True: pass\n"
    )
    monkeypatch.setattr(bench, "__file__", str(script))
    given = argparse.Namespace(width=64, limit=1.0, repeats=1)
    first, second, third = bench.run("GLA", given, [1, 2, 3])
    assert "failed" not in first and second["failed"] == "more than 1 s of CPU"
    assert third["failed"].startswith("not tried: fewer tokens took more than 1 s")


def test_contract_tells_passed_from_failed_and_from_laws_that_do_not_apply(tmp_path: Path) -> None:
    """A process of its own, as the command starts one: shapes are checked from the first import on."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('contract', {str(FOLDER / 'contract.py')!r})\n"
        "contract = importlib.util.module_from_spec(spec); spec.loader.exec_module(contract)\n"
        "found = contract.collect('test_state_dict_is_strict and (retnet or latent_both_sides)')\n"
        "assert not found.failed, found.failed\n"
        "found.cells['retnet']['test_one_token_at_a_time_is_the_whole'] = ['passed', 'failed']\n"
        "import json; print(json.dumps(contract.rows(found)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    rows = {(row["name"], row["metric"]): row for row in json.loads(done.stdout.splitlines()[-1])}
    assert {name for name, _ in rows} == {"retnet", "latent_both_sides"}
    assert rows["latent_both_sides", "state dict"]["value"] == rows["latent_both_sides", "state dict"]["tests"] == 1
    broken = rows["retnet", "decode = whole"]
    assert (broken["value"], broken["failed"], broken["tests"]) == (1, 1, 2)
    assert ("latent_both_sides", "decode = whole") not in rows


def test_contract_blames_only_the_mixer_at_which_the_compiler_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = _script("contract", monkeypatch)
    found = contract.Collector()
    found.mixers, found.cells = ["a", "b", "c"], {name: {} for name in "abc"}
    found._named["id"] = (contract.COMPILED, None)
    report = argparse.Namespace(
        nodeid="id", failed=True, skipped=False, when="call", longreprtext="why", user_properties=[("compiled", "a")]
    )
    found.pytest_runtest_logreport(report)
    assert [found.cells[name][contract.COMPILED] for name in "abc"] == [["passed"], ["failed"], ["skipped"]]
    assert found.failed == [("id", "why")]
    contract.draw(found, Figure(), "")


def test_experts_of_every_contender_are_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = _script("moe", monkeypatch)
    made = list(moe.rows([moe.Shape(8, 2, 24, 64, 16)], torch.device("cpu"), 1, ["chunked"]))
    peers = {row.peer.split(" ")[0] for row in made if row.peer_value is not None}
    assert {"torch", "seqlong"} <= peers and not any("WRONG" in row.peer for row in made)
    right = moe.Ours.forward
    shape = moe.Shape(8, 2, 24, 64, 16)
    for factor in (1.1, float("nan")):

        def off(self: Any, x: torch.Tensor, factor: float = factor, form: str | None = None) -> torch.Tensor:
            return right(self, x) * (factor if self.moe.experts.implementation == form else 1.0)

        monkeypatch.setattr(moe.Ours, "forward", lambda self, x, off=off: off(self, x, form="chunked"))
        wrong = list(moe.rows([shape], torch.device("cpu"), 1, ["chunked"]))
        assert ["WRONG" in row.peer for row in wrong if row.peer.startswith("seqlong")] == [True]
        monkeypatch.setattr(moe.Ours, "forward", off)
        with pytest.raises(RuntimeError, match="seqlong's output is off by"):
            list(moe.rows([shape], torch.device("cpu"), 1, []))


def test_a_measurement_is_kept_for_its_setting_and_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    kept = _script("_kept", monkeypatch)
    assert kept.kept(log, {"length": 8}) is None
    kept.keep(log, {"length": 8, "kind": "hybrid"}, {"tokens_per_s": 5.0})
    kept.keep(None, {"length": 9}, {"tokens_per_s": 1.0})
    assert kept.kept(log, {"length": 8, "kind": "hybrid"}) == {"tokens_per_s": 5.0}
    assert kept.kept(log, {"length": 8, "kind": "attention"}) is None
    monkeypatch.setattr(kept.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kept.torch.cuda, "get_device_name", lambda: "another")
    assert kept.kept(log, {"length": 8, "kind": "hybrid"}) is None
