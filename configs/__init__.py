"""Configuration files, and one thing that YAML cannot say: the architecture that a checkpoint was saved with."""

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
