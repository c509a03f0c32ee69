"""Tiny trained-looking models for the tests of inference: a few blocks with opinions, and their checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from seqlong.backbone import BackboneConfig
from seqlong.callbacks.checkpoints import CONFIG_KEY, DATA_KEY
from seqlong.inference.model import Model
from seqlong.mixers import Attention, Bidirectional, GatedDeltaNet, Mamba2
from seqlong.tasks import CausalLM, MaskedLM


def causal_model(window: int | None = 24, dtype: torch.dtype = torch.float64) -> Model:
    """Mamba2, attention (over everything if there is no window) and a delta rule."""
    mixers = {
        "m": partial(Mamba2, d_state=8, head_dim=8),
        "a": partial(Attention, heads=2, window=window),
        "d": partial(GatedDeltaNet, heads=2, head_dim=8),
    }
    torch.manual_seed(1)
    task = CausalLM(BackboneConfig(d_model=16, pattern="mad", mixers=mixers)).eval().requires_grad_(False).to(dtype)
    task.backbone.embedding.weight.mul_(30)  # opinions, where a deviation of 0.02 would leave next to none
    return Model(task, Path("toy.ckpt"), torch.device("cpu"), "float64" if dtype == torch.float64 else "float32")


def masked_model() -> Model:
    """Mamba2 from both sides."""
    mixers = {"m": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8))}
    torch.manual_seed(2)
    task = MaskedLM(BackboneConfig(d_model=16, pattern="m", mixers=mixers)).eval().requires_grad_(False).double()
    task.backbone.embedding.weight.mul_(30)
    return Model(task, Path("toy.ckpt"), torch.device("cpu"), "float64")


def config(pattern: str = "ma") -> dict[str, Any]:
    """A LightningCLI configuration, as a checkpoint holds it."""
    mixers = {
        "m": {"class_path": "seqlong.mixers.Mamba2", "init_args": {"d_state": 8, "head_dim": 8}},
        "a": {"class_path": "seqlong.mixers.Attention", "init_args": {"heads": 2, "window": 16}},
    }
    backbone = {"d_model": 16, "pattern": pattern, "mixers": mixers}
    return {
        "model": {"class_path": "seqlong.tasks.CausalLM", "init_args": {"backbone": backbone}},
        "data": {"class_path": "seqlong.datamodules.dna.datamodule.GenomeData", "init_args": {"length": 512}},
    }


def save_checkpoint(folder: Path, pattern: str = "ma", card: dict[str, Any] | None = None) -> Path:
    """A run folder with ``checkpoints/last.ckpt``."""
    mixers = {"m": partial(Mamba2, d_state=8, head_dim=8), "a": partial(Attention, heads=2, window=16)}
    torch.manual_seed(3)
    task = CausalLM(BackboneConfig(d_model=16, pattern=pattern, mixers=mixers))
    with torch.no_grad():
        task.backbone.embedding.weight.mul_(30)
    path = folder / "runs" / "toy" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": task.state_dict(), CONFIG_KEY: config(pattern), DATA_KEY: card or {}}, path)
    return path
