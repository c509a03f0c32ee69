"""``seqlong doctor``: what this machine has, what each op runs as and why, whether it is right, and how fast it is."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from seqlong import runs
from seqlong.errors import SeqlongError, nearest
from seqlong.kernels import dispatch, probes, tuning
from seqlong.kernels.runtime import MIN_CAPABILITY, triton_runs_on
from seqlong.machine import Fact, advise, environment

HELP = """Shows, for this machine:

  environment     versions, GPU, driver, memory, disk, and what is outside what seqlong needs
  ops             what each one runs as here and why; its relative error against the float64 reference, of the outputs
                  and of the gradients (in brackets that of plain torch in the same type, which is the yardstick); its
                  speed against plain torch or, where that is what runs, against the reference on a short row
  configurations  which tuned settings the GPU kernels use: shipped with seqlong, your own, or the default
  advice          what to install or do to be faster, or to get more

The exit status is 0 if every op is right, 1 if one is wrong, 2 if the command line is."""
EXAMPLES = """examples:
  seqlong doctor                      all of it
  seqlong doctor --quick              without speed, and plain inputs only
  seqlong doctor ssd scalar_decay     these ops only
  seqlong doctor --json report.json   for a program, or an issue; - writes to the terminal
  seqlong doctor --tune               measure the candidate configurations of this GPU, and keep the fastest right ones
  SEQLONG_KERNELS=chunked seqlong doctor     what everything would be without GPU kernels"""

LENGTHS, TUNING_LENGTH = {"cuda": 32768, "cpu": 1024}, 65536  # tokens of a measurement
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass
class Finding:
    """What was found out about an op.

    Attributes:
        errors: type -> case -> result -> its relative ``error``, and that of ``plain`` torch.
        wrong: sentences, one for each type and case whose error cannot be explained.
        seconds, plain_seconds: forward and backward pass, of what runs here and of plain torch.
        reference_seconds: where plain torch runs here: of the reference, ``seconds`` being those of the same short row.
    """

    op: str
    runs_as: str
    reason: str
    errors: dict[str, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float | None = None
    plain_seconds: float | None = None
    reference_seconds: float | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SeqlongError(f"seqlong doctor: {message}; `seqlong doctor --help` lists what it takes")


def command(arguments: Sequence[str]) -> int:
    """``seqlong doctor``; returns the exit status: 0 all right, 1 an op is wrong.

    Raises:
        SeqlongError: a mistake in the arguments, or tuning without a GPU.
    """
    parser = _Parser(
        prog="seqlong doctor", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"all if left out: {', '.join(probes.PROBES)}")
    parser.add_argument("--quick", action="store_true", help="errors of plain inputs in one type, and no speed")
    parser.add_argument("--json", metavar="PATH", help="also write everything as JSON; - for the terminal, alone")
    parser.add_argument("--tune", action="store_true", help="find the fastest configurations on this GPU first")
    parser.add_argument("--device", metavar="cpu|cuda", help="the GPU if there is one, else the CPU")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)  # what compile_ahead starts
    given = parser.parse_args(list(arguments))
    for op in given.ops:
        if op not in probes.PROBES:
            known = ", ".join(probes.PROBES)
            raise SeqlongError(f"there is no op '{op}'{nearest(op, probes.PROBES) or f'; there are: {known}'}")
    if given.json in probes.PROBES:
        raise SeqlongError(f"--json takes the path of a file: seqlong doctor {given.json} --json report.json")
    dispatch.demanded()
    device = _device(given.device)
    chosen = [probe for probe in probes.PROBES.values() if probes.function(probe) is not None or probe.op in given.ops]
    chosen = [probe for probe in chosen if not given.ops or probe.op in given.ops]
    if given.compile:
        for probe in chosen:
            compile_kernels(probe, device)
        return 0
    console = _console(quiet=given.json == "-")
    if device.type == "cuda" and len(chosen) > 1:
        with console.status("compiling kernels side by side"):
            compile_ahead([probe.op for probe in chosen])
    if given.tune:
        tune(chosen, device, console)
    facts = environment(device)
    findings = []
    with warnings.catch_warnings(), console.status("") as status:
        warnings.showwarning = _show_warning
        for probe in chosen:
            status.update(f"checking {probe.op}")
            findings.append(examine(probe, device, quick=given.quick))
    advice = advise(device, facts)
    used = [settled for settled in tuning.in_use() if settled.op in {probe.op for probe in chosen}]
    _show(console, facts, findings, used, advice, device)
    if given.json:
        content = {
            "environment": {fact.name: fact.value for fact in facts} | {"device": device.type},
            "ops": [asdict(finding) for finding in findings],
            "configurations": [asdict(settled) for settled in used],
            "advice": advice,
            "right": not any(finding.wrong for finding in findings),
        }
        _write_json(given.json, content)
    return 1 if any(finding.wrong for finding in findings) else 0


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def _device(asked: str | None) -> torch.device:
    if asked not in (None, "cpu", "cuda"):
        raise SeqlongError(f"--device is cpu or cuda, found '{asked}'")
    if asked == "cuda" and not torch.cuda.is_available():
        raise SeqlongError("--device cuda: torch finds no GPU here; `seqlong doctor` says why")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def _console(quiet: bool) -> Console:
    """A pipe or a log has no width of its own; give it room for a table."""
    return Console(width=None if sys.stdout.isatty() else 120, quiet=quiet, highlight=False)


def _write_json(path: str, content: dict[str, Any]) -> None:
    if path == "-":
        print(json.dumps(runs._plain(content), indent=2))
        return
    try:
        runs.write_json(path, content)
    except OSError as error:
        raise SeqlongError(f"cannot write {path}: {error.strerror}") from error


# -- Ops --------------------------------------------------------------------------------------------------------------


class _Listener(logging.Handler):
    """Hears what dispatch chooses."""

    def __init__(self, op: str) -> None:
        super().__init__(logging.INFO)
        self.op, self.heard = op, ("", "")

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 3 and record.args[0] == self.op:
            self.heard = str(record.args[1]), str(record.args[2])


@contextmanager
def _listening(op: str) -> Iterator[_Listener]:
    listener, announced = _Listener(op), set(dispatch._announced)
    level, propagate = dispatch.log.level, dispatch.log.propagate
    dispatch._announced.clear()  # what was said once is said again
    dispatch.log.setLevel(logging.INFO)
    dispatch.log.propagate = False
    dispatch.log.addHandler(listener)
    try:
        yield listener
    finally:
        dispatch.log.removeHandler(listener)
        dispatch.log.setLevel(level)
        dispatch.log.propagate = propagate
        dispatch._announced.update(announced)


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result, or what went wrong: whatever an op throws is a finding here, never the end of the examination."""
    try:
        return work(), None
    except Exception as error:
        return None, tuning.in_short(error)


def examine(probe: probes.Probe, device: torch.device, quick: bool = False) -> Finding:
    """What ``probe``'s op runs as on ``device``, why, how right it is and how fast."""
    known = probes.implementations(probe)
    if not known:
        return Finding(probe.op, "–", "not in this version of seqlong")
    main = torch.bfloat16 if device.type == "cuda" and _has_bf16(device) else torch.float32
    with _listening(probe.op) as listener:
        _, trouble = _attempt(lambda: probes.run(probe, probes.inputs(probe, device, main), None))
    implementation, reason = listener.heard
    finding = Finding(probe.op, implementation or probe.yardstick, reason or "its only form, on any device")
    if trouble:
        finding.wrong.append(f"{probe.op} does not run: {trouble}")
        return finding
    others = [] if quick or not _has_bf16(device) else [dtype for dtype in _NAMES if dtype != main]
    for dtype in [main, *others]:
        for case in ("plain",) if quick else probe.cases:
            _compare(probe, finding, device, dtype, case)
    if not quick and not finding.wrong:
        _time_forms(probe, finding, device, main)
    return finding


def _time_forms(probe: probes.Probe, finding: Finding, device: torch.device, dtype: torch.dtype) -> None:
    """Time what runs here beside plain torch; plain torch beside the reference, which takes seconds on longer rows."""

    def seconds(implementation: str | None, **more: Any) -> float | None:
        found: float | None = _attempt(lambda: probes.measure(probe, implementation, device, dtype, **more))[0]
        return found

    if finding.runs_as == probe.yardstick:
        short: dict[str, Any] = {"length": probes.LENGTH, "sizes": probe.small, "budget": 0.1}
        finding.seconds = seconds(None, **short)
        finding.reference_seconds = seconds("reference", **short, least=1)
    elif finding.runs_as != "reference":
        length = LENGTHS.get(device.type, LENGTHS["cpu"])
        finding.seconds, finding.plain_seconds = (seconds(form, length=length) for form in (None, probe.yardstick))


def compile_ahead(ops: Sequence[str], seconds: float = 300.0) -> None:
    """Let processes of their own compile the ops' kernels, which this one then finds in Triton's cache.

    One after the other they take minutes: the compiler uses one core. What goes wrong there is found again here.
    """
    code = "import sys; from seqlong.cli import main; sys.exit(main(sys.argv[1:]))"

    def one(op: str) -> None:
        command = [sys.executable, "-c", code, "doctor", op, "--compile"]
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=seconds, check=False)

    with ThreadPoolExecutor(max(1, min(len(ops), (os.cpu_count() or 2) - 1))) as pool:
        list(pool.map(one, ops))


def compile_kernels(probe: probes.Probe, device: torch.device) -> None:
    """Run the op once in every way in which ``examine`` will."""
    main = torch.bfloat16 if device.type == "cuda" and _has_bf16(device) else torch.float32
    for case in probe.cases:
        _attempt(lambda case=case: probes.run(probe, probes.inputs(probe, device, main, case=case), None))
    _attempt(lambda: probes.run(probe, probes.inputs(probe, device, main, length=256, sizes=probe.large), None))


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def _compare(probe: probes.Probe, finding: Finding, device: torch.device, dtype: torch.dtype, case: str) -> None:
    where = f"{probe.op}, {case} inputs in {_NAMES[dtype]}"
    errors, trouble = _attempt(lambda: probes.error(probe, None, device, dtype, case=case))
    if trouble:
        finding.wrong.append(f"{where}: {trouble}")
        return
    plain, _ = _attempt(lambda: probes.error(probe, probe.yardstick, device, dtype, case=case))
    plain = plain or {}
    saved = {name: {"error": value, "plain": plain.get(name, float("nan"))} for name, value in errors.items()}
    finding.errors.setdefault(_NAMES[dtype], {})[case] = saved
    # Plain torch is no yardstick for itself.
    yardstick = {} if finding.runs_as == probe.yardstick else plain
    if said := probes.wrong(errors, yardstick, dtype):
        instead = "" if finding.runs_as == probe.yardstick else f"; {dispatch.VARIABLE}={probe.yardstick} avoids it"
        finding.wrong.append(f"{where}: {said}. It runs as {finding.runs_as}{instead}")


# -- Tuning -----------------------------------------------------------------------------------------------------------


def candidates(probe: probes.Probe) -> Mapping[str, Sequence[tuning.Config]]:
    """Key -> configurations worth measuring, the default first: the op's module lists them in ``CANDIDATES[op]``."""
    module = inspect.getmodule(inspect.unwrap(probes.function(probe) or probes.run))
    found: Mapping[str, Sequence[tuning.Config]] = getattr(module, "CANDIDATES", {}).get(probe.op, {})
    return found


def tune(chosen: Sequence[probes.Probe], device: torch.device, console: Console) -> None:
    """Measure candidates, keep the fastest one that passes its check for each key, write the user's file.

    Raises:
        SeqlongError: there is no GPU, or nothing to tune.
    """
    if device.type != "cuda" or (why := triton_runs_on(device)):
        reason = "there is no GPU here" if device.type != "cuda" else why
        raise SeqlongError(f"--tune measures GPU kernels, and {reason}")
    work = [(probe, key, list(configs)) for probe in chosen for key, configs in candidates(probe).items()]
    if not work:
        raise SeqlongError(f"nothing to tune: {', '.join(probe.op for probe in chosen)} lists no candidates")
    kept: dict[str, dict[str, tuning.Config]] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(configs) for *_, configs in work))
        for probe, key, configs in work:
            progress.update(bar, description=f"{probe.op} {key}")
            times: list[tuple[float, tuning.Config]] = []
            for config in configs:
                if (seconds := _time(probe, key, config, device)) is not None:
                    times.append((seconds, config))
                progress.advance(bar)
            times.sort(key=lambda pair: pair[0])
            best = next((pair for pair in times if tuning.trusted(probe.op, key, pair[1], device)), None)
            if best is None:
                console.print(f"[yellow]{probe.op} {key}: none of {len(configs)} candidates is right here[/yellow]")
                continue
            first = next((seconds for seconds, config in times if config == configs[0]), None)
            gain = f", {first / best[0]:.2f}x the default's speed" if first else ""
            console.print(f"{probe.op} {key}: {best[0] * 1e3:.3g} ms{gain}  [dim]{json.dumps(best[1])}[/dim]")
            kept.setdefault(probe.op, {})[key] = best[1]
    about = {
        "gpu": torch.cuda.get_device_name(device),
        "triton": tuning.triton_version(),
        "torch": torch.__version__,
        "made by": "seqlong doctor --tune",
    }
    console.print(f"written to {tuning.save(device, kept, about)}\n")


def _time(probe: probes.Probe, key: str, config: tuning.Config, device: torch.device) -> float | None:
    """Seconds of a forward and backward pass with ``config``; None where it does not run (too large for the GPU)."""
    dtype, sizes, words = tuning.parse_key(key)
    widths = {**probe.large, **sizes}
    more: Any = {"length": TUNING_LENGTH, "sizes": widths | probe.widths(words, widths), "budget": 0.2}
    with tuning.using(probe.op, config, key):
        seconds, _ = _attempt(lambda: probes.measure(probe, "triton", device, dtype, **more))
    return None if seconds is None else float(seconds)


# -- What is shown ----------------------------------------------------------------------------------------------------


def _show(
    console: Console,
    facts: Sequence[Fact],
    findings: Sequence[Finding],
    used: Sequence[tuning.Settled],
    advice: Sequence[str],
    device: torch.device,
) -> None:
    tables = [_environment_table(facts), _ops_table(findings, device), _why_table(findings)]
    for table in [*tables, _used_table(used)] if used else tables:
        console.print(table)
        console.print()
    wrong = [sentence for finding in findings for sentence in finding.wrong]
    for title, sentences in (("[bold red]wrong[/bold red]", wrong), ("[bold]advice[/bold]", advice)):
        for sentence in sentences:
            console.print(f"{title}  {escape(sentence)}")
    if not wrong:
        console.print("[green]All ops are right on this machine.[/green]")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.show_header = any(headings)
    for heading in headings:
        table.add_column(heading)
    return table


def _environment_table(facts: Sequence[Fact]) -> Table:
    table = _table("Environment", "", "")
    for fact in facts:
        table.add_row(f"[dim]{escape(fact.name)}[/dim]", f"{'[red]' if fact.bad else ''}{escape(fact.value)}")
    return table


def _ops_table(findings: Sequence[Finding], device: torch.device) -> Table:
    dtype = next((name for finding in findings for name in finding.errors), "")
    headings = ("op", "runs as", f"output error, {dtype}", "gradient error", "speed")
    table = _table(f"Ops on the {'GPU' if device.type == 'cuda' else 'CPU'}", *headings)
    for finding in findings:
        output, gradient = _worst(finding, False), _worst(finding, True)
        table.add_row(finding.op, finding.runs_as, output, gradient, _speed(finding))
    table.columns[0].no_wrap = True
    return table


def _why_table(findings: Sequence[Finding]) -> Table:
    """Reasons, each once, with the ops that it is for."""
    table = _table("Why", "", "")
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        reasons.setdefault(finding.reason, []).append(finding.op)
    for reason, ops in reasons.items():
        table.add_row(escape("\n".join(ops)), f"[dim]{escape(reason)}[/dim]")
    table.columns[0].no_wrap = True
    return table


def _worst(finding: Finding, gradients: bool) -> str:
    """The largest error over the cases of the first type, with that of plain torch in brackets."""
    cases = next(iter(finding.errors.values()), {})
    probe = probes.PROBES[finding.op]
    pairs = [pair for case in cases.values() for name, pair in case.items() if (name in probe.outputs) != gradients]
    if not pairs:
        return "[red]failed[/red]" if finding.wrong else "–"
    found, plain = (max(pair[side] for pair in pairs) for side in ("error", "plain"))
    brackets = "" if finding.runs_as == probe.yardstick else f" [dim]({plain:.1e})[/dim]"
    return f"[{'red' if finding.wrong else 'green'}]{found:.1e}[/]{brackets}"


def _speed(finding: Finding) -> str:
    if not finding.seconds:
        return "[dim]–[/dim]"
    text = f"{finding.seconds * 1e3:.3g} ms"
    if finding.reference_seconds:
        return f"{finding.reference_seconds / finding.seconds:.1f}x the reference, {text}"
    return f"{finding.plain_seconds / finding.seconds:.1f}x, {text}" if finding.plain_seconds else text


def _used_table(used: Sequence[tuning.Settled]) -> Table:
    table = _table("Configurations in use", "op", "for", "from", "settings")
    for one in used:
        settings = "none is right: plain torch" if one.config is None else json.dumps(one.config)
        source = one.source + ("" if one.checked else ", not checked")
        table.add_row(one.op, one.key, source, f"[dim]{escape(settings)}[/dim]")
    return table
