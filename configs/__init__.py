"""Configuration files, and what YAML cannot say: the architecture of a checkpoint, the ids of tokens of DNA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def _backbone_of(where: str | None) -> Any:
    """``model.backbone`` of a checkpoint file, or of a run folder: what ``config.yaml`` there or inside it says."""
    if not where:
        raise ValueError("task.init_from is not set; give a run folder or a checkpoint: task.init_from=runs/my-run")
    path = Path(where).expanduser()
    if path.is_file():
        import torch

        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = content.get("seqlong_config") or {}
    else:
        run = path.parent if path.name == "checkpoints" else path
        if not (run / "config.yaml").is_file():
            raise ValueError(f"there is no run folder or checkpoint {where}")
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    backbone = ((config.get("model") or {}).get("init_args") or {}).get("backbone")
    if backbone is None:
        raise ValueError(f"{where} does not say which model it is of")
    return OmegaConf.create(backbone)


OmegaConf.register_new_resolver("backbone_of", _backbone_of, replace=True)


def _tokenizer(settings: Any) -> Any:
    from seqlong.datamodules.dna.tokens import TokenizerSettings, build_tokenizer
    from seqlong.errors import ConfigError

    given = OmegaConf.to_container(settings) if OmegaConf.is_config(settings) else settings or {}
    try:
        return build_tokenizer(TokenizerSettings(**given))  # type: ignore[arg-type]
    except TypeError as error:
        known = ", ".join(TokenizerSettings.__dataclass_fields__)
        raise ConfigError(f"data.tokenizer is {given}; expected settings out of {known}") from error


def _ids_of(settings: Any) -> int:
    """How many ids the tokens of ``data.tokenizer`` have."""
    made = _tokenizer(settings)
    return 16 if made is None else int(made.size)


def _complement_of(settings: Any) -> list[int]:
    """The id of each token's reverse complement; for tokens without any, that of bases, which no model will use."""
    made = _tokenizer(settings)
    return [0, 1, 2, 3, 7, 6, 5, 4] if made is None or made.complement is None else made.complement.tolist()


OmegaConf.register_new_resolver("ids_of", _ids_of, replace=True)
OmegaConf.register_new_resolver("complement_of", _complement_of, replace=True)
