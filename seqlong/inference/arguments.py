"""What the commands of this folder share on the command line: errors in one sentence, the model, the progress bar."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seqlong import console
from seqlong.errors import ConfigError
from seqlong.inference.model import Model, load

log = logging.getLogger("seqlong")


class Parser(argparse.ArgumentParser):
    """argparse, with its mistakes as ours: a sentence and exit status 2."""

    def __init__(self, verb: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"seqlong {verb}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")

    def add_model(self) -> None:
        """``--ckpt``, ``--device``, ``--precision``, ``--root``."""
        self.add_argument(
            "--ckpt",
            "--ckpt_path",
            required=True,
            metavar="C",
            help="checkpoint: a file, a run folder, 'last' or 'best' (of the newest run)",
        )
        self.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto is the GPU if there is one")
        self.add_argument(
            "--precision",
            default="auto",
            choices=("auto", "bfloat16", "float32", "float64"),
            help="of products; auto is bfloat16 on a GPU and float32 on a CPU",
        )
        self.add_argument("--root", default="runs", metavar="FOLDER", help="where 'last' and 'best' look for runs")


def open_model(given: argparse.Namespace) -> Model:
    """The model that the flags of ``add_model`` name; says which it is."""
    console.set_up()
    model = load(given.ckpt, given.device, given.precision, given.root)
    log.info("%s: %s on %s in %s", _shown(model.path), type(model.task).__name__, model.device, model.precision)
    return model


def require_bases(model: Model, why: str) -> None:
    """Raise a ConfigError unless a token of the model is a base of DNA.

    Raises:
        ConfigError: it was trained on something else.
    """
    data = model.config.get("data") or {}
    settings = data.get("init_args") or {}
    tokenizer = settings.get("tokenizer")
    kind = str(data.get("class_path", ""))
    bases = tokenizer is None or str(tokenizer).rpartition(".")[2].lower() in ("base", "bases", "char", "single_base")
    if not bases or (kind and ".dna" not in kind):
        raise ConfigError(
            f"{model.path} was trained on {kind or 'unknown data'}{'' if bases else f' with tokenizer {tokenizer}'}, "
            f"but {why} needs a model whose tokens are single bases of DNA"
        )


def integer(text: str) -> int:
    """A whole number above 0; commas and underscores between its digits are for the eye."""
    plain = text.replace(",", "").replace("_", "").strip()
    if not plain.isdecimal() or int(plain) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(plain)


def integers(text: str) -> list[int]:
    """Several, with commas between them; their digits have none."""
    return [integer(part) for part in text.split(",") if part.strip()]


def _shown(path: Path) -> Path:
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path


@contextmanager
def progress(what: str, total: int | None, unit: str = "", done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every half minute elsewhere; gives a function that is told how many more are done."""
    screen = Console(stderr=True)
    began = time.monotonic()
    count, told = done, began
    if screen.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=screen, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done, rate="")

            def advance(more: int) -> None:
                nonlocal count
                count += more
                rate = (count - done) / max(1e-9, time.monotonic() - began)
                bar.update(task, advance=more, rate=f"{rate:,.0f} {unit}/s" if unit else "")

            yield advance
    else:

        def say(more: int) -> None:
            nonlocal count, told
            count += more
            now = time.monotonic()
            if now - told > 30:
                told = now
                rate = (count - done) / (now - began)
                left = "" if total is None or not rate else f", {(total - count) / rate:,.0f} s left"
                of = "" if total is None else f" of {total:,}"
                print(f"{what}: {count:,}{of} {unit}, {rate:,.1f}/s{left}", file=sys.stderr, flush=True)

        yield say


__all__ = ["Parser", "integer", "integers", "open_model", "progress", "require_bases"]
