"""The README tells the truth: every command that it shows is run, shortened, in its order and in one folder.

A block that cannot run here (a GPU, hours, a file of the reader's) has ``<!-- not run: reason -->`` on the line above
its fence; what it trains or evaluates must still compose.
"""

from __future__ import annotations

import gzip
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from seqlong.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHELL = {"console", "bash", "sh", "shell"}
LIGHTNING = {"fit", "validate", "test", "predict"}
SECONDS = 120  # the most that one command may take; a shortened one takes about five on an idle machine

# Two steps on tiny rows: the command and its configuration are tested here, not what it learns.
SHORT = {
    "trainer.log_every_n_steps": "1",
    "trainer.val_check_interval": "2",
    "trainer.limit_val_batches": "1",
    "trainer.limit_test_batches": "1",
    "trainer.limit_predict_batches": "1",
    "trainer.accumulate_grad_batches": "1",
    "data.stages": "null",
    "data.length": "256",
    "data.batch_size": "2",
    "data.eval_length": "null",
    "data.eval_batch_size": "null",
}


@dataclass
class Block:
    """A fenced block: its language, text, first line, and why it is not run (None: it is)."""

    language: str
    text: str
    line: int
    skipped: str | None = None


@dataclass
class Command:
    """One command line of a block."""

    words: list[str]
    line: int
    skipped: str | None = None

    def __str__(self) -> str:
        return f"{self.line}: {shlex.join(self.words)}"


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    found: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"^(\s*)(`{3,}|~{3,})\s*([\w+-]*)", lines[number])
        if not fence:
            number += 1
            continue
        end = number + 1
        while end < len(lines) and lines[end].strip() != fence[2]:
            end += 1
        above = next((line for line in reversed(lines[:number]) if line.strip()), "")
        marked = re.match(r"^\s*<!--\s*not run:\s*(.+?)\s*-->\s*$", above)
        found.append(Block(fence[3], "\n".join(lines[number + 1 : end]), number + 2, marked[1] if marked else None))
        number = end + 1
    return found


def commands(text: str) -> list[Command]:
    """The ``seqlong`` and ``make`` lines of the shell blocks; a backslash continues a line, ``$`` is a prompt."""
    found = []
    for block in blocks(text):
        if block.language not in SHELL:
            continue
        joined, start = "", block.line
        for number, line in enumerate(block.text.split("\n"), block.line):
            start = start if joined else number
            joined += line.rstrip().removesuffix("\\") + " " if line.rstrip().endswith("\\") else line
            if line.rstrip().endswith("\\"):
                continue
            command = joined.strip().removeprefix("$ ").strip()
            joined = ""
            if command.startswith(("seqlong ", "make ")) or command in ("seqlong", "make"):
                found.append(Command(shlex.split(command, comments=True), start, block.skipped))
    return found


def shortened(words: list[str], steps: int) -> list[str]:
    """A command with what makes it long replaced; every other word stays as the README has it."""
    verb = words[1] if len(words) > 1 else ""
    if verb not in LIGHTNING | {"sweep"}:
        return words
    short = SHORT | {"trainer.max_steps": str(steps)}
    kept = [word for word in words if word.lstrip("-").partition("=")[0] not in short]
    varied = [word for word in kept if verb == "sweep" and "=" in word and "," in word]
    for number, word in enumerate(varied):  # two jobs: two values of the first setting, one of each other
        key, _, values = word.partition("=")
        kept[kept.index(word)] = f"{key}={','.join(values.split(',')[: 2 if number == 0 else 1])}"
    return kept + [f"{key}={value}" for key, value in short.items()]


def composition(words: list[str]) -> list[str] | None:
    """The arguments that print what ``words`` would run with, without its checkpoint; None for other verbs."""
    if len(words) < 2 or words[1] not in LIGHTNING:
        return None
    rest, skip = [], False
    for word in words[2:]:
        if not skip and not word.startswith("--ckpt_path"):
            rest.append(word)
        skip = word == "--ckpt_path"
    if not any(word.startswith(("experiment=", "model=", "--config")) for word in rest):
        rest.insert(0, "experiment=dna/demo")
    return ["fit", *rest, "--print_config"]


TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
SHOWN = commands(TEXT)
PYTHON = [block for block in blocks(TEXT) if block.language == "python"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all commands, in the order of the README."""
    return tmp_path_factory.mktemp("readme")


def environment(place: Path) -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("SEQLONG_")},
        "OMP_NUM_THREADS": "1",
        "SEQLONG_CACHE": str(place / "cache"),
        "COLUMNS": "120",
    }


def program() -> str:
    """The ``seqlong`` command beside the Python that runs the tests."""
    found = Path(sys.executable).with_name("seqlong")
    if not found.is_file():
        pytest.skip(f"no seqlong command beside {sys.executable}; install the package")
    return str(found)


def run(place: Path, arguments: list[str]) -> str:
    """Run a command to its end and return what it printed; fail with all that it said."""
    started = time.monotonic()
    done = subprocess.run(
        arguments, cwd=place, env=environment(place), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    told = f"{shlex.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, f"exit status {done.returncode} after {time.monotonic() - started:.0f} s: {told}"
    return done.stdout


def give_files(place: Path, words: list[str]) -> None:
    """The reader's own sequence files: two records of a few thousand bases under the names that the README uses."""
    for word in words:
        key, _, name = word.partition("=")
        if (
            key.lstrip("-") != "data.path"
            or not re.search(r"\.(fa|fasta|fna)(\.gz)?$", name)
            or (place / name).exists()
        ):
            continue
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bases = "".join("ACGT"[(i * i // 7 + i) % 4] for i in range(60_000))
        content = f">one\n{bases[:40_000]}\n>two\n{bases[40_000:]}\n".encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def test_there_is_a_readme_with_commands() -> None:
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    assert any(command.words[:1] == ["seqlong"] for command in SHOWN), "README.md shows no seqlong command"
    assert any(command.words[:2] == ["make", "demo"] for command in SHOWN)


@pytest.mark.parametrize("command", [c for c in SHOWN if c.words[0] == "make"], ids=str)
def test_make_targets_exist(command: Command) -> None:
    targets = set(re.findall(r"^([A-Za-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    asked = [word for word in command.words[1:] if "=" not in word and not word.startswith("-")]
    assert asked and set(asked) <= targets, f"the Makefile has {sorted(targets)}"


@pytest.mark.parametrize("command", [c for c in SHOWN if c.words[0] == "seqlong" and c.skipped], ids=str)
def test_commands_that_are_not_run_compose(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: another would import everything again."""
    arguments = composition(command.words)
    if arguments is None:
        pytest.skip(f"not run: {command.skipped}")
    monkeypatch.chdir(place)
    try:
        status: object = main(arguments)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert not status, printed.err
    assert "class_path" in printed.out


@pytest.mark.parametrize("command", [c for c in SHOWN if c.words[0] == "seqlong" and not c.skipped], ids=str)
def test_commands_run(command: Command, place: Path) -> None:
    give_files(place, command.words)
    resumes = "--ckpt_path" in shlex.join(command.words)
    words = shortened(command.words, steps=4 if resumes else 2)
    runs = sorted((place / "runs").glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    # `runs/demo-...` in a text stands for whichever run the commands before made.
    words = [
        re.sub(r"runs/[\w-]*\.\.\.", lambda _: str(runs[-1].parent.relative_to(place)), w) if runs else w for w in words
    ]
    run(place, [program(), *words[1:]])


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: str(block.line))
def test_python_blocks(block: Block, place: Path) -> None:
    compile(block.text, f"README.md, line {block.line}", "exec")
    if not block.skipped:
        run(place, [sys.executable, "-c", block.text])


SAMPLE = """\
# Title

```console
$ make demo                # a comment
git clone somewhere
seqlong fit experiment=dna/demo \\
    trainer.max_steps=50 seed=3
```

<!-- not run: needs a GPU -->

```bash
seqlong fit experiment=big --ckpt_path last
```

```text
seqlong nothing
```

```python
print("seqlong fit")
```
<!-- not run: slow -->
~~~python
x = 1
~~~
"""


def test_the_reader_of_the_readme_finds_blocks_and_commands() -> None:
    found = commands(SAMPLE)
    assert [(command.line, command.skipped) for command in found] == [(4, None), (6, None), (13, "needs a GPU")]
    assert found[0].words == ["make", "demo"]
    assert found[1].words == ["seqlong", "fit", "experiment=dna/demo", "trainer.max_steps=50", "seed=3"]
    python = [(block.text, block.skipped) for block in blocks(SAMPLE) if block.language == "python"]
    assert python == [('print("seqlong fit")', None), ("x = 1", "slow")]


def test_shortening_keeps_what_the_readme_says_but_the_size() -> None:
    words = shortened(
        shlex.split("seqlong fit experiment=x trainer.max_steps=50 --data.length=99 a.b=1,2 --ckpt_path last"), 2
    )
    assert words[:6] == ["seqlong", "fit", "experiment=x", "a.b=1,2", "--ckpt_path", "last"]
    assert "trainer.max_steps=2" in words and "data.length=256" in words and "trainer.max_steps=50" not in words
    assert shortened(["seqlong", "report", "x"], 2) == ["seqlong", "report", "x"]
    sweep = shortened(shlex.split("seqlong sweep experiment=x a=1,2,3 seed=4,5"), 2)
    assert sweep[3:5] == ["a=1,2", "seed=4"]


def test_a_composition_leaves_the_checkpoint_out() -> None:
    assert composition(shlex.split("seqlong fit experiment=x --ckpt_path last a=1")) == [
        "fit",
        "experiment=x",
        "a=1",
        "--print_config",
    ]
    assert composition(shlex.split("seqlong test --ckpt_path=best")) == ["fit", "experiment=dna/demo", "--print_config"]
    assert composition(shlex.split("seqlong report x")) is None
