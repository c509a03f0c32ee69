"""seqlong doctor: right on a healthy machine, loud on a sick one, one line for a mistake; and the probes behind it."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import logging
import re
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from seqlong import doctor, machine
from seqlong.cli import main
from seqlong.kernels import dispatch, probes, tuning
from seqlong.kernels.tuning import Config, settle

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEQLONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def spoil(monkeypatch: pytest.MonkeyPatch, op: str, change: Any) -> None:
    """Replace an op by one that changes its first result."""
    right = probes.function(probes.PROBES[op])
    assert right is not None

    def wrong(*args: Any, **given: Any) -> Any:
        found = right(*args, **given)
        if given["implementation"] == "reference":
            return found
        return (change(found[0]), *found[1:]) if isinstance(found, tuple) else change(found)

    wrong.__wrapped__ = right  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.import_module(probes.PROBES[op].module), op, wrong)


# -- Probes -----------------------------------------------------------------------------------------------------------


def test_every_op_has_a_probe() -> None:
    """Every function that has implementations to choose from; a step is its op, some tokens at a time."""
    functions = set()
    for path in KERNELS.glob("*/__init__.py"):
        module = importlib.import_module(f"seqlong.kernels.{path.parent.name}")
        for name in getattr(module, "__all__", []):
            found = inspect.unwrap(getattr(module, name))
            if inspect.isfunction(found) and "implementation" in inspect.signature(found).parameters:
                functions.add(name.removesuffix("_step"))
    assert functions and functions <= set(probes.PROBES), f"add to PROBES: {functions - set(probes.PROBES)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "case"), [(op, case) for op, probe in probes.PROBES.items() for case in probe.cases])
def test_every_op_is_right_here(op: str, case: str, dtype: torch.dtype) -> None:
    probe = probes.PROBES[op]
    if probes.function(probe) is None:
        pytest.skip(f"this version of seqlong has no {op}")
    found = probes.error(probe, None, "cpu", dtype, case=case, length=99)
    assert probes.wrong(found, {}, dtype) is None
    if dtype == torch.bfloat16:
        assert max(found.values()) > 1e-4, "the op ran in bf16, and its rounding is seen"
    given = probes.inputs(probe, "cpu", dtype, case=case, length=99)
    assert {f"d{name}" for name in given.learned} <= set(found), "every gradient is compared"
    assert set(found) & set(probe.outputs)


@pytest.mark.parametrize("op", ["short_conv", "rms_norm", "linear_cross_entropy"])
def test_a_fault_in_one_column_or_token_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(found: Tensor) -> Tensor:
        mask = torch.ones_like(found)
        mask[:, -1] = 1.5  # one token in three hundred
        return found * mask

    spoil(monkeypatch, op, one)
    probe = probes.PROBES[op]
    for dtype in (torch.float32, torch.bfloat16):
        assert probes.wrong(probes.error(probe, None, "cpu", dtype), {}, dtype)


def test_an_error_that_plain_torch_makes_as_well_is_no_fault() -> None:
    found, same, less = {"o": 0.001, "dg": 0.04}, {"o": 0.001, "dg": 0.03}, {"o": 0.001, "dg": 0.01}
    assert probes.wrong(found, same, torch.bfloat16) is None
    assert "the gradient of g has a relative error of 0.04; at most 0.03" in str(
        probes.wrong(found, less, torch.bfloat16)
    )
    assert probes.wrong({"o": float("inf")}, {"o": float("inf")}, torch.bfloat16) == "the result o is not finite"
    assert probes.wrong({"dk": float("nan")}, {}, torch.float32) == "the gradient of k is not finite"


def test_what_is_missing_is_said() -> None:
    probe = probes.PROBES["rms_norm"]
    with pytest.raises(ValueError, match="no implementation 'cuneiform'"):
        probes.run(probe, probes.inputs(probe, "cpu", torch.float32), "cuneiform")
    gone = probes.Probe("gone", "seqlong.kernels.norm", probe.make, ("y",), probe.small, probe.large)
    assert probes.implementations(gone) == ()
    assert doctor.examine(gone, torch.device("cpu")).reason == "not in this version of seqlong"


# -- The command ------------------------------------------------------------------------------------------------------


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    tuning.forget()  # what other tests have settled on is printed too
    assert main(["doctor", "--quick"]) == 0
    printed = capsys.readouterr().out
    present = [op for op, probe in probes.PROBES.items() if probes.function(probe) is not None]
    for word in ("Environment", "torch", "Triton", "disk", "runs as", *present, "All ops are right"):
        assert word in printed
    assert len(printed.splitlines()) < 25 + 6 * len(present), "a screen or two"
    assert max(map(len, printed.splitlines())) <= 120


def test_a_damaged_tuning_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own.json").write_text('{"op": {')
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "own.json"))
    monkeypatch.setattr(tuning, "_complained", set())
    tuning.forget()

    def examine(probe: probes.Probe, device: torch.device, quick: bool) -> doctor.Finding:
        tuning.lookup(probe.op, "bf16", {}, device)
        return doctor.Finding(probe.op, "chunked", "")

    monkeypatch.setattr(doctor, "examine", examine)
    assert main(["doctor", "rms_norm", "--quick"]) == 0
    tuning.forget()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'own.json'}:1: is not JSON")


def test_a_wrong_op_is_named_and_changes_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spoil(monkeypatch, "rms_norm", lambda found: found + 0.2)
    assert main(["doctor", "rms_norm", "gated_rms_norm", "--json", "report.json"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "rms_norm, plain inputs in fp32: the result y has a relative error of 0.2" in printed
    assert "All ops are right" not in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["right"] is False
    by_name = {op["op"]: op for op in report["ops"]}
    assert set(by_name) == {"rms_norm", "gated_rms_norm"}
    assert by_name["gated_rms_norm"]["seconds"] > 0 and by_name["gated_rms_norm"]["reference_seconds"] > 0
    assert printed.count("x the reference") == 1, "plain torch beside the reference; what is wrong is not timed"
    assert by_name["gated_rms_norm"]["wrong"] == [] and len(by_name["rms_norm"]["wrong"]) == 2, "both types"
    assert set(by_name["rms_norm"]["errors"]) == {"fp32", "bf16"}


def test_an_op_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def change(found: Tensor) -> Tensor:
        raise AssertionError("PassManager::run failed\nwith much text")

    spoil(monkeypatch, "rms_norm", change)
    assert main(["doctor", "rms_norm", "--quick"]) == 1
    assert "rms_norm does not run: AssertionError: PassManager::run failed" in capsys.readouterr().out


def test_json_on_the_terminal_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "attention", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    (op,) = report["ops"]
    assert op["runs_as"] == "sdpa" and "fused attention" in op["reason"]
    assert set(op["errors"]["fp32"]) == {"plain", "window", "packed", "sinks"}
    assert op["seconds"] > 0 and op["plain_seconds"] > 0, "two forms run on a CPU, so they are compared"


def test_what_is_forced_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert main(["doctor", "linear_cross_entropy", "--quick", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ops"][0]["runs_as"] == "reference"
    assert report["ops"][0]["reason"] == "SEQLONG_KERNELS=reference"
    assert any(line.startswith("SEQLONG_KERNELS=reference is used") for line in report["advice"])


def test_listening_leaves_dispatch_as_it_was() -> None:
    before = set(dispatch._announced), dispatch.log.level, dispatch.log.propagate, list(dispatch.log.handlers)
    doctor.examine(probes.PROBES["attention"], torch.device("cpu"), quick=True)
    after = dispatch._announced, dispatch.log.level, dispatch.log.propagate, list(dispatch.log.handlers)
    assert before[0] <= after[0] and before[1:] == after[1:]
    assert isinstance(dispatch.log, logging.Logger)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["short_cov"], "there is no op 'short_cov'; did you mean 'short_conv'?"),
        (["--device", "gpu"], "--device is cpu or cuda, found 'gpu'"),
        (["--fast"], "unrecognized arguments: --fast; `seqlong doctor --help` lists what it takes"),
        (["--json"], "argument --json: expected one argument"),
        (["rms_norm", "--quick", "--json", "no/such/folder.json"], "cannot write no/such/folder.json: No such file"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--tune"]) == 2
    assert capsys.readouterr().err == "--tune measures GPU kernels, and there is no GPU here\n"
    assert main(["doctor", "--device", "cuda"]) == 2


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["doctor", "--help"])
    printed = capsys.readouterr().out
    assert done.value.code == 0
    for word in ("examples:", "--tune", "--json", "exit status", "yardstick", *probes.PROBES):
        assert word in printed
    main(["--help"])
    assert "seqlong doctor" in capsys.readouterr().out


def test_packages_outside_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "psutil":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"lightning": "2.6.3", "omegaconf": "2.4.0"}.get(name) or real(name)

    assert [fact.bad for fact in machine.packages()] == [False], "all well here"
    monkeypatch.setattr(importlib.metadata, "version", version)
    facts = {fact.name: fact for fact in machine.packages()}
    assert set(facts) == {"packages", "lightning", "omegaconf", "psutil"}
    assert facts["lightning"].bad and "2.6.3 was withdrawn: remove it now" in facts["lightning"].value
    assert (
        facts["omegaconf"].value.startswith("2.4.0; seqlong needs omegaconf")
        and "not installed" in facts["psutil"].value
    )
    assert facts["packages"].value.startswith("hydra-core") and "all as required" not in facts["packages"].value
    advice = machine.advise(torch.device("cpu"), list(facts.values()))
    assert any(line.startswith("lightning: 2.6.3") for line in advice)


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        (None, None, "No GPU"),
        ("550.54", None, "without CUDA"),
        ("450.80", "13.0", "driver 450.80 may be too old for CUDA"),
    ],
)
def test_advice_where_torch_finds_no_gpu(
    driver: str | None, cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert said in " ".join(machine.advise(torch.device("cpu"), []))


def test_the_path_of_json_is_not_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "ssd"]) == 2
    assert "--json takes the path of a file: seqlong doctor ssd --json report.json" in capsys.readouterr().err


def test_little_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30))
    facts = machine.environment(torch.device("cpu"))
    assert facts[-1].name == "disk" and facts[-1].bad and facts[-1].value.startswith("1.0 GiB free at ")
    assert any("run.root=FOLDER" in line for line in machine.advise(torch.device("cpu"), facts))


def test_it_starts_without_triton() -> None:
    """As on a machine that has none: nothing may import it unasked."""
    code = (
        "import sys; sys.modules['triton'] = None; from seqlong.cli import main; "
        "sys.exit(main(['doctor', 'rms_norm', 'scalar_decay', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Triton +none", done.stdout)


# -- Tuning -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sequence[Config]:
    """An op whose 'triton' form is slow, wrong or does not run, as its setting says."""
    module = types.ModuleType("ops.toy")
    default: Config = {"pace": 3}
    candidates: list[Config] = [default, {"pace": 0}, {"pace": 1}, {"pace": 9}, {"pace": 2}]

    def toy(x: Tensor, implementation: str | None = None) -> Tensor:
        if implementation != "triton":
            return x * x
        config = settle("toy", "fp32 d8", default, x.device)
        assert config is not None
        if config["pace"] == 9:
            raise RuntimeError("out of shared memory")
        for _ in range(int(config["pace"]) * 40):
            x.detach().clone().cumsum(1)
        return x * x + (0.5 if config["pace"] == 0 else 0.0)

    toy.__module__ = module.__name__
    module.toy = toy  # type: ignore[attr-defined]
    module.OFFERED = {"triton": "", "chunked": "", "reference": ""}  # type: ignore[attr-defined]
    module.CANDIDATES = {"toy": {"fp32 d8": candidates}}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ops.toy", module)
    made = lambda draw: probes.Inputs({"x": draw.normal(draw.rows, draw.length, draw.sizes["d"])})  # noqa: E731
    monkeypatch.setitem(probes.PROBES, "toy", probes.Probe("toy", "ops.toy", made, ("y",), {"d": 8}, {"d": 8}))
    monkeypatch.setattr(doctor, "TUNING_LENGTH", 512)
    monkeypatch.setattr(doctor, "triton_runs_on", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Toy 7000")
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "own.json"))
    tuning.forget()
    return candidates


def test_tuning_keeps_the_fastest_right_candidate(
    toy: Sequence[Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu, judge, time = torch.device("cpu"), tuning.trusted, doctor._time
    asked: list[Config] = []

    def trusted(op: str, key: str, config: Config, device: Any) -> bool:
        asked.append(config)
        return judge(op, key, config, cpu, tuning._default_check(op, key, cpu), warn=False)

    monkeypatch.setattr(tuning, "trusted", trusted)

    def paced(probe: probes.Probe, key: str, config: Config, device: Any) -> float | None:
        """It is run, and said to take as long as its setting says: a busy machine must not decide the test."""
        return None if time(probe, key, config, cpu) is None else 1e-3 * (1 + int(config["pace"]))

    monkeypatch.setattr(doctor, "_time", paced)
    save = tuning.save
    monkeypatch.setattr(tuning, "save", lambda device, kept, about: save(cpu, kept, about))
    doctor.tune([probes.PROBES["toy"]], torch.device("cuda", 0), Console(width=120))
    assert asked == [{"pace": 0}, {"pace": 1}], "the fastest is wrong, the next one is right"
    written = json.loads((tmp_path / "own.json").read_text())
    assert written["toy"] == {"fp32 d8": {"pace": 1}}
    assert written["about"]["gpu"] == "NVIDIA Toy 7000"
    assert tuning.lookup("toy", "fp32 d8", toy[0], "cpu") == {"pace": 1}
    assert "the default's speed" in capsys.readouterr().out


def test_configurations_in_use_are_shown(toy: Sequence[Config], tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"toy": {"fp32 d8": {"pace": 1}}}')
    tuning.forget()
    probes.error(probes.PROBES["toy"], "triton", "cpu", torch.float32)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor._used_table(tuning.in_use()))
    printed = console.export_text()
    assert re.search(r'toy +fp32 d8 +own, not checked +\{"pace": 1\}', printed)


# -- Compiling side by side --------------------------------------------------------------------------------------------


def test_kernels_are_compiled_in_every_way_that_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Any]] = []
    monkeypatch.setattr(probes, "run", lambda probe, given, way: seen.append((given.learned["x"].shape[1], way)))
    doctor.compile_kernels(probes.PROBES["short_conv"], torch.device("cpu"))
    assert seen == [(probes.LENGTH, None)] * 2 + [(256, None)], "plain, packed, and the widths that are timed"


def test_a_process_for_each_op_and_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_settings: Any) -> None:
        commands.append(command)
        raise subprocess.TimeoutExpired(command, 1)  # no harm done

    monkeypatch.setattr(doctor.subprocess, "run", run)
    doctor.compile_ahead(["ssd", "rms_norm"])
    assert sorted(command[-2] for command in commands) == ["rms_norm", "ssd"]
    assert main(commands[0][3:]) == 0
    assert capsys.readouterr().out == "", "it says nothing: the table is the first process's"


# -- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_every_op_is_right_on_this_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    tuning.forget()
    assert main(["doctor", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {op["op"]: op["runs_as"] for op in report["ops"]}["linear_cross_entropy"] == "triton"
    assert all(op["seconds"] and op["plain_seconds"] for op in report["ops"] if op["runs_as"] == "triton")
    assert report["configurations"] and all(one["checked"] and one["config"] for one in report["configurations"])


@pytest.mark.gpu
def test_a_recorded_graph_checks_nothing() -> None:
    probe = probes.PROBES["linear_cross_entropy"]
    given = probes.inputs(probe, "cuda", torch.bfloat16)
    for _ in range(2):  # warm-up, as recording needs
        wanted = probes.call(probe, given, "triton")["loss"].detach().clone()
    tuning.forget()
    tuning._verdicts.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = probes.call(probe, given, "triton")["loss"]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
    assert tuning.in_use() == [] and tuning._verdicts == {}


@pytest.mark.gpu
def test_tuning_writes_what_is_then_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TUNING_LENGTH", 2048)
    assert main(["doctor", "--tune", "--quick", "linear_cross_entropy"]) == 0
    assert "written to" in capsys.readouterr().out
    assert {one.source for one in tuning.in_use()} == {"own"}
