"""A checkpoint, ready for inference: its task, where it runs, and exact passes over sequences of any length."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqlong import runs
from seqlong.backbone import Backbone
from seqlong.batch import SequenceBatch
from seqlong.callbacks.checkpoints import CONFIG_KEY, DATA_KEY, read_checkpoint
from seqlong.errors import CheckpointError, ConfigError
from seqlong.parallel.parts import head_of
from seqlong.state import BackboneState

log = logging.getLogger("seqlong")

Precision = Literal["auto", "float64", "float32", "bfloat16"]


@dataclass
class Model:
    """A trained task that is asked, not trained.

    Attributes:
        task: the LightningModule, in evaluation mode on ``device``.
        path: the checkpoint that it is from.
        device: where it runs.
        precision: of products: float32 on a CPU, bfloat16 on a GPU (parameters and states stay float32), or float64.
        length: positions of the longest rows that it was trained on; 0 if the configuration does not say.
        config: the configuration of its run.
        card: what its data said of themselves (sequences with digests, the split); empty if the run told nothing.
    """

    task: Any
    path: Path
    device: torch.device
    precision: Literal["float64", "float32", "bfloat16"] = "float32"
    length: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The model without its head."""
        backbone = self.task.backbone
        assert isinstance(backbone, Backbone)
        return backbone

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one, so that a row may be run in parts."""
        both = getattr(self.backbone, "strands", None) is not None  # an equivariant backbone reads the other strand too
        return not both and all(block.causal for block in self.backbone._blocks())

    @property
    def width(self) -> int:
        """Numbers of a hidden state."""
        return int(self.hidden(torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1])

    @property
    def bounded(self) -> bool:
        """Whether what is carried from part to part keeps its size."""
        return self.causal and all(block.mixer.bounded_state for block in self.backbone._blocks())

    @property
    def kind(self) -> str:
        """``causal``: predicts the token after each position; ``masked``: hidden tokens; else the task's name."""
        head = hasattr(self.task, "head") and hasattr(self.task.head, "logits")
        if head and getattr(self.task, "targets", "") == "next" and self.causal:
            return "causal"
        return "masked" if head and hasattr(self.task, "mask_token") else type(self.task).__name__

    @property
    def mask_token(self) -> int:
        """What a masked model reads where a token is hidden."""
        return int(self.task.mask_token)

    def require(self, *kinds: str, why: str) -> None:
        """Raise a ConfigError unless the model is of one of these kinds."""
        if self.kind not in kinds:
            wanted = " or ".join(f"a {kind} language model" for kind in kinds)
            raise ConfigError(f"{self.path} is {_ARTICLES.get(self.kind, self.kind)}, but {why} needs {wanted}")

    # --- passes --------------------------------------------------------------------------------------------------

    def products(self) -> AbstractContextManager[Any]:
        """The precision that products run in."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def initial_state(self, rows: int = 1) -> BackboneState:
        """The state before the first token of ``rows`` rows."""
        weight = self.backbone.embedding.weight
        dtype = torch.bfloat16 if self.precision == "bfloat16" else weight.dtype
        return self.backbone.initial_state(rows, self.device, dtype)

    def hidden(
        self, tokens: Int[Tensor, "b t"], state: BackboneState | None = None
    ) -> tuple[Float[Tensor, "b t d"], BackboneState | None]:
        """Last hidden states, and the state after the last token if one was given."""
        with torch.no_grad(), self.products():
            output = self.backbone(SequenceBatch(tokens=tokens.to(self.device)), state)
        return output.hidden, output.state

    def logits(
        self, tokens: Int[Tensor, "b t"], state: BackboneState | None = None
    ) -> tuple[Float[Tensor, "b t y"], BackboneState | None]:
        """Logits of every position, and the state after the last token if one was given."""
        hidden, state = self.hidden(tokens, state)
        with torch.no_grad(), self.products():
            return self.task.head.logits(hidden), state

    def log_likelihood(
        self, tokens: Int[Tensor, "b t"], targets: Int[Tensor, "b t"], state: BackboneState | None = None
    ) -> tuple[Float[Tensor, "b t"], BackboneState | None]:
        """``ln p(target)`` at each position, nats, 0 where the target is -1; and the state, as ``hidden`` gives it."""
        hidden, state = self.hidden(tokens, state)
        with torch.no_grad(), self.products():
            return -self.task.head.loss(hidden, targets.to(self.device)), state

    def stream(self, parts: Iterable[Tensor], state: BackboneState | None = None) -> Iterator[Tensor]:
        """Hidden states ``(b t d)`` of the parts ``(b t)`` of one long sequence: the whole row's, whatever its length.

        Only one part, and the state, are in memory at a time. A row split anywhere is the row, for causal models.

        Raises:
            ConfigError: the model sees later tokens, so that a part needs all others.
        """
        if not self.causal:
            raise ConfigError(f"{self.path} sees both sides of a position, so a row cannot be run in parts")
        for tokens in parts:
            state = self.initial_state(tokens.shape[0]) if state is None else state
            hidden, state = self.hidden(tokens, state)
            yield hidden


_ARTICLES = {"causal": "a causal language model", "masked": "a masked language model"}


def repeat(state: BackboneState, rows: int) -> BackboneState:
    """The state of one row for ``rows`` rows that go on from it."""
    return state.map(lambda value: value.expand(rows, *value.shape[1:]).contiguous())


def find(checkpoint: str | Path, root: str | Path = "runs") -> Path:
    """The file of a checkpoint.

    Args:
        checkpoint: a file; a run folder, of which the best is taken, or the last if there is none; ``last`` or ``best``
            of the run that was written to last.
        root: where the runs are.

    Raises:
        CheckpointError: there is none.
    """
    if str(checkpoint) in ("last", "best"):
        run = runs.newest(root)
        return run / "checkpoints" / "last.ckpt" if str(checkpoint) == "last" else runs.best_checkpoint(run)
    path = head_of(Path(checkpoint).expanduser())
    if path.is_dir():
        run = path.parent if path.name == "checkpoints" else path
        last = run / "checkpoints" / "last.ckpt"
        if any((run / "checkpoints").glob("best-*.ckpt")):
            return runs.best_checkpoint(run)
        if last.is_file():
            return last
        raise CheckpointError(
            f"{path} is a folder without checkpoints/last.ckpt; expected a run folder or a .ckpt file"
        )
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {checkpoint}; expected a file, a run folder, 'last' or 'best'")
    return path


def load(
    checkpoint: str | Path, device: str = "auto", precision: Precision = "auto", root: str | Path = "runs"
) -> Model:
    """A model from its checkpoint, which holds its configuration; only tensors and primitives are loaded.

    Args:
        checkpoint: see ``find``.
        device: ``auto`` is the GPU if there is one; else as torch names it.
        precision: ``auto`` is bfloat16 on a GPU and float32 on a CPU.
        root: where the runs are.

    Raises:
        CheckpointError: no such file, one that is damaged, holds no configuration, or does not fit it.
        ConfigError: no such device or precision.
    """
    path = find(checkpoint, root)
    content = read_checkpoint(path)
    config = content.get(CONFIG_KEY)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path} holds no configuration; expected a checkpoint that 'seqlong fit' saved")
    place = _device(device)
    kind = ("bfloat16" if place.type == "cuda" else "float32") if precision == "auto" else precision
    if kind not in ("float64", "float32", "bfloat16"):
        raise ConfigError(f"precision is '{precision}'; expected auto, float64, float32 or bfloat16")
    _check_tokens(config, path)
    task = _build(config["model"], path)
    try:
        task.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise CheckpointError(f"{path} does not fit its own configuration: {'; '.join(lines)}") from error
    task.eval().requires_grad_(False).to(place)
    if kind == "float64":
        task.double()
    card = content.get(DATA_KEY) or runs.read_json(path.parent.parent / "data.json", {}) or {}
    return Model(task, path, place, kind, _length(config), config, card)  # type: ignore[arg-type]


def _check_tokens(config: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for a model of words or pieces of DNA: what asks models here reads single bases."""
    given = (config.get("data") or {}).get("init_args") or {}
    tokens = given.get("tokenizer")
    if isinstance(tokens, dict) and tokens.get("kind", "base") != "base":
        raise ConfigError(
            f"{path} was trained on tokens of kind '{tokens['kind']}' (data.tokenizer), but this command reads single "
            "bases; use seqlong validate, test or predict, or train with data.tokenizer.kind=base"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _build(settings: dict[str, Any], path: Path) -> Any:
    """The task of ``class_path`` and ``init_args``, on the CPU."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    try:
        made = parser.instantiate_classes(parser.parse_object({"model": copy.deepcopy(settings)}))
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{path} was saved from a configuration that this version of seqlong cannot build: {lines[-1]}"
        ) from error
    return made.model


def _length(config: dict[str, Any]) -> int:
    """Positions of the longest rows of training."""
    data = (config.get("data") or {}).get("init_args") or {}
    stages = data.get("stages") or []
    found = [stage.get("length") for stage in stages if isinstance(stage, dict)] or [data.get("length")]
    return max((int(value) for value in found if isinstance(value, int)), default=0)
