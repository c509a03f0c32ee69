"""A verb of LightningCLI, from a composed configuration to a finished run folder."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from seqlong import console, runs
from seqlong.callbacks import MetricsCsv, PredictionWriter, Preempted, Preemption, TensorBoard
from seqlong.callbacks.checkpoints import CONFIG_KEY, read_checkpoint
from seqlong.callbacks.preemption import EXIT_CODE
from seqlong.compose import Composed, compose, dump, from_dict, from_files, house_path
from seqlong.errors import CheckpointError, ConfigError, SeqlongError, located, nearest
from seqlong.explain import first_problem
from seqlong.inference.model import find
from seqlong.parallel.names import register as register_strategies
from seqlong.parallel.parts import head_of, mend

log = logging.getLogger("seqlong")

#: Keys of a LightningCLI configuration.
TOP_LEVEL = ("seed_everything", "run", "trainer", "model", "data", "ckpt_path", "verbose", "return_predictions")
VERBS = ("fit", "validate", "test", "predict")
#: How schedulers say that a process is to end: at once, and soon.
_STOPS = (signal.SIGTERM, signal.SIGUSR1)


class RunSettings:
    """Where the run folder goes.

    Args:
        name: of the folder, before the date; ``--ckpt_path last`` looks for runs of this name.
        root: folder that holds all runs.
        dir: the run folder itself; null makes root/name-date-time.
    """

    def __init__(self, name: str = "run", root: str = "runs", dir: str | None = None) -> None:
        self.name, self.root, self.dir = name, root, dir


class SeqlongCLI(LightningCLI):
    """LightningCLI that writes into a run folder and loads checkpoints of tensors and primitives only."""

    run_dir: Path

    def __init__(self, arguments: list[str], checkpoint: Path | None, continued: bool) -> None:
        self.checkpoint = checkpoint
        self.continued = continued
        self._argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns when there are arguments in both places
        quiet = {"exit_on_error": False}
        try:
            super().__init__(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                load_from_checkpoint_support=False,
                parser_kwargs={**quiet, **{verb: dict(quiet) for verb in VERBS}},
                args=arguments,
            )
        finally:
            sys.argv = self._argv

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {verb: skipped | {"ckpt_path", "weights_only"} for verb, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_class_arguments(RunSettings, "run")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        sys.argv = self._argv

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's would merge constructor arguments of the checkpoint; the configuration is complete."""

    def before_instantiate_classes(self) -> None:
        verb = str(self.subcommand)
        settings = self.config[verb]
        run = settings.run
        given = os.environ.get(runs.DIRECTORY_VARIABLE)
        if given:
            self.run_dir = Path(given)
        elif self.continued and self.checkpoint is not None:
            self.run_dir = self.checkpoint.absolute().parent.parent
        else:
            name = run.name if verb == "fit" else f"{run.name}-{verb}"
            self.run_dir = runs.create(run.root, name, run.dir or _shared_folder(run.root, name))
        os.environ[runs.DIRECTORY_VARIABLE] = str(self.run_dir)  # for the processes that Lightning starts
        if self.checkpoint is not None:
            os.environ[runs.CHECKPOINT_VARIABLE] = str(self.checkpoint)
        if runs.rank() == 0:
            runs.start(self.run_dir, run.name, resumed_from=self.checkpoint)
            self._write_config(verb)
            log.info("run folder %s", _relative(self.run_dir))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BaseException as error:
            mistake = _mistake_behind(error) or error  # jsonargparse wraps what a constructor raises
            if runs.rank() == 0:
                status = "stopped" if isinstance(mistake, Preempted | KeyboardInterrupt) else "failed"
                runs.finish(self.run_dir, status, f"{type(mistake).__name__}: {mistake}")
            if mistake is error:
                raise
            raise mistake from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: ``execute`` does it, when this object is complete."""

    def execute(self) -> None:
        """Run the verb."""
        super()._run_subcommand(str(self.subcommand))

    def _write_config(self, verb: str) -> None:
        text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="yaml")
        content = yaml.safe_load(text)[verb]
        content.get("trainer", {}).pop("default_root_dir", None)
        content.get("run", {}).update(dir=None)
        path = self.run_dir / "config.yaml"
        if path.is_file() and yaml.safe_load(path.read_text()) != content:
            earlier = len(list(self.run_dir.glob("config-*.yaml"))) + 1
            path.rename(self.run_dir / f"config-{earlier}.yaml")
        runs.atomic_write(path, dump(content))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the run folder as its root and the run folder's loggers."""
        register_strategies()
        configured = self._get(self.config_init, "trainer").get("logger")
        loggers: Any = False
        if configured is not False:
            own = [MetricsCsv(self.run_dir / "metrics.csv"), TensorBoard(self.run_dir / "tensorboard")]
            more = configured if isinstance(configured, list) else [configured]
            loggers = own + [logger for logger in more if logger not in (None, True)]
        try:
            trainer = super().instantiate_trainer(default_root_dir=str(self.run_dir), logger=loggers, **kwargs)
        except (ValueError, MisconfigurationException) as error:  # how Lightning's Trainer refuses a setting
            raise ConfigError("trainer: " + " ".join(str(error).split())) from error
        if self.subcommand == "predict":
            trainer.callbacks.insert(0, PredictionWriter())  # type: ignore[attr-defined]
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        if self.checkpoint is not None:
            compare_with_checkpoint(self.model, self.checkpoint)
        given = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            given["return_predictions"] = False
        elif subcommand != "fit":
            given["verbose"] = False  # ours is printed instead
        checkpoint = str(self.checkpoint) if self.checkpoint else None
        return {**given, "ckpt_path": checkpoint, "weights_only": True}


def launch(verb: str, overrides: Sequence[str], flags: Sequence[str]) -> int:
    """Run a verb and return the exit status.

    Args:
        verb: fit, validate, test or predict.
        overrides: Hydra overrides, ``key=value``.
        flags: everything that begins with a dash, as ``--key=value``.

    Raises:
        SeqlongError: a mistake in what the user gave.
    """
    console.set_up()
    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _terminated) for number in _STOPS} if main_thread else {}
    try:
        return _launch(verb, overrides, flags)
    except Preempted as stop:
        log.info("%s", stop)
        return EXIT_CODE
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminated(number: int, frame: Any) -> None:
    """A signal while a run is set up; during training the callback Preemption handles it."""
    raise Preempted(f"stopped by {signal.Signals(number).name} outside of training")


def _launch(verb: str, overrides: Sequence[str], flags: Sequence[str]) -> int:
    checkpoint_flag, config_flags, rest = _take(flags)
    child = os.environ.get(runs.DIRECTORY_VARIABLE)
    if child:  # a process that the first one started: exactly its configuration
        composed = from_files([Path(child) / "config.yaml"])
        chosen = os.environ.get(runs.CHECKPOINT_VARIABLE)
        return _run(verb, composed, [], Path(chosen) if chosen else None, continued=False)
    composed, checkpoint, continued = _choose(verb, overrides, config_flags, checkpoint_flag)
    try:
        return _run(verb, composed, rest, checkpoint, continued)
    finally:
        os.environ.pop(runs.DIRECTORY_VARIABLE, None)
        os.environ.pop(runs.CHECKPOINT_VARIABLE, None)


def _choose(
    verb: str, overrides: Sequence[str], config_flags: Sequence[str], wanted: str | None
) -> tuple[Composed, Path | None, bool]:
    """The configuration, the checkpoint, and whether the run goes on in the folder of that checkpoint."""
    described = bool(config_flags) or any(
        word.startswith(("experiment=", "model=", "data=", "task=")) for word in overrides
    )
    if wanted is None and verb != "fit":
        raise ConfigError(
            f"seqlong {verb} needs --ckpt_path: a file, a run folder, 'last' or 'best'. Its configuration is in the "
            "checkpoint; key=value overrides go on top"
        )
    composed = None
    if config_flags:
        composed = from_files(config_flags, overrides)
    elif described or wanted is None:
        composed = compose(overrides)
    if wanted is None:
        assert composed is not None
        return composed, None, False
    folder = wanted not in ("last", "best") and (Path(wanted).expanduser() / "checkpoints").is_dir()
    if folder:  # a run: training goes on from its last step, and the best is measured
        run = Path(wanted).expanduser().absolute()
        checkpoint = _mend(run / "checkpoints" / "last.ckpt") if verb == "fit" else find(run)
        if not checkpoint.is_file():
            raise CheckpointError(f"{run} has no checkpoints/last.ckpt to continue from")
    else:
        checkpoint = _resolve_checkpoint(wanted, composed, overrides)
    if composed is None:
        stored = read_checkpoint(checkpoint, weights=False).get(CONFIG_KEY)
        if not isinstance(stored, dict):
            raise CheckpointError(f"{checkpoint} holds no configuration; name one with experiment=... or --config FILE")
        composed = from_dict(stored, overrides)
    return composed, checkpoint, verb == "fit" and (wanted == "last" or folder)


def _resolve_checkpoint(wanted: str, composed: Composed | None, overrides: Sequence[str]) -> Path:
    if wanted not in ("last", "best"):
        path = head_of(Path(wanted).expanduser())
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint {wanted}; expected a file, a run folder, 'last' or 'best'")
        return path.absolute()
    settings: dict[str, Any] = dict(composed.house.get("run") or {}) if composed else {}
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("run.root", "run.name", "run.dir"):
            settings[key[4:]] = value
    if settings.get("dir"):
        run = Path(settings["dir"]).expanduser().absolute()
        if wanted == "last":
            _mend(run / "checkpoints" / "last.ckpt")
        if not (run / "checkpoints" / "last.ckpt").is_file():
            raise CheckpointError(f"{run} has no checkpoints/last.ckpt to continue from")
    else:
        model = (composed.lightning.get("model") or {}) if composed else {}
        backbone = (model.get("init_args") or {}).get("backbone")
        run = runs.newest(settings.get("root", "runs"), settings.get("name"), backbone)
    return _mend(run / "checkpoints" / "last.ckpt") if wanted == "last" else runs.best_checkpoint(run)


def _mend(last: Path) -> Path:
    """``last``, which names the newest checkpoint in parts that is whole."""
    if runs.rank() == 0 and (done := mend(last)):
        log.warning("%s", done)
    return last


def _run(verb: str, composed: Composed, flags: Sequence[str], checkpoint: Path | None, continued: bool) -> int:
    config = composed.lightning
    config.pop("ckpt_path", None)
    earlier = runs.read_json(checkpoint.parent.parent / "run.json", None) if continued and checkpoint else None
    with tempfile.TemporaryDirectory(prefix="seqlong-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump(config))
        try:
            cli = SeqlongCLI([verb, "--config", str(path), *flags], checkpoint, continued)
        except argparse.ArgumentError as error:
            raise _explain(error, composed, config) from error
    try:
        cli.execute()
    except Preempted:
        return _ended(verb, cli, "stopped", None, EXIT_CODE)
    except KeyboardInterrupt:
        return _ended(verb, cli, "stopped", "KeyboardInterrupt", 130)
    except SystemExit:  # Lightning's answer to Ctrl-C
        return _ended(verb, cli, "stopped", "KeyboardInterrupt", 130)
    except BaseException as error:
        translated = _translated(error)
        if earlier is not None and isinstance(translated, CheckpointError):
            runs.write_json(cli.run_dir / "run.json", earlier)  # nothing happened to that run
            raise translated from error
        _ended(verb, cli, "failed", f"{type(translated).__name__}: {translated}", 1)
        if translated is error:
            raise
        raise translated from error
    preempted = any(isinstance(c, Preemption) and c.reason for c in cli.trainer.callbacks)  # type: ignore[attr-defined]
    return _ended(verb, cli, "stopped" if preempted else "finished", None, EXIT_CODE if preempted else 0)


def _ended(verb: str, cli: SeqlongCLI, status: str, error: str | None, code: int) -> int:
    """Close the run folder: status, report, last words. Returns the exit status of this process."""
    folder, launcher = cli.run_dir, cli.trainer.strategy.launcher
    own = launcher if isinstance(launcher, _SubprocessScriptLauncher) else None
    processes = list(own.procs) if own is not None else []
    if own is not None:
        # Lightning's observer kills this process when one that it started ends first with an error, in the middle of
        # the report. It looks at this very list.
        own.procs.clear()
    if runs.rank() == 0:
        runs.finish(folder, status, error)
        if verb == "fit":
            _write_report(folder)
        elif status == "finished":
            _print_metrics(cli.trainer)
        log.info("%s: %s", status, _relative(folder))
        if status == "stopped" and verb == "fit":
            saved = (folder / "checkpoints" / "last.ckpt").is_file()
            log.info("continue with --ckpt_path last" if saved else "nothing to continue: no step was finished")
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it waits for this one in a collective
            process.kill()
    # While the first still saves or reports, an exit status of 143 of another would look like a crash to that observer,
    # or to torchrun, which then kills the first.
    return 0 if runs.rank() != 0 and code == EXIT_CODE else code


def _write_report(folder: Path) -> None:
    try:
        from seqlong.report import write_report

        log.info("report %s", _relative(Path(write_report(folder) or folder / "report.html")))
    except Exception as error:  # a report that fails must not hide what the run itself has to say
        log.warning("no report: %s: %s", type(error).__name__, error)
        log.debug("%s", traceback.format_exc())


def _print_metrics(trainer: Trainer) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for name, value in sorted(trainer.callback_metrics.items()):
        table.add_row(name, f"{float(value):.6g}")
    if table.row_count:
        Console().print(table)


# --- checkpoints and errors ------------------------------------------------------------------------------------------


def compare_with_checkpoint(model: LightningModule, path: Path, shown: int = 6) -> None:
    """Raise a CheckpointError unless the checkpoint has exactly the model's tensors, each of its shape."""
    ours = model.state_dict()
    if not ours:  # built later, by configure_model
        return
    theirs = read_checkpoint(path, weights=False)["state_dict"]
    missing = [name for name in ours if name not in theirs]
    unexpected = [name for name in theirs if name not in ours]
    shapes = [
        f"{name}: {tuple(theirs[name].shape)} in the checkpoint, {tuple(ours[name].shape)} in the model"
        for name in ours
        if name in theirs and tuple(ours[name].shape) != tuple(theirs[name].shape)
    ]
    lines = []
    for title, names in (
        ("not in the checkpoint", missing),
        ("not in the model", unexpected),
        ("of another shape", shapes),
    ):
        if names:
            more = [f"    and {len(names) - shown} more"] if len(names) > shown else []
            lines += [f"  {len(names)} {title}:", *(f"    {name}" for name in names[:shown]), *more]
    if lines:
        raise CheckpointError(
            "\n".join(
                [
                    f"{path} is of another architecture than this configuration:",
                    *lines,
                    "Leave out the settings of the model (the checkpoint holds its own), or train a new one without "
                    "--ckpt_path",
                ]
            )
        )


def _translated(error: BaseException) -> BaseException:
    """Lightning's way of saying what the user can mend, in our words."""
    text = str(error)
    if "Error(s) in loading state_dict" in text:
        lines = [line.strip() for line in text.splitlines()[1:6]]
        return CheckpointError("the checkpoint does not fit the model:\n  " + "\n  ".join(lines))
    if isinstance(error, MisconfigurationException):
        return ConfigError(" ".join(text.split()))
    return error


def _mistake_behind(error: BaseException) -> SeqlongError | None:
    """The SeqlongError that led to ``error``, if one did."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, SeqlongError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def _explain(error: argparse.ArgumentError, composed: Composed, config: dict[str, Any]) -> SeqlongError:
    """One sentence instead of jsonargparse's list of all alternatives of all unions."""
    if mistake := _mistake_behind(error):
        return mistake
    text = str(error)
    if found := re.search(r"[Uu]nrecognized arguments?: (\S+)", text):
        name = found.group(1).lstrip("-").partition("=")[0]
        from lightning.pytorch.cli import LightningArgumentParser

        parser = LightningArgumentParser()
        parser.add_lightning_class_args(Trainer, "trainer")
        names = [action.dest for action in parser._actions] + ["ckpt_path", "config", "print_config"]
        return ConfigError(f"--{name} is no flag{nearest(name, names) or '; see seqlong fit --help'}")
    problem = first_problem(config, TOP_LEVEL)
    if problem is None:
        text = re.sub(r'Parser key "([^"]+)":', r"\1:", re.sub(r"<class '([^']+)'>", r"\1", text))
        lines = [line.strip() for line in text.splitlines() if line.strip() and "Given value" not in line]
        return ConfigError(" ".join(lines[:1] + lines[-1:] if len(lines) > 1 else lines))
    name = ".".join(str(part) for part in house_path(problem.path, config))
    message = f"{name}{'' if problem.message.startswith('is ') else ':'} {problem.message}"
    given = next((line for key, line in composed.overrides.items() if key.lstrip("+~") == name), None)
    place = composed.where(problem.path)
    if problem.meant is not None and (meant := composed.where(problem.meant)):
        message += f" That one is set in {meant[0]}:{meant[1]}"
    elif given is not None:
        nearby = place or composed.where(problem.path[:-1])
        message += f" ({'set' if place else 'its section is'} in {nearby[0]}:{nearby[1]})" if nearby else ""
    if given is not None:
        return ConfigError(f"{message} (given on the command line: {given})")
    return ConfigError(located(place[0], place[1], message) if place else message)


# --- parts ------------------------------------------------------------------------------------------------------------


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def _take(flags: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """Split flags into the value of --ckpt_path, those of --config, and the rest."""
    checkpoint, configs, rest = None, [], []
    for flag in flags:
        name, _, value = flag.partition("=")
        if name == "--ckpt_path":
            checkpoint = value or None
        elif name in ("--config", "-c"):
            configs.append(value)
        else:
            rest.append(flag)
    return checkpoint, configs, rest


def _shared_folder(root: str, name: str) -> str | None:
    """The folder of a run whose processes were all started from outside (torchrun, srun): they must agree on it."""
    launched = os.environ.get("SLURM_JOB_ID") if "SLURM_PROCID" in os.environ else os.environ.get("TORCHELASTIC_RUN_ID")
    world = os.environ.get("SLURM_NTASKS") if "SLURM_PROCID" in os.environ else os.environ.get("WORLD_SIZE")
    if (
        not (world or "").isdigit()
        or int(world or 1) < 2
        or (os.environ.get("LOCAL_RANK") is None and launched is None)
    ):
        return None
    if not launched or launched == "none":
        raise ConfigError(
            f"{world} processes were started from outside and cannot agree on a run folder by themselves. Give one: "
            "run.dir=runs/my-run"
        )
    return str(Path(root) / f"{name}-job{launched}")
