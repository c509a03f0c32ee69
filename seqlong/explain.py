"""What is wrong with a configuration, in one sentence.

jsonargparse is the judge of a configuration; its verdict lists every alternative of every union. Once it has refused
one, this module walks the configuration beside the signatures of the classes it names and finds the first setting that
does not fit.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from seqlong.errors import nearest


@dataclasses.dataclass
class Problem:
    """A setting that does not fit.

    Attributes:
        path: to the setting, in LightningCLI form.
        message: what was found and what was expected, without the setting's name.
        meant: path of the setting that was probably meant, or None.
    """

    path: tuple[str | int, ...]
    message: str
    meant: tuple[str | int, ...] | None = None


def first_problem(config: Mapping[str, Any], top_level: collections.abc.Iterable[str]) -> Problem | None:
    """The first setting of a LightningCLI configuration that does not fit, or None if none is found.

    Args:
        config: the configuration.
        top_level: keys that may stand at the top.
    """
    from lightning.pytorch import Trainer

    valid = set(top_level)
    for key in config:
        if key not in valid:
            return _unknown((), str(key), valid, "a part of a configuration")
    trainer = config.get("trainer") or {}
    problem = check_arguments(Trainer, trainer, ("trainer",)) if isinstance(trainer, Mapping) else None
    for key in ("data", "model"):
        problem = problem or (check_class(config[key], (key,)) if config.get(key) is not None else None)
    return problem


def check_class(node: Any, path: tuple[str | int, ...], given: int = 0) -> Problem | None:
    """Check ``{class_path, init_args}``; ``given`` arguments come from the caller."""
    if isinstance(node, str):
        node = {"class_path": node}
    name = node.get("class_path") if isinstance(node, Mapping) else None
    if not isinstance(name, str):
        return Problem(path, f"found {_short(node)}, expected class_path: package.Class and init_args: its settings")
    target, problem = _import(name, path)
    if problem is not None:
        return problem
    for key in node:
        if key not in ("class_path", "init_args", "dict_kwargs"):
            return _unknown(path, str(key), {"class_path", "init_args"}, "a key beside class_path")
    return check_arguments(target, node.get("init_args") or {}, (*path, "init_args"), given)


def check_arguments(
    target: Callable[..., Any], values: Mapping[str, Any], path: tuple[str | int, ...], given: int = 0
) -> Problem | None:
    """Check ``values`` against the signature of ``target``."""
    parameters = signature(target)
    if parameters is None:
        return None
    owner = getattr(target, "__name__", str(target))
    for key, value in values.items():
        if key not in parameters:
            if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                continue
            return _unknown(path, str(key), parameters, f"a setting of {owner}")
        problem = check_value(parameters[key].annotation, value, (*path, str(key)))
        if problem is not None:
            return problem
    for number, (key, parameter) in enumerate(parameters.items()):
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if needed and key not in values and number >= given:
            return Problem((*path, key), f"is not set; {owner} needs it: {type_name(parameter.annotation)}")
    return None


def check_value(hint: Any, value: Any, path: tuple[str | int, ...]) -> Problem | None:
    """Check one value against a type hint."""
    if value is None or hint is inspect.Parameter.empty or hint is Any:
        return None
    alternatives = variants(hint)
    if isinstance(value, Mapping):
        if "class_path" in value:
            given = next((len(_callable_arguments(v)) for v in alternatives if _is_callable(v)), 0)
            return check_class(value, path, given)
        for variant in alternatives:
            if dataclasses.is_dataclass(variant) and isinstance(variant, type):
                return check_arguments(variant, value, path)
            if get_origin(variant) in (dict, collections.abc.Mapping) and len(get_args(variant)) == 2:
                for key, item in value.items():
                    if problem := _check_entry(get_args(variant)[1], item, (*path, str(key)), value):
                        return problem
                return None
        if any(_is_callable(v) or _is_own_class(v) for v in alternatives):
            return Problem(path, f"found {_short(value)} without class_path; expected class_path: package.Class")
    if isinstance(value, (list, tuple)):
        for variant in alternatives:
            if get_origin(variant) in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
                item_hint = (get_args(variant) or (Any,))[0]
                for number, item in enumerate(value):
                    if problem := check_value(item_hint, item, (*path, number)):
                        return problem
                return None
        if any(_is_own_class(v) for v in alternatives):  # Trainer.callbacks: list | Callback
            for number, item in enumerate(value):
                if isinstance(item, Mapping) and (problem := check_class(item, (*path, number))):
                    return problem
            return None
    if accepts(hint, value):
        return None
    choices = [str(c) for v in alternatives if get_origin(v) is Literal for c in get_args(v)]
    hint_text = nearest(str(value), choices) if choices else ""
    return Problem(path, f"found {_short(value)} ({type(value).__name__}), expected {type_name(hint)}{hint_text}")


def accepts(hint: Any, value: Any) -> bool:
    """Whether jsonargparse takes ``value`` for ``hint``; True where it cannot tell."""
    try:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=hint)
    except (ValueError, TypeError):
        return True
    try:
        parser.parse_object({"value": value})
    except Exception:  # argparse.ArgumentError, and whatever an import in the value raises
        return False
    return True


def signature(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Parameters by name with resolved annotations, without ``self``; None for what has no signature."""
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    source = target.__init__ if isinstance(target, type) and not dataclasses.is_dataclass(target) else target
    try:
        hints = typing.get_type_hints(source)
    except (NameError, TypeError, AttributeError):
        hints = {}
    return {
        name: parameter.replace(annotation=hints.get(name, parameter.annotation))
        if not isinstance(hints.get(name, parameter.annotation), str)
        else parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in parameters.items()
    }


def type_name(hint: Any) -> str:
    """``int | None`` and the like, without package names."""
    if hint is inspect.Parameter.empty or hint is Any:
        return "anything"
    if hint is type(None):
        return "null"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        choices = {c: None for v in variants(hint) if get_origin(v) is Literal for c in get_args(v)}
        others = [type_name(variant) for variant in variants(hint) if get_origin(variant) is not Literal]
        return " | ".join(dict.fromkeys(([type_name(Literal[tuple(choices)])] if choices else []) + others))
    if get_origin(hint) in (list, collections.abc.Sequence, collections.abc.Iterable):
        return f"list of {type_name((get_args(hint) or (Any,))[0])}"
    if get_origin(hint) is dict:
        return f"{type_name(get_args(hint)[0])} -> {type_name(get_args(hint)[1])}"
    if _is_callable(hint):
        result = get_args(hint)[1] if get_args(hint) else Any
        return f"{type_name(result)} (class_path and init_args)"
    return getattr(hint, "__name__", str(hint).replace("typing.", ""))


# --- parts -----------------------------------------------------------------------------------------------------------


def _check_entry(hint: Any, item: Any, path: tuple[str | int, ...], siblings: Mapping[str, Any]) -> Problem | None:
    incomplete = isinstance(item, Mapping) and "class_path" not in item
    if incomplete and any(_is_callable(v) or _is_own_class(v) for v in variants(hint)):
        others = [str(k) for k, v in siblings.items() if isinstance(v, Mapping) and "class_path" in v]
        problem = _unknown(path[:-1], str(path[-1]), others, "defined")
        return dataclasses.replace(problem, message=f"{problem.message} (to add it, set its class_path)")
    return check_value(hint, item, path)


def _unknown(path: tuple[str | int, ...], key: str, valid: collections.abc.Iterable[str], what: str) -> Problem:
    names = [name for name in valid if name not in ("self", "args", "kwargs")]
    close = nearest(key, names)
    meant = (*path, close.split("'")[1]) if close else None
    listing = "" if close else f"; there are: {', '.join(sorted(names))}"
    return Problem((*path, key), f"is not {what}{close or listing}", meant)


def _import(name: str, path: tuple[str | int, ...]) -> tuple[Any, Problem | None]:
    module_name, _, class_name = name.rpartition(".")
    where = (*path, "class_path")
    if not module_name:
        return None, Problem(where, f"found {name!r}, expected package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            return None, Problem(where, f"{name!r} needs the package {error.name!r}, which is not installed")
        return None, Problem(where, f"there is no module {module_name!r}")
    if not hasattr(module, class_name):
        names = [n for n, value in vars(module).items() if isinstance(value, type)]
        return None, Problem(where, f"{module_name} has no class {class_name!r}{nearest(class_name, names)}")
    return getattr(module, class_name), None


def variants(hint: Any) -> list[Any]:
    """The alternatives of a union, or the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for variant in get_args(hint) for inner in variants(variant)]
    if get_origin(hint) is typing.Annotated:
        return variants(get_args(hint)[0])
    return [hint]


def _is_callable(hint: Any) -> bool:
    return get_origin(hint) is collections.abc.Callable or hint is collections.abc.Callable


def _callable_arguments(hint: Any) -> list[Any]:
    arguments = get_args(hint)
    return list(arguments[0]) if arguments and isinstance(arguments[0], list) else []


def _is_own_class(hint: Any) -> bool:
    plain = (int, float, str, bool, bytes, list, dict, tuple, set, type(None))
    return isinstance(hint, type) and hint not in plain and get_origin(hint) is None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
