"""The shape of the house: packages, symlinks, which way imports point, what is shipped."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("kernels", "datamodules", "tasks", "configs")  # root folders that are imported as seqlong.<folder>
LONGEST_FILE = 500

# What each part may import of seqlong, beside itself. A new file or folder in seqlong/ needs a line here: where it
# stands is a decision. `...` is everything: the programs at the top, which nothing below may import.
BASE = {"batch", "errors", "fragment", "labels", "layout", "tracks"}
MODEL = {
    "backbone", "block", "cost", "embeddings", "ffn", "heads", "mixers", "norms", "offload", "parallel", "positions",
    "state", "strands",
}  # fmt: skip
UNDER_TASKS = BASE | {"kernels", "runs"} | MODEL
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "kernels": BASE,
    **{name: BASE | {"kernels"} | MODEL for name in MODEL},
    "datamodules": {"batch", "errors", "labels", "tracks"},
    "runs": {"errors"},
    "metrics": BASE,
    "optim": UNDER_TASKS,
    "callbacks": UNDER_TASKS,
    "tasks": UNDER_TASKS | {"callbacks", "metrics", "optim"},
    "configs": {"datamodules", "errors"},  # what interpolations compute
}
TOP = {
    "bench",
    "cli",
    "compose",
    "config_files",
    "console",
    "convert",
    "doctor",
    "explain",
    "help",
    "inference",
    "launch",
    "machine",
    "planning",
    "recall",
    "report",
    "shards",
    "show",
    "slurm",
    "sweep",
    "tokenizer",
    "video",
    "video_codes",
    "video_stream",
    "words",
}


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("seqlong", *MAPPED, "tests", "benchmarks")]
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*.py")
        if not any((ROOT / "seqlong" / name) in path.parents for name in MAPPED)  # once, not through the symlinks
    )


def module_of(path: Path) -> str:
    """``kernels/norm/op.py`` -> ``seqlong.kernels.norm.op``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "seqlong" else ("seqlong", *parts))


def imports_of(path: Path) -> list[tuple[int, str, int]]:
    """``(line, dotted name, level)`` of every import, wherever in the file; names for type checkers count too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from seqlong import runs` names a module; `from seqlong.errors import x` names what is in one.
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "seqlong" else [node.module]
            )
            found += [(node.lineno, name or "", node.level) for name in names]
    return found


def wrong_imports(part: str, path: Path) -> list[str]:
    """Imports of a file of ``seqlong.<part>`` that point the forbidden way."""
    wrong = []
    for line, name, level in imports_of(path):
        where = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}:{line}"
        head, _, rest = name.partition(".")
        if level:
            wrong.append(f"{where} imports relatively; write `from seqlong.x import y`")
        elif head in MAPPED:
            wrong.append(f"{where} imports plain `{head}`; write seqlong.{head}")
        elif head == "seqlong" and part in MAY_IMPORT:
            target = rest.partition(".")[0]
            if target and not target.startswith("__") and target != part and target not in MAY_IMPORT[part]:
                wrong.append(f"{where}: {part} may not import seqlong.{target}")
    return wrong


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    inside = parts[1:] if parts[0] == "seqlong" else parts
    return Path(inside[0]).stem


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_listed_are_the_packages_on_disk() -> None:
    on_disk = {module_of(path) for path in python_files() if path.name == "__init__.py" and path.parts[-2] != "tests"}
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed)), "a package is listed twice in pyproject.toml"
    assert set(listed) == on_disk, (
        f"not in pyproject.toml: {on_disk - set(listed)}; not on disk: {set(listed) - on_disk}"
    )


def test_every_folder_with_python_files_is_a_package() -> None:
    """A forgotten __init__.py works from a clone and is missing from the wheel."""
    folders = {path.parent for path in python_files() if path.relative_to(ROOT).parts[0] in ("seqlong", *MAPPED)}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", MAPPED)
def test_symlinks_make_a_bare_clone_agree_with_the_mapping(name: str) -> None:
    link = ROOT / "seqlong" / name
    assert link.is_symlink(), f"{link} is not a symbolic link (a checkout without symlink support?)"
    assert link.readlink() == Path("..") / name
    assert pyproject()["tool"]["setuptools"]["package-dir"][f"seqlong.{name}"] == name


def test_every_part_has_its_place() -> None:
    parts = {part_of(path) for path in python_files() if path.relative_to(ROOT).parts[0] in ("seqlong", *MAPPED)}
    unknown = parts - set(MAY_IMPORT) - TOP - {"__init__"}
    assert unknown == set(), f"say in {Path(__file__).name} what these may import: {sorted(unknown)}"


def test_imports_point_the_allowed_way() -> None:
    wrong = [
        line
        for path in python_files()
        for line in wrong_imports(part_of(path) if path.relative_to(ROOT).parts[0] != "tests" else "tests", path)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("part", "line", "complaint"),
    [
        ("kernels", "from seqlong.mixers import Mamba2", "kernels may not import seqlong.mixers"),
        ("datamodules", "from seqlong import runs", "datamodules may not import seqlong.runs"),
        ("datamodules", "import seqlong.layout", "datamodules may not import seqlong.layout"),
        ("callbacks", "from seqlong.tasks.causal import CausalLM", "callbacks may not import seqlong.tasks"),
        ("tasks", "def f():\n    from seqlong.datamodules import x", "tasks may not import seqlong.datamodules"),
        ("mixers", "from seqlong.cli import main", "mixers may not import seqlong.cli"),
        ("mixers", "from .base import Mixer", "imports relatively"),
        ("cli", "import kernels.norm", "imports plain `kernels`"),
        ("cli", "from tasks import x", "imports plain `tasks`"),
    ],
)
def test_the_checker_sees_a_wrong_import(part: str, line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)
    assert [complaint in wrong for wrong in wrong_imports(part, path)] == [True]


def test_no_python_file_is_longer_than_a_sitting() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def committed_texts() -> list[Path]:
    """Text files of the repository: those that git knows, or all of an unpacked archive."""
    known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if known.returncode == 0 and known.stdout:
        paths = [ROOT / name for name in known.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not {".git", ".venv", "runs"} & set(path.relative_to(ROOT).parts)]
    endings = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".cfg", ".txt", ".sh", ""}
    return [path for path in paths if path.is_file() and not path.is_symlink() and path.suffix in endings]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    # Put together, so that this file does not name them itself.
    places = re.compile(
        "|".join(rf"(?<![\w.~*-])/{name}/" for name in ("work", "home", "root", "Users")) + "|/tmp/" + "w/"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in committed_texts()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if places.search(line)
    ]
    assert found == []


def test_the_wheel_holds_what_a_user_needs(tmp_path: Path) -> None:
    """Built from a copy of what git knows and what is new, so that leftovers of an earlier build cannot help."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).exists() else b"")
    for folder in ("seqlong", *MAPPED):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT)
            through_link = any((ROOT / "seqlong" / name) in [path, *path.parents] for name in MAPPED)
            if path.is_file() and not through_link and "__pycache__" not in path.parts:
                (source / inside).parent.mkdir(parents=True, exist_ok=True)
                (source / inside).write_bytes(path.read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools, the build backend, is not installed here")
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    expected = {"seqlong/py.typed", "seqlong/datamodules/dna/data/ecoli_k12_mg1655.fasta.gz"}
    expected |= {f"seqlong/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {f"seqlong/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("README.md")}
    expected |= {
        f"{module_of(path).replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in ("seqlong", *MAPPED)
    }
    assert sorted(expected - shipped) == []
    assert sorted(name for name in shipped if name.split("/")[0] in MAPPED) == [], "installed as plain packages"
