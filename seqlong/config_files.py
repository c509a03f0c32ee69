"""The YAML files of the config groups: what there is, which took part, and on which line a setting stands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seqlong.errors import ConfigError, located


def _configs_folder() -> Path:
    import seqlong.configs

    return Path(next(iter(seqlong.configs.__path__))).resolve()


CONFIGS = _configs_folder()


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file and the place in the whole configuration where its content goes."""

    path: Path
    package: tuple[str, ...]


#: A folder of configs/ that no run is composed from: what ``seqlong launch`` reads.
LAUNCH = "launch"


@cache
def groups() -> tuple[str, ...]:
    """The config groups: folders of configs/."""
    folders = (path.name for path in CONFIGS.iterdir() if path.is_dir() and not path.name.startswith("_"))
    return tuple(sorted(name for name in folders if name != LAUNCH))


@cache
def options(group: str) -> tuple[str, ...]:
    """The options of a group, such as ``dna/demo`` of ``experiment``."""
    folder = CONFIGS / group
    return tuple(sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")))


def summary(group: str, option: str) -> str:
    """The first comment of an option's file, its one-line description."""
    for line in (CONFIGS / group / f"{option}.yaml").read_text().splitlines():
        text = line.lstrip("# ").strip()
        if not line.startswith("#"):
            break
        if text and not text.startswith("@package"):
            return text
    return ""


def load_yaml(path: Path) -> DictConfig:
    """Read a YAML mapping.

    Raises:
        ConfigError: no such file, not YAML, or no mapping; with the line.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        content = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise ConfigError(located(path, line, f"not valid YAML: {error.problem}")) from error
    except (OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: expected settings as 'key: value' lines; found a list")
    return content


def composed_files(choices: dict[str, str], own: Mapping[str, Path] | None = None) -> list[ConfigFile]:
    """The files that a choice of options is made of, in the order of rising precedence.

    ``own``: files of the user's own, by group.
    """
    files: list[ConfigFile] = [ConfigFile(CONFIGS / "config.yaml", ())]
    for group in sorted(choices, key=lambda name: name == "experiment"):
        if own is not None and group in own:
            files.append(ConfigFile(own[group], () if group == "experiment" else tuple(group.split("/"))))
        else:
            _add(files, group, choices[group])
    return files


def _add(files: list[ConfigFile], group: str, option: str) -> None:
    path = CONFIGS / group / f"{option}.yaml"
    if not path.is_file() or any(file.path == path for file in files):
        return
    text = path.read_text()
    declared = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
    package = tuple(group.split("/"))
    if declared:
        package = () if declared.group(1) == "_global_" else tuple(declared.group(1).split("."))
    content = yaml.safe_load(text) or {}
    for entry in content.get("defaults", []) if isinstance(content, dict) else []:
        if isinstance(entry, str) and entry != "_self_":
            parent = str(Path(option).parent / entry) if not entry.startswith("/") else entry.lstrip("/")
            if entry.startswith("/"):
                other, _, name = parent.partition("/")
                _add(files, other, name)
            else:
                _add(files, group, parent)
    files.append(ConfigFile(path, package))


def locate(files: Sequence[ConfigFile], path: Sequence[str | int]) -> tuple[Path, int] | None:
    """File and line (from 1) that define the setting at ``path``, in the file with the highest precedence."""
    for file in reversed(files):
        if tuple(path[: len(file.package)]) != file.package:
            continue
        line = _line(file.path, path[len(file.package) :])
        if line is not None:
            return shown(file.path), line
    return None


def shown(path: Path) -> Path:
    """``path`` as people would type it from here."""
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _line(path: Path, keys: Sequence[str | int]) -> int | None:
    try:
        node: Any = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError):
        return None
    line = None
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(key)), None)
            if found is None:
                return None
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            return None
    return line
