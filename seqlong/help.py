"""Help that teaches: what there is to choose, how to set it, and what each setting means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seqlong.config_files import groups, options, summary
from seqlong.errors import ConfigError, SeqlongError

_MOST_USED = (
    ("experiment=dna/demo", "what to do: a file of configs/experiment, or your own experiment=my.yaml"),
    ("data.path=my.fa.gz", "the data"),
    ("model=NAME", "another model (see the groups)"),
    ("model.backbone.mixers.m.init_args.d_state=64", "any single setting, by its path"),
    ("trainer.max_steps=1000", "how long"),
    ("trainer.devices=2", "how many processes or GPUs"),
    ("hardware=cpu", "do not use the GPU"),
    ("seed=1  run.name=trial  run.root=FOLDER", "seed; name and place of the run folder"),
    ("~trainer.callbacks.progress", "leave something out"),
    ("--ckpt_path last", "go on with the newest run of this name, in its folder; also best or a file"),
    ("--config FILE", "a resolved configuration, such as a run's config.yaml"),
    ("--print_config", "show the resolved configuration and stop"),
)
_TRAINER = (
    "max_steps",
    "max_time",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "precision",
    "devices",
    "num_nodes",
    "strategy",
    "val_check_interval",
    "limit_val_batches",
    "log_every_n_steps",
)


def overview(verbs: Mapping[str, tuple[str, str]]) -> str:
    """``seqlong --help``."""
    lines = ["seqlong: train and run hybrid models of very long sequences", "", "verbs"]
    for verb, (what, example) in verbs.items():
        lines += [f"  {verb:9} {what}", f"  {'':9} {example}"]
    lines += ["", "settings (key=value) and flags (--key=value)"]
    lines += _columns(_MOST_USED)
    lines += ["", "groups (group=option)"]
    for group in groups():
        names = options(group)
        if names:
            lines.append(f"  {group:12} {', '.join(names)}")
    lines += ["", "seqlong VERB experiment=... --help lists every setting of that experiment. seqlong --version"]
    return "\n".join(lines)


def verb_help(verb: str, overrides: Sequence[str], verbs: Mapping[str, tuple[str, str]]) -> str:
    """``seqlong fit --help``: how settings are given, and those of the composed task, data and model."""
    what, example = verbs[verb]
    lines = [
        f"seqlong {verb}: {what}",
        f"  {example}",
        "",
        "key=value     a setting or a choice of a group; put together first (Hydra). key=a,b in a sweep",
        "--key=value   the same setting, set last (LightningCLI), with class_path/init_args written out:",
        "              model.backbone.x is --model.init_args.backbone.x, data.x is --data.init_args.x",
        "",
        *_columns(_MOST_USED),
        "",
        "groups",
    ]
    for group in groups():
        for number, option in enumerate(options(group)):
            lines.append(f"  {group if number == 0 else '':12} {option:24} {summary(group, option)}".rstrip())
    try:
        settings = list(composed_settings(overrides))
    except SeqlongError as error:
        lines += ["", "Choose an experiment to see its settings: " + str(error).splitlines()[0]]
        return "\n".join(lines)
    for title, rows in settings:
        lines += ["", title]
        lines += [
            f"  {name} = {value}  ({kind})" + (f"\n      {text}" if text else "") for name, value, kind, text in rows
        ]
    return "\n".join(lines)


def composed_settings(overrides: Sequence[str]) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    """Yield ``(title, [(key, value, type, explanation)])`` for the parts of a composed configuration."""
    import importlib

    from seqlong.compose import compose

    try:
        house = compose(overrides, hardware="cpu").house
    except ConfigError:
        house = compose([*overrides, "data.path=FILE"], hardware="cpu").house  # what help must not ask for
    for key in ("data", "task"):
        node = house[key]
        module, _, name = node["class_path"].rpartition(".")
        target = getattr(importlib.import_module(module), name)
        values = {k: v for k, v in node.items() if k != "class_path"}
        skipped = {"backbone"} if key == "task" else set()
        yield f"{key}: {node['class_path']}", _rows(target, values, key, skipped)
        if key == "task":
            yield from _backbone(target, house.get("model", {}).get("backbone") or {})
    from lightning.pytorch import Trainer

    trainer = _rows(Trainer, house["trainer"], "trainer", set())
    yield (
        "trainer: the most used of lightning.pytorch.Trainer; all others work too",
        [row for row in trainer if row[0].removeprefix("trainer.") in _TRAINER],
    )


def _backbone(task: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    import dataclasses
    import importlib

    from seqlong.explain import signature

    parameter = (signature(task) or {}).get("backbone")
    if parameter is not None and dataclasses.is_dataclass(parameter.annotation):
        yield "model.backbone", _rows(parameter.annotation, values, "model.backbone", {"mixers"})
    for letter, node in (values.get("mixers") or {}).items():
        module, _, name = node["class_path"].rpartition(".")
        target = getattr(importlib.import_module(module), name)
        prefix = f"model.backbone.mixers.{letter}.init_args"
        yield f"mixer {letter}: {node['class_path']}", _rows(target, node.get("init_args") or {}, prefix, {"d_model"})


def _rows(target: Any, values: Mapping[str, Any], prefix: str, skipped: set[str]) -> list[tuple[str, str, str, str]]:
    import dataclasses

    from seqlong.explain import signature, type_name, variants

    texts = _explanations(target)
    rows = []
    for name, parameter in (signature(target) or {}).items():
        if name in skipped or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        value = values.get(name, None if parameter.default is parameter.empty else parameter.default)
        nested = next((v for v in variants(parameter.annotation) if dataclasses.is_dataclass(v)), None)
        if nested is not None and isinstance(value, Mapping):
            rows += _rows(nested, value, f"{prefix}.{name}", set())
            continue
        text = repr(value)
        rows.append(
            (
                f"{prefix}.{name}",
                text if len(text) < 60 else text[:57] + "...",
                type_name(parameter.annotation),
                texts.get(name, ""),
            )
        )
    return rows


def _explanations(target: Any) -> dict[str, str]:
    from docstring_parser import parse  # comes with jsonargparse[signatures]

    texts: dict[str, str] = {}
    for source in (target, getattr(target, "__init__", None)):
        for parameter in parse(getattr(source, "__doc__", None) or "").params:
            texts.setdefault(parameter.arg_name, " ".join((parameter.description or "").split()))
    return texts


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"  {left:{width}}  {right}" for left, right in rows]
