"""The presets that users get, built without the command line."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import seqlong.configs
from seqlong.backbone import BackboneConfig


def preset(name: str, **changes: Any) -> BackboneConfig:
    """``configs/model/<name>.yaml``, some settings changed; a changed mixer or ffn is a class_path and init_args."""
    path = Path(__file__).resolve().parent.parent / "configs" / "model" / f"{name}.yaml"
    if not path.is_file():  # the scripts were copied away from the package
        path = Path(seqlong.configs.__file__ or "").parent / "model" / f"{name}.yaml"
    settings = {**yaml.safe_load(path.read_text())["backbone"], **changes}
    for key in ("mixers", "ffns"):
        settings[key] = {letter: _factory(said) for letter, said in settings.get(key, {}).items()}
    if settings.get("ffn") is not None:
        settings["ffn"] = _factory(settings["ffn"])
    return BackboneConfig(**settings)


def _factory(said: dict[str, Any] | None) -> Any:
    if said is None:
        return None
    module, name = said["class_path"].rsplit(".", 1)
    return partial(getattr(import_module(module), name), **said.get("init_args", {}))
