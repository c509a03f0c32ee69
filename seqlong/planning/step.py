"""The training step of a configuration, on tensors without contents: what it holds at its fullest, what it does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.compose import Composed, compose, from_files, parse_overrides
from seqlong.errors import ConfigError, SeqlongError
from seqlong.heads import LanguageHead
from seqlong.planning.ledger import KINDS, Ledger, Moment, as_on_gpu

PRECISIONS = {"32-true": None, "32": None, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What is to be trained, and how.

    Attributes:
        name: of the experiment or model.
        backbone: settings of the backbone.
        tied: whether the head has the embedding's weight.
        rows: in a batch.
        length: tokens of a row.
        batches: in a step, one after the other (``accumulate_grad_batches``).
        precision: of ``trainer.precision``.
        composed: where all this is from.
    """

    name: str
    backbone: Mapping[str, Any]
    tied: bool
    rows: int
    length: int
    batches: int
    precision: str
    composed: Composed = field(repr=False)

    @property
    def checkpointing(self) -> str:
        """What is kept for the backward pass."""
        return str(self.backbone.get("checkpointing", "none"))

    @property
    def tile(self) -> int:
        """Positions a tile; 0 without tiles."""
        return int(self.backbone.get("tile", 16384)) if self.checkpointing == "tiled" else 0

    def model(self, device: torch.device | str = "meta") -> nn.Module:
        """Backbone and head: on the meta device without memory, elsewhere with first weights."""
        from seqlong.show import build

        backbone = build(dict(self.backbone), self.composed)
        if str(device) != "meta":  # which has been checked by now
            parser = ArgumentParser(exit_on_error=False)
            parser.add_argument("--backbone", type=BackboneConfig)
            parsed = parser.parse_object({"backbone": copy.deepcopy(dict(self.backbone))})
            with torch.device(device):
                backbone = Backbone(parser.instantiate_classes(parsed).backbone)
        with torch.device(device):
            embedding = backbone.embedding
            head = LanguageHead(
                embedding.embedding_dim, embedding.num_embeddings, embedding if self.tied else None, backbone.strands
            )
        return nn.ModuleDict({"backbone": backbone, "head": head})


def job(
    words: Sequence[str], gpu: bool, length: int | None = None, rows: int | None = None, config: str | None = None
) -> Job:
    """The job of a configuration.

    Args:
        words: overrides, with ``experiment=`` or ``model=`` unless there is a ``config``.
        gpu: whether it is planned for a GPU: ``hardware=gpu`` unless the words say another.
        length: tokens a row; the data's if not given.
        rows: in a batch; the data's if not given.
        config: a resolved configuration file instead.

    Raises:
        ConfigError: what does not compose; a precision or model that is not foreseen.
    """
    given = list(words)
    named = {override.key_or_group: str(override.value()) for override in parse_overrides(given)}
    keys = set(named)
    if config is not None:
        composed = from_files([config], given)
    else:
        if not keys & {"experiment", "model"}:
            raise ConfigError("plan needs a model: experiment=NAME or model=NAME; `seqlong show` lists the models")
        if "hardware" not in keys:
            given.append(f"hardware={'gpu' if gpu else 'cpu'}")
        composed = _composed(given, keys)
    house = composed.house
    backbone = (house.get("model") or {}).get("backbone")
    if not isinstance(backbone, Mapping):
        raise ConfigError("this configuration has no model.backbone; choose one with model=NAME")
    data, trainer, task = (house.get(key) or {} for key in ("data", "trainer", "task"))
    precision = str(trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise ConfigError(f"plan knows trainer.precision {', '.join(PRECISIONS)}; found {precision}")
    length = length or _whole(data.get("length")) or 131072
    return Job(
        named.get("model") or named.get("experiment") or str((house.get("run") or {}).get("name") or "model"),
        backbone,
        bool(task.get("tie_embeddings", True)),
        rows or _whole(data.get("batch_size")) or 1,
        length,
        _whole(trainer.get("accumulate_grad_batches")) or 1,
        precision,
        composed,
    )


def _composed(words: list[str], keys: set[str]) -> Composed:
    rest = [] if "experiment" in keys else [w for w in ("task=causal_lm", "data=ecoli") if w.split("=")[0] not in keys]
    try:
        return compose([*words, *rest])
    except ConfigError:
        if "data.path" in keys:
            raise
        return compose([*words, *rest, "data.path=FILE"])  # which is not read


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


@dataclass(frozen=True)
class Sketch:
    """A step of one length, counted.

    Attributes:
        rows, length: of a batch.
        parameters: of the model.
        standing: bytes between steps: weights, buffers, the optimiser's moments.
        weights: bytes of the weights among them.
        gradients: bytes of all gradients.
        kept: bytes made in the forward pass that exist when the backward begins.
        moments: of each part of the step, in order, its fullest.
        made: of each such moment, bytes of gradients that existed.
        flops: additions and multiplications, by kind.
        moved: bytes read and written, by kind.
        calls: operations, by kind.
        names: the same by name, for those who look closer.
        opaque: ops whose inside could not be followed.
    """

    rows: int
    length: int
    parameters: int
    standing: int
    weights: int
    gradients: int
    kept: int
    moments: dict[str, Moment]
    made: dict[str, int]
    flops: dict[str, float]
    moved: dict[str, float]
    calls: dict[str, int]
    names: dict[str, dict[str, float]]
    opaque: dict[str, str]

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of all."""
        return max(moment.live for moment in self.moments.values())


def sketch(job: Job, length: int, processors: int = 0) -> Sketch:
    """Count a step of rows of ``length`` tokens: the second one, when the optimiser has its moments.

    Args:
        job: what is trained.
        length: tokens of a row.
        processors: multiprocessors of the GPU; 0 for a CPU.

    Raises:
        SeqlongError: the model cannot be run without contents.
    """
    ledger = Ledger()
    model = job.model()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with as_on_gpu(ledger, processors) if processors else nullcontext(), fake, ledger:
            model.to_empty(device="cpu").train()
            standing, kept, serials = _two_steps(job, model, length, ledger, fused=bool(processors))
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SeqlongError(f"{job.name} cannot be counted without contents: {reason}") from error
    made = {
        part: sum(size for serial, size in serials if serial <= moment.serial)
        for part, moment in ledger.moments.items()
    }
    return Sketch(
        job.rows,
        length,
        sum(p.numel() for p in model.parameters()),
        standing,
        weights,
        sum(size for _, size in serials),
        kept,
        ledger.moments,
        made,
        {kind: ledger.work[kind].flops for kind in KINDS},
        {kind: ledger.work[kind].moved for kind in KINDS},
        {kind: ledger.work[kind].calls for kind in KINDS},
        {kind: ledger.work[kind].names for kind in KINDS},
        ledger.opaque,
    )


def _two_steps(
    job: Job, model: nn.Module, length: int, ledger: Ledger, fused: bool
) -> tuple[int, int, list[tuple[int, int]]]:
    """Run them; bytes that stay between steps, that wait for the backward pass, and (serial, bytes) of gradients."""
    mark_parts(model, ledger)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused or None)
    inputs, targets = (torch.zeros(job.rows, length, dtype=torch.int64) for _ in range(2))
    standing = kept = 0
    for _ in range(2):
        ledger.clear()
        standing = ledger.live
        for _ in range(min(job.batches, 2)):  # the second is the first that finds gradients
            ledger.part, ledger.forward = "embedding", True
            loss = loss_of(job, model, inputs, targets)
            ledger.part, ledger.forward = "loss, backward", False
            kept = ledger.kept
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        ledger.part = "optimiser"
        serials = []
        for parameter in model.parameters():
            if parameter.grad is not None and (serial := ledger.serial_of(parameter.grad)) is not None:
                serials.append((serial, parameter.grad.numel() * parameter.grad.element_size()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return standing, kept, serials


def loss_of(job: Job, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of a batch, as the task makes it; of real tensors too."""
    kind = PRECISIONS[job.precision]
    device = inputs.device.type
    with torch.autocast(device, kind) if kind is not None else nullcontext():
        output = model["backbone"](SequenceBatch(tokens=inputs))  # type: ignore[index]
        loss: Tensor = model["head"].loss(output.hidden, targets).mean()  # type: ignore[index]
    for name, value in output.aux.items():
        if name.endswith("_loss") or name.endswith("_loss_sum"):
            loss = loss + value
    return loss


def mark_parts(model: nn.Module, ledger: Ledger) -> None:
    """Let the ledger know which block runs, forward and backward: each part's fullest moment grows by its own law."""

    def marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            way = "forward" if ledger.forward else "again"
            ledger.part = f"{name}, {way}"
            out = function(*args, **kwargs)
            if isinstance(out[0], Tensor) and out[0].requires_grad:

                def backward(gradient: Tensor) -> None:
                    ledger.part = f"{name}, backward"

                out[0].register_hook(backward)
            if ledger.forward:
                ledger.part = f"after {name}"
            return out

        return run

    for number, block in enumerate(model["backbone"].blocks, 1):  # type: ignore[index]
        for half in ("both", "mix", "feed"):
            setattr(block, half, marked(getattr(block, half), f"block {number} {half}"))
