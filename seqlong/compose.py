"""Hydra config groups and overrides -> the one resolved configuration that LightningCLI reads.

House form (what people write): ``model.backbone``, ``task``, ``data``, ``trainer`` with callbacks by name, ``run``,
``seed``. LightningCLI form (what a run's config.yaml holds): ``model`` and ``data`` as class_path/init_args, callbacks
as a list, ``seed_everything``. :func:`to_lightning` and :func:`to_house` are each other's inverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from seqlong.config_files import CONFIGS, ConfigFile, composed_files, groups, load_yaml, locate, options, shown
from seqlong.errors import ConfigError, located, nearest

CONFIG_MODULE = "seqlong.configs"


@dataclass
class Composed:
    """A configuration in house form, and where its parts come from.

    Attributes:
        house: plain containers and primitives, resolved.
        files: the YAML files that took part, the ones that win last.
        overrides: what was given on the command line, as ``key -> text``.
        form: ``house`` or ``lightning``, the form in which ``files`` are written.
    """

    house: dict[str, Any]
    files: list[ConfigFile] = field(default_factory=list)
    overrides: dict[str, str] = field(default_factory=dict)
    form: str = "house"

    @property
    def lightning(self) -> dict[str, Any]:
        """The LightningCLI form."""
        return to_lightning(self.house)

    def where(self, path: Sequence[str | int]) -> tuple[Path, int] | None:
        """File and line that define the setting at ``path`` (LightningCLI form), or None."""
        parts = list(path) if self.form == "lightning" else house_path(path, self.lightning)
        return locate(self.files, parts)


def is_override(word: str) -> bool:
    """Whether a command line word is a Hydra override: ``key=value``, ``+key=value``, ``~key``."""
    return "=" in word or word.startswith("~")


def parse_overrides(words: Sequence[str]) -> list[Any]:
    """Parse Hydra overrides.

    Raises:
        ConfigError: a word without ``=``, or a value that Hydra cannot read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), []
    for word in words:
        if not is_override(word):
            hint = f"; did you mean 'experiment={word}'?" if word in options("experiment") else "."
            raise ConfigError(
                f"'{word}' has no '='{hint} Settings are given as key=value, such as trainer.max_steps=100, "
                "and flags as --flag=value"
            )
        try:
            parsed.append(parser.parse_override(word))
        except HydraException as error:
            raise ConfigError(
                f"cannot read '{word}': {str(error).splitlines()[0]}. Quote values that hold commas, brackets or "
                "spaces: 'key=\"a, b\"'"
            ) from error
    return parsed


def compose(words: Sequence[str] = (), hardware: str | None = None) -> Composed:
    """Compose the config groups with overrides.

    Args:
        words: overrides, such as ``["experiment=dna/demo", "trainer.max_steps=50"]``. Each group's option may
            also be the path of a YAML file of one's own.
        hardware: option of the group ``hardware`` unless ``words`` name one; None asks torch whether there is a GPU.

    Raises:
        ConfigError: an unknown group, option or key, a missing value, or YAML that cannot be read.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    parsed = parse_overrides(words)
    known = groups()
    chosen = {o.key_or_group: o for o in parsed if o.key_or_group in known}
    own = _register_own_files(chosen)
    for name, override in chosen.items():
        _check_option(name, str(override.value()), own)
    final = []
    for o in parsed:
        if o.key_or_group in own:
            final.append(f"{o.key_or_group}={_OWN_FILE}")
            continue
        if _names_class(o):  # another class: what the file gave to the one before would be merged into it
            final.append(f"++{o.key_or_group}=null")
        final.append(_forced(o, known))
    if "hardware" not in chosen:
        final.insert(0, f"hardware={hardware or _detect_hardware()}")

    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            config = hydra_compose("config", overrides=final, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain_composition(error, chosen, own) from error
    choices = {str(k): str(v) for k, v in config.hydra.runtime.choices.items() if "hydra" not in str(k) and v}
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    files = composed_files(choices, own)
    house = _resolve(config, files)
    run = house.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        named = {**choices, **{group: path.stem for group, path in own.items()}}
        experiment = named.get("experiment", "run")
        model = f"-{named['model']}" if "model" in chosen and "model" in named else ""
        run["name"] = experiment.replace("/", "-") + model
    given = {o.key_or_group: o.input_line for o in parsed}
    return Composed(house, files, given)


def from_files(paths: Sequence[str | Path], words: Sequence[str] = ()) -> Composed:
    """Read resolved LightningCLI files, such as a run's config.yaml; later files and then ``words`` win."""
    merged: Any = OmegaConf.create({})
    for path in paths:
        content = load_yaml(Path(path))
        if "task" in content or "defaults" in content:
            raise ConfigError(
                f"{path} is an experiment file, not a resolved configuration. Give it as experiment={path}"
            )
        merged = OmegaConf.merge(merged, content)
    config = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(config, dict)
    files = [ConfigFile(Path(path), ()) for path in paths]
    composed = from_dict({str(key): value for key, value in config.items()}, words)
    composed.files, composed.form = files, "lightning"
    return composed


def from_dict(config: dict[str, Any], words: Sequence[str] = ()) -> Composed:
    """A resolved LightningCLI configuration (as checkpoints hold it), with overrides on top in house form."""
    parsed = parse_overrides(words)
    known = groups()
    house: Any = OmegaConf.create(to_house(config))
    for override in parsed:
        key = override.key_or_group
        if key in known and not isinstance(override.value(), dict):
            raise ConfigError(
                f"'{override.input_line}' chooses a config group, which a finished configuration no longer has. "
                f"Set single values, such as {key}.name=value, or start from experiment=..."
            )
        if override.is_delete():
            parent, _, leaf = key.rpartition(".")
            node = OmegaConf.select(house, parent) if parent else house
            if not isinstance(node, DictConfig) or leaf not in node:
                raise ConfigError(f"'~{key}' removes nothing: there is no {key}")
            del node[leaf]
        else:
            OmegaConf.update(house, key, override.value(), merge=not _names_class(override), force_add=True)
    return Composed(_resolve(house, []), overrides={o.key_or_group: o.input_line for o in parsed})


# --- the two forms ---------------------------------------------------------------------------------------------------


def to_lightning(house: dict[str, Any]) -> dict[str, Any]:
    """House form -> LightningCLI form."""
    rest = dict(house)
    model, task, data = (_mapping(rest.pop(key, None), key) for key in ("model", "task", "data"))
    trainer = dict(_mapping(rest.pop("trainer", None), "trainer"))
    callbacks = trainer.get("callbacks")
    if isinstance(callbacks, dict):
        for name, node in callbacks.items():
            if isinstance(node, dict) and not node.get("class_path"):
                complete = [
                    key for key, value in callbacks.items() if isinstance(value, dict) and "class_path" in value
                ]
                raise ConfigError(
                    f"trainer.callbacks.{name} has no class_path{nearest(str(name), complete) or '.'} "
                    f"There are: {', '.join(map(str, complete))}"
                )
        trainer["callbacks"] = [value for value in callbacks.values() if value]
    lightning: dict[str, Any] = {"seed_everything": rest.pop("seed", 0), **rest, "trainer": trainer}
    if task or model:
        arguments = {**model, **{key: value for key, value in task.items() if key != "class_path"}}
        lightning["model"] = {"class_path": task.get("class_path"), "init_args": arguments}
    if data:
        arguments = {key: value for key, value in data.items() if key != "class_path"}
        lightning["data"] = {"class_path": data.get("class_path"), "init_args": arguments}
    return lightning


def to_house(lightning: dict[str, Any]) -> dict[str, Any]:
    """LightningCLI form -> house form. Callbacks are named after their class, in snake case."""
    rest = dict(lightning)
    house: dict[str, Any] = {"seed": rest.pop("seed_everything", 0)}
    for key, target in (("model", "task"), ("data", "data")):
        node = rest.pop(key, None)
        if node is None:
            continue
        node = {"class_path": node} if isinstance(node, str) else node
        arguments = dict(node.get("init_args") or {})
        if key == "model":
            house["model"] = {"backbone": arguments.pop("backbone")} if "backbone" in arguments else {}
        house[target] = {"class_path": node.get("class_path"), **arguments}
    trainer = dict(rest.pop("trainer", None) or {})
    if isinstance(trainer.get("callbacks"), list):
        trainer["callbacks"] = dict(zip(callback_names(trainer["callbacks"]), trainer["callbacks"], strict=True))
    return {**house, "trainer": trainer, **rest}


def callback_names(nodes: Sequence[Any]) -> list[str]:
    """A name for each callback of a list; the second of a class is ``name_2``."""
    names: list[str] = []
    for node in nodes:
        name = callback_name(node)
        count = sum(re.sub(r"_\d+$", "", other) == name for other in names)
        names.append(f"{name}_{count + 1}" if count else name)
    return names


def callback_name(node: Any) -> str:
    """``{class_path: a.b.FiniteGuard}`` -> ``finite_guard``."""
    path = node if isinstance(node, str) else str((node or {}).get("class_path"))
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path.rpartition(".")[2]).lower()


def house_path(path: Sequence[str | int], lightning: dict[str, Any]) -> list[str | int]:
    """A path into the LightningCLI form as people wrote it: ``model.init_args.backbone.x`` -> ``model.backbone.x``."""
    match list(path):
        case ["model", "init_args", "backbone", *rest]:
            return ["model", "backbone", *rest]
        case ["model", "init_args", *rest] | ["model", *rest]:
            return ["task", *rest]
        case ["data", "init_args", *rest]:
            return ["data", *rest]
        case ["trainer", "callbacks", int(index), *rest]:
            return ["trainer", "callbacks", callback_names(lightning["trainer"]["callbacks"])[index], *rest]
        case ["seed_everything"]:
            return ["seed"]
        case other:
            return other


def dump(config: dict[str, Any]) -> str:
    """YAML that PyYAML, OmegaConf and jsonargparse read alike."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)


# --- parts -----------------------------------------------------------------------------------------------------------

_OWN_FILE = "_own_file"


def _mapping(node: Any, key: str) -> dict[str, Any]:
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise ConfigError(f"{key} must be a mapping of settings; found {node!r}")
    return node


def _detect_hardware() -> str:
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _names_class(override: Any) -> bool:
    """Whether a class is given whole, as ``{class_path: ..., init_args: ...}``."""
    if override.is_delete():
        return False
    value = override.value()
    return isinstance(value, dict) and "class_path" in {str(key) for key in value}


def _forced(override: Any, known: Sequence[str]) -> str:
    """Let a setting be given whether or not a YAML file spells it out; the classes' own signatures judge it later."""
    line = str(override.input_line)
    plain = not line.startswith(("+", "~")) and override.key_or_group not in known
    return f"++{line}" if plain else line


def _register_own_files(chosen: dict[str, Any]) -> dict[str, Path]:
    """``experiment=path/to/my.yaml``, ``model=mine.yaml``: hand the files to Hydra as options of their groups."""
    found = {}
    for group, override in chosen.items():
        value = "" if override.is_delete() else str(override.value())
        if value.endswith((".yaml", ".yml")):
            from hydra.core.config_store import ConfigStore

            found[group] = path = Path(value).expanduser()
            package = "_global_" if group == "experiment" else group.replace("/", ".")
            ConfigStore.instance().store(group=group, name=_OWN_FILE, node=load_yaml(path), package=package)
    return found


def _check_option(group: str, option: str, own: Mapping[str, Path]) -> None:
    if option in ("None", "null") or group in own:
        return
    valid = options(group)
    if option not in valid:
        listing = ", ".join(valid) or "nothing yet"
        if len(listing) > 300:  # the folders, and where the rest is named
            folder = option.partition("/")[0]
            near = [name for name in valid if "/" not in name or name.startswith(f"{folder}/")]
            near = near if len(near) <= 40 and len(", ".join(near)) <= 500 else []
            rest = dict.fromkeys(f"{name.partition('/')[0]}/..." for name in valid if name not in near)
            listing = ", ".join([*near, *rest]) + ("; `seqlong fit --help` names each" if rest else "")
        raise ConfigError(
            f"there is no {group}={option}{nearest(option, valid) or '.'} {shown(CONFIGS / group)} has: {listing}"
        )


def _resolve(config: DictConfig | ListConfig, files: list[ConfigFile]) -> dict[str, Any]:
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    except OmegaConfBaseException:  # an interpolation that leads nowhere; told below, where its key is known
        missing = []
    if missing:
        lines = []
        for key in missing:
            place = locate(files, key.split("."))
            comment = _comment(place)
            example = f" ({comment})" if comment else ""
            hint = f"{key} is not set{example}. Give it on the command line: {key}={_example(key)}"
            lines.append(located(place[0], place[1], hint) if place else hint)
        raise ConfigError("\n".join(lines))
    try:
        house = OmegaConf.to_container(config, resolve=True)
    except (InterpolationKeyError, InterpolationResolutionError, GrammarParseError) as error:
        key = str(getattr(error, "full_key", "") or "")
        place = locate(files, key.split("."))
        message = f"{key}: {str(error).splitlines()[0]}"
        raise ConfigError(located(place[0], place[1], message) if place else message) from error
    assert isinstance(house, dict)
    return {str(key): value for key, value in house.items()}


def _comment(place: tuple[Path, int] | None) -> str:
    """The comment that stands behind a setting in its YAML file."""
    if place is None:
        return ""
    _, _, comment = place[0].read_text().splitlines()[place[1] - 1].partition("#")
    return comment.strip().rstrip(".")


def _example(key: str) -> str:
    return {"data.path": "my.fa.gz"}.get(key, "VALUE")


def _explain_composition(error: Exception, chosen: dict[str, Any], own: Mapping[str, Path]) -> ConfigError:
    """One sentence for each way in which Hydra's composition fails."""
    from hydra.errors import MissingConfigException

    text = str(error)
    if found := re.search(r"You must specify '([^']+)'", text):
        group = found.group(1)
        if "experiment" not in chosen:
            return ConfigError(
                "no experiment is chosen. Give one, such as experiment="
                + " or experiment=".join(options("experiment")[:6] or ["dna/demo"])
                + f" (or at least {group}=...: {', '.join(options(group))})"
            )
        return ConfigError(f"{group} is not chosen. Give one of: " + ", ".join(f"{group}={o}" for o in options(group)))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).lstrip("/").partition("/")
        valid = options(group)
        where = next(
            (
                (file.path, number)
                for file in composed_files({k: str(o.value()) for k, o in chosen.items()}, own)
                for number, line in enumerate(file.path.read_text().splitlines(), 1)
                if re.search(rf"{re.escape(group)}\s*:\s*[\"']?{re.escape(option)}", line)
            ),
            None,
        )
        message = f"there is no {group}={option}{nearest(option, valid) or '.'} Its options: {', '.join(valid)}"
        return ConfigError(located(*where, message) if where else message)
    if found := re.search(r"Could not delete from config\. '([^']+)' does not exist", text):
        return ConfigError(f"'~{found.group(1)}' removes nothing: there is no {found.group(1)}")
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
    first = text.splitlines()[0] if text else type(error).__name__
    return ConfigError(f"{first}{': ' + cause if cause and cause not in first else ''}")
