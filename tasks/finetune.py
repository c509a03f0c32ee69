"""Fine-tuning: weights from a checkpoint, what stays as it is, low-rank changes, and a learning rate for each depth."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seqlong import runs
from seqlong.backbone import Backbone
from seqlong.callbacks.checkpoints import read_checkpoint
from seqlong.errors import CheckpointError, ConfigError

log = logging.getLogger("seqlong")


class LowRank(nn.Module):
    """``W + (α / r) B A``: a weight ``(n m)`` that stays as it is, and a change of rank r. (LoRA, arXiv 2106.09685)

    A starts as torch's linear layers do, B at 0, so that nothing changes at first.

    Args:
        outputs: n.
        inputs: m.
        rank: r.
        alpha: α.
    """

    def __init__(self, outputs: int, inputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, weight: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        return weight + self.scale * (self.up @ self.down).to(weight.dtype)


def add_low_rank(backbone: Backbone, rank: int, alpha: float) -> int:
    """Give every linear layer of the blocks a ``LowRank`` change; all else of the backbone stays as it is.

    Returns:
        How many layers were changed.

    Raises:
        ConfigError: a rank or alpha that is not positive.
    """
    if rank < 1 or alpha <= 0:
        raise ConfigError(f"task.lora_rank={rank} and task.lora_alpha={alpha} must be 1 or more and above 0")
    backbone.requires_grad_(False)
    changed = 0
    for module in list(backbone.blocks.modules()):
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            change = LowRank(outputs, inputs, min(rank, outputs, inputs), alpha)
            parametrize.register_parametrization(module, "weight", change, unsafe=True)
            changed += 1
    return changed


def freeze_blocks(backbone: Backbone, blocks: int) -> None:
    """Keep the embedding and the first ``blocks`` blocks as they are; -1 is the whole backbone.

    Raises:
        ConfigError: more blocks than there are.
    """
    if not -1 <= blocks <= len(backbone.blocks):
        raise ConfigError(
            f"task.freeze={blocks}, but the model has {len(backbone.blocks)} blocks; expected 0 (train all), a number "
            "of blocks, or -1 (the whole backbone)"
        )
    if blocks == -1:
        backbone.requires_grad_(False)
    elif blocks:
        backbone.embedding.requires_grad_(False)
        for block in list(backbone.blocks)[:blocks]:
            block.requires_grad_(False)


def load_backbone(backbone: Backbone, where: str) -> Path:
    """Take a backbone's weights from a checkpoint of any task of ours.

    Args:
        backbone: which to load, with or without low-rank changes.
        where: a checkpoint file or a run folder, of which the best is taken, or else the last.

    Raises:
        CheckpointError: there is none, or it is of another architecture; it says which.
    """
    path = find_checkpoint(where)
    content = read_checkpoint(path)
    prefix = "backbone."
    found = {name[len(prefix) :]: value for name, value in content["state_dict"].items() if name.startswith(prefix)}
    if not found:
        raise CheckpointError(
            f"{path} holds no backbone of ours; its first weight is {next(iter(content['state_dict']), 'none')}"
        )
    found = {_plain(name): value for name, value in found.items() if ".parametrizations.weight.0." not in name}
    ours = {_plain(name): (name, value) for name, value in backbone.state_dict().items()
            if ".parametrizations.weight.0." not in name}  # fmt: skip
    missing = [name for name in ours if name not in found]
    extra = [name for name in found if name not in ours]
    other = [
        f"{name} is {tuple(found[name].shape)} there and {tuple(value.shape)} here"
        for name, (_, value) in ours.items()
        if name in found and found[name].shape != value.shape
    ]
    if missing or extra or other:
        said = [f"{len(names)} weights {what}, such as {names[0]}" for names, what in (
            (missing, "are not in it"), (extra, "are in it and not in the model"), (other, "have another shape")
        ) if names]  # fmt: skip
        raise CheckpointError(
            f"task.init_from={where}: {path} is of another architecture than model.backbone: {'; '.join(said)}. "
            "experiment=dna/finetune takes the architecture from the checkpoint"
        )
    with torch.no_grad():
        for name, (full, _) in ours.items():
            owner, _, leaf = full.rpartition(".")
            target = getattr(backbone.get_submodule(owner), leaf)
            target.copy_(found[name])
    log.info("weights of the backbone from %s, step %s", path, content.get("global_step", "?"))
    return path


def _plain(name: str) -> str:
    return name.replace(".parametrizations.weight.original", ".weight")


def find_checkpoint(where: str) -> Path:
    """The file of ``task.init_from``.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return path
    run = path.parent if path.name == "checkpoints" else path
    if any((run / "checkpoints").glob("best-*.ckpt")):
        return runs.best_checkpoint(run)
    last = run / "checkpoints" / "last.ckpt"
    if last.is_file():
        return last
    raise CheckpointError(
        f"task.init_from={where}: there is no such checkpoint; expected a .ckpt file, or the folder "
        "of a run that saved one"
    )


def scale_by_depth(
    optimizer: torch.optim.Optimizer, backbone: Backbone, layer_decay: float, backbone_lr: float
) -> None:
    """Learning rates by depth: ``lr · share · decay^(n - i)`` for block i of n, counted from 1, the embedding being 0;
    the head and the last norm have ``lr`` and ``lr · share``.

    (Discriminative fine-tuning, arXiv 1801.06146.)

    Args:
        optimizer: a fresh one; its groups are split in place.
        backbone: whose blocks.
        layer_decay: decay.
        backbone_lr: share.

    Raises:
        ConfigError: a setting is out of its range.
    """
    if not 0 < layer_decay <= 1 or backbone_lr <= 0:
        raise ConfigError(
            f"task.layer_decay={layer_decay} must be above 0 and at most 1, task.backbone_lr={backbone_lr} above 0"
        )
    if layer_decay == 1 and backbone_lr == 1:
        return
    count = len(backbone.blocks)
    share = {id(parameter): backbone_lr for parameter in backbone.parameters()}
    share |= {id(parameter): backbone_lr * layer_decay**count for parameter in backbone.embedding.parameters()}
    for number, block in enumerate(backbone.blocks, 1):
        share |= {id(parameter): backbone_lr * layer_decay ** (count - number) for parameter in block.parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_share: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_share.setdefault(share.get(id(parameter), 1.0), []).append(parameter)
        for scale, parameters in sorted(by_share.items(), reverse=True):
            groups.append({**group, "params": parameters, "lr": group["lr"] * scale})
    optimizer.param_groups[:] = groups
