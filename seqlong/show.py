"""``seqlong show``: a model before it is trained: its blocks, and what they cost in parameters, state and FLOPs."""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from seqlong.compose import Composed, compose, from_files, house_path, parse_overrides
from seqlong.config_files import options, summary
from seqlong.errors import ConfigError, SeqlongError, located, nearest

HELP = """Shows a model as one line and a table. It is built without memory, so any size shows at once.

  parameters   of one such part; a share is of all parameters, of all such parts
  state        what a row carries from window to window, or while generating, after --length tokens (caches in bfloat16)
  FLOPs        of one token, forward, the mean over a row of --length tokens; training takes three times as many"""
EXAMPLES = """examples:
  seqlong show                                     the presets there are
  seqlong show model=hybridna_300m
  seqlong show model=minimax_01 --length 1000000
  seqlong show experiment=dna/demo model.backbone.d_model=256 model.backbone.pattern=mma
  seqlong show --config runs/demo-.../config.yaml
  seqlong show model=hybrid_small --json -          for a program"""

LENGTH = 131072


@dataclass
class Part:
    """Blocks, or parts of blocks, that are alike.

    Attributes:
        name: class of the mixer or feed-forward, or ``embedding``, ``norms``, ``head``.
        count: how many there are.
        letter: of the pattern, for a mixer, and for a feed-forward of its own (``ffns``).
        settings: as they were given.
        parameters: of one.
        active: those of one that a token uses.
        state: bytes a row, of one; None for a mixer that needs the whole row.
        growth: of the state with the length.
        terms: of the FLOPs a token, of one: what, flops, formula, grows.
    """

    name: str
    count: int
    parameters: int
    active: int
    letter: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    state: int | None = 0
    growth: str = "none"
    terms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """A token, forward, of one."""
        return float(sum(term["flops"] for term in self.terms))


@dataclass
class Shown:
    """A model, and what it costs in rows of ``length`` tokens."""

    name: str
    pattern: str
    layers: int
    d_model: int
    vocab_size: int
    tied: bool
    length: int
    parts: list[Part]

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(part.count * part.parameters for part in self.parts)

    @property
    def active(self) -> int:
        """Those that a token uses."""
        return sum(part.count * part.active for part in self.parts)

    @property
    def flops(self) -> float:
        """A token, forward."""
        return float(sum(part.count * part.flops for part in self.parts))

    @property
    def growing(self) -> float:
        """The part of ``flops`` that grows with the length."""
        return float(sum(p.count * term["flops"] for p in self.parts for term in p.terms if term["grows"]))

    @property
    def state(self) -> int | None:
        """Bytes a row; None if a mixer needs the whole row."""
        states = [None if part.state is None else part.count * part.state for part in self.parts]
        known = [state for state in states if state is not None]
        return sum(known) if len(known) == len(states) else None

    @property
    def line(self) -> str:
        """The model in a line."""
        active = "" if self.active == self.parameters else f", {_si(self.active)} of them used by a token"
        return (
            f"{self.name}: {repeated(self.pattern)}, {self.layers} blocks of width {self.d_model:,}, "
            f"{_si(self.parameters)} parameters{active}"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SeqlongError(f"seqlong show: {message}; `seqlong show --help` lists what it takes")


def command(arguments: Sequence[str]) -> int:
    """``seqlong show``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the arguments or in the configuration.
    """
    parser = _Parser(
        prog="seqlong show", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="model=NAME or experiment=NAME, and settings")
    parser.add_argument("--length", type=_length, default=LENGTH, help=f"tokens a row; {LENGTH:,} if left out")
    parser.add_argument("--config", metavar="FILE", help="a resolved configuration, such as a run's config.yaml")
    parser.add_argument("--json", metavar="PATH", help="write everything as JSON; - for the terminal, alone")
    given = parser.parse_intermixed_args(list(arguments))
    if not given.overrides and not given.config:
        return _list_presets()
    shown = show(given.overrides, given.length, given.config)
    if given.json:
        _write_json(given.json, shown)
    if given.json != "-":
        _print(shown)
    return 0


def show(words: Sequence[str], length: int = LENGTH, config: str | None = None) -> Shown:
    """Build the model of a configuration on the meta device, and count.

    Args:
        words: overrides, with ``model=`` or ``experiment=`` unless there is a ``config``.
        length: tokens a row.
        config: a resolved configuration file instead.

    Raises:
        ConfigError: what does not compose or cannot be built.
    """
    composed = from_files([config], words) if config else _composed(words)
    settings = composed.house.get("model") or {}
    for key in settings:
        if key != "backbone":
            raise ConfigError(f"model.{key} is unknown{nearest(str(key), ['backbone'])}; a model has backbone settings")
    values = settings.get("backbone")
    if not isinstance(values, Mapping):
        raise ConfigError("this configuration has no model.backbone; choose one with model=NAME")
    name = Path(config).resolve().parent.name if config else _name(composed, words)
    return measure(name, build(dict(values), composed), dict(values), _tied(composed), length)


def build(values: dict[str, Any], composed: Composed) -> Any:
    """The backbone of ``model.backbone`` settings, on the meta device.

    Raises:
        ConfigError: a setting that does not exist, has the wrong type, or contradicts another.
    """
    import torch
    from jsonargparse import ArgumentParser

    from seqlong.backbone import Backbone, BackboneConfig
    from seqlong.explain import check_arguments

    problem = check_arguments(BackboneConfig, values, ("model", "init_args", "backbone"))
    if problem is not None:
        key = ".".join(str(part) for part in house_path(problem.path, composed.lightning))
        message = f"{key}{'' if problem.message.startswith('is ') else ':'} {problem.message}"
        place = composed.where(problem.path)
        if place is None or _on_command_line(key, composed.overrides):
            raise ConfigError(message)
        raise ConfigError(located(*place, message))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=BackboneConfig)
    try:
        config = parser.instantiate_classes(parser.parse_object({"backbone": copy.deepcopy(values)})).backbone
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"model.backbone: {lines[-1]}") from error
    with torch.device("meta"):
        return Backbone(config)


def measure(name: str, backbone: Any, values: Mapping[str, Any], tied: bool, length: int) -> Shown:
    """Count what a backbone costs.

    Args:
        name: what to call it.
        backbone: a ``Backbone``, on any device.
        values: its settings, as they were given.
        tied: whether the head's weight is the embedding's.
        length: tokens a row.
    """
    from seqlong.cost import Cost, feed_forward_cost, head_term, mixer_cost, products

    strands = 1 if backbone.strands is None else 2

    def part(name: str, modules: Sequence[Any], cost: Cost, **more: Any) -> Part:
        if strands == 2 and cost.growth != "none":
            cost = Cost(cost.terms, None, "needs the whole row")
        size = _count(modules[0])
        idle = sum(getattr(inner, "idle_parameters", 0) for inner in modules[0].modules())
        return Part(name, len(modules), size, size - idle, state=cost.state, growth=cost.growth,
                    terms=[_of_strands(term, strands) for term in cost.terms], **more)  # fmt: skip

    mixers: dict[tuple[Any, ...], list[Any]] = {}
    feeds: dict[tuple[Any, ...], list[Any]] = {}
    for letter, block in zip(backbone.letters, backbone.blocks, strict=True):
        mixers.setdefault((letter, _count(block.mixer)), []).append(block.mixer)
        if block.ffn is not None:
            own = letter if letter in (values.get("ffns") or {}) else ""
            feeds.setdefault((own, type(block.ffn).__name__, _count(block.ffn)), []).append(block.ffn)
    parts = []
    for (letter, _), alike in mixers.items():
        label, settings = _named(values["mixers"][letter])
        parts.append(part(label, alike, mixer_cost(alike[0], length), letter=letter, settings=settings))
    for (letter, kind, _), alike in feeds.items():
        node = values["ffns"][letter] if letter else values.get("ffn")
        _, settings = _named(node) if node else (kind, {})
        parts.append(part(kind, alike, feed_forward_cost(alike[0]), letter=letter, settings=settings))
    vocab_size, width = backbone.embedding.weight.shape
    norms = [norm for block in backbone.blocks for norm in (block.mixer_norm, block.ffn_norm) if norm is not None]
    parts.append(part("norm", [*norms, backbone.norm], Cost(())))
    parts.append(part("embedding", [backbone.embedding], Cost(()), settings={"vocab_size": vocab_size}))
    if backbone.patch_embedding is not None:
        label, settings = _named(values["patches"])
        terms = Cost(tuple(products(backbone.patch_embedding)))
        parts.append(part(label, [backbone.patch_embedding], terms, settings=settings))
    own = 0 if tied else vocab_size * width
    head = _of_strands(head_term(width, vocab_size), strands)
    parts.append(Part("head", 1, own, own, settings={"tied": tied}, terms=[head]))
    return Shown(name, backbone.letters, len(backbone.letters), width, vocab_size, tied, length, parts)


def repeated(letters: str) -> str:
    """``mmmammmm × 3``, the shortest unit that a pattern repeats; ``mma × 2 + m`` where it ends early."""
    for size in range(1, len(letters) // 2 + 1):
        unit = letters[:size]
        if (unit * math.ceil(len(letters) / size))[: len(letters)] == letters:
            whole, rest = divmod(len(letters), size)
            return f"{unit}{f' × {whole}' if whole > 1 else ''}{f' + {letters[-rest:]}' if rest else ''}"
    return letters


# --- parts -----------------------------------------------------------------------------------------------------------


def _composed(words: Sequence[str]) -> Composed:
    """Compose with whatever task and data there are, which a model alone does not need."""
    for word in words:
        if "=" not in word and word in options("model"):
            raise ConfigError(f"'{word}' has no '='; did you mean 'model={word}'?")
    keys = {override.key_or_group for override in parse_overrides(words)}
    if not keys & {"experiment", "model"}:
        raise ConfigError("show needs a model: model=NAME, one of " + ", ".join(options("model")) + "; or experiment=")
    rest = [] if "experiment" in keys else [w for w in ("task=causal_lm", "data=ecoli") if w.split("=")[0] not in keys]
    try:
        return compose([*words, *rest])
    except ConfigError:
        if "data.path" in keys:
            raise
        return compose([*words, *rest, "data.path=FILE"])  # which is not read


def _on_command_line(key: str, overrides: Iterable[str]) -> bool:
    """Whether ``key`` was given itself, or within a setting that was given whole, such as a mixer."""
    words = [word.lstrip("+~") for word in overrides]
    return any(word.startswith(key) or ("." in word and key.startswith(f"{word}.")) for word in words)


def _name(composed: Composed, words: Sequence[str]) -> str:
    given = {o.key_or_group: str(o.value()) for o in parse_overrides(words)}
    return given.get("model") or str(composed.house["run"]["name"])


def _tied(composed: Composed) -> bool:
    task = composed.house.get("task") or {}
    return bool(task.get("tie_embeddings", True))


def _named(node: Any) -> tuple[str, dict[str, Any]]:
    """Class and settings of ``{class_path, init_args}``; of a wrapped mixer, those of what it wraps too."""
    if not isinstance(node, Mapping):
        return str(node).rpartition(".")[2], {}
    name, settings = str(node["class_path"]).rpartition(".")[2], dict(node.get("init_args") or {})
    if isinstance(inner := settings.get("mixer"), Mapping | str):
        label, own = _named(inner)
        del settings["mixer"]
        return f"{name}({label})", {**own, **settings}
    if isinstance(inner := settings.get("mixers"), Mapping):
        named = {key: _named(branch) for key, branch in inner.items()}
        del settings["mixers"]
        own = {f"{key}.{setting}": value for key, (_, of) in named.items() for setting, value in of.items()}
        return f"{name}({' + '.join(label for label, _ in named.values())})", {**own, **settings}
    return name, settings


def _of_strands(term: Any, strands: int) -> dict[str, Any]:
    """What each strand takes, in all."""
    return {**asdict(term), "flops": strands * term.flops}


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _length(text: str) -> int:
    """A whole number above zero; 131_072 and 131,072 too."""
    try:
        value = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected tokens, a whole number above 0, found '{text}'")
    return value


def _write_json(path: str, shown: Shown) -> None:
    totals = {name: getattr(shown, name) for name in ("parameters", "active", "flops", "growing", "state")}
    text = json.dumps({**asdict(shown), **totals, "line": shown.line}, indent=1)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise SeqlongError(f"--json {path}: {error.strerror}") from error


def _si(value: float | int) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}" if value < 1000 * limit else f"{value / limit:,.0f} {unit}"
    return f"{value:,.0f}"


def _flops(value: float | int) -> str:
    return _si(value).replace("B", "G")


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for limit, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value} B"


def _list_presets() -> int:
    names = options("model")
    print("seqlong show model=NAME, one of\n")
    for name in names:
        print(f"  {name:{max(map(len, names))}}  {summary('model', name)}")
    return 0


def _print(shown: Shown) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(escape(shown.line), soft_wrap=True)
    console.print()
    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column("", justify="right", footer="")
    table.add_column("part", footer="in all")
    table.add_column("settings", overflow="fold")
    table.add_column("parameters", justify="right", footer=_si(shown.parameters), no_wrap=True)
    table.add_column("share", justify="right", footer="100 %", no_wrap=True)
    table.add_column(f"state at {shown.length:,}", justify="right", footer=_bytes(shown.state))
    table.add_column("FLOPs a token", justify="right", footer=_flops(shown.flops), no_wrap=True)
    for part in shown.parts:
        settings = ", ".join(f"{key} {_plain(value)}" for key, value in part.settings.items())
        used = "" if part.active == part.parameters else f"\n{_si(part.active)} used"
        state = "" if part.growth == "none" else f"{_bytes(part.state)}\n{part.growth}"
        beside = [t for t in part.terms if t["what"] in ("attention", "recurrence")]
        flops = _flops(part.flops) if part.terms else ""
        flops += "".join(f"\n{_flops(term['flops'])} {term['what']}" for term in beside)
        share = f"{100 * part.count * part.parameters / max(1, shown.parameters):.1f} %"
        name = f"{part.letter}: {part.name}" if part.letter else part.name
        table.add_row(
            f"{part.count} ×", escape(name), escape(settings), _si(part.parameters) + used, share, state, flops
        )
    console.print(table)
    console.print()
    if shown.flops:
        console.print(
            f"{100 * shown.growing / shown.flops:.0f} % of the FLOPs at {shown.length:,} tokens grow with the length."
        )
    formulas = {term["what"]: dict[str, None]() for part in shown.parts for term in part.terms}
    for part in shown.parts:
        for term in part.terms:
            formulas[term["what"]][term["formula"]] = None
    for what, known in formulas.items():
        console.print(f"{what}: {escape('; '.join(known))}", style="dim", soft_wrap=True)


def _plain(value: Any) -> str:
    return (
        {True: "yes", False: "no", None: "none"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )
