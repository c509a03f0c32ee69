"""FiniteGuard: a step whose gradients are not finite changes nothing, is counted, and does not happen for ever."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from seqlong.errors import TrainingError

log = logging.getLogger("seqlong")


class FiniteGuard(Callback):
    """Look at the global norm of the gradients before each optimiser step.

    Gradients are reduced over ranks before, so that every rank sees the same norm and decides the same. A step that is
    not finite loses its gradients (optimisers pass over parameters without one: no update, no weight decay, no
    moments), counts as ``skipped_steps``, and from then on the outputs of modules are watched to find where it begins.
    One device synchronisation a step. Logs ``grad_norm`` (before clipping).

    Args:
        patience: this many steps skipped one after another stop the run with a TrainingError.
    """

    def __init__(self, patience: int = 5) -> None:
        self.patience = patience
        self.skipped = 0
        self.in_a_row = 0
        self._loss: Tensor | None = None
        self._watch: _OutputWatch | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = int(state_dict["skipped"]), int(state_dict["in_a_row"])

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # float16: the scaler skips steps itself, and expects infinities
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        finite = bool(torch.isfinite(norm))  # the one synchronisation
        if finite:
            self.in_a_row = 0
            if self._watch is not None:
                self._watch.remove()
                self._watch = None
            pl_module.log("grad_norm", norm)
        else:
            self._skip(trainer, pl_module)
        if self.skipped:
            pl_module.log("skipped_steps", float(self.skipped))

    def _skip(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.skipped += 1
        self.in_a_row += 1
        first, count, total = first_non_finite_gradient(pl_module)
        for parameter in pl_module.parameters():
            parameter.grad = None
        loss = f"the loss was {self._loss.item():g}" if self._loss is not None else "the loss is unknown"
        seen = self._watch.first if self._watch is not None else None
        origin = f"; forwards, the first output that was not finite came from {seen}" if seen else ""
        text = (
            f"gradient not finite at step {trainer.global_step}: first in {first} (counted from the loss backwards; "
            f"{count} of {total} parameters); {loss}{origin}"
        )
        if self.in_a_row >= self.patience:
            for callback in trainer.checkpoint_callbacks:
                if hasattr(callback, "save_last"):
                    callback.save_last(trainer)  # the weights are those before the first skipped step
            raise TrainingError(
                f"{text}. {self.in_a_row} steps in a row were skipped, so the run stops. Lower the learning rate or "
                "trainer.gradient_clip_val, or use trainer.precision=32-true; "
                "trainer.callbacks.finite_guard.init_args.patience=N waits longer"
            )
        if trainer.is_global_zero:
            log.warning("step skipped, %s (%d in a row)", text, self.in_a_row)
        if self._watch is None:
            self._watch = _OutputWatch(pl_module)
        self._watch.first = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.remove()


def first_non_finite_gradient(module: nn.Module) -> tuple[str, int, int]:
    """The parameter nearest to the loss whose gradient is not finite (the last in forward order, where backpropagation
    met it first), how many are not finite, and of how many."""
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in named if not bool(torch.isfinite(_local(gradient)).all())]
    return (bad[-1] if bad else "no single parameter (their norm overflows)"), len(bad), len(named)


class _OutputWatch:
    """Remembers the first module, in order of calls, that returned something not finite. Costly; only after trouble."""

    def __init__(self, module: nn.Module) -> None:
        self.first: str | None = None
        self._hooks = [
            child.register_forward_hook(self._hook(name))
            for name, child in module.named_modules()
            if name and not list(child.children())
        ]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            checked = self.first is None and isinstance(tensor, Tensor) and tensor.is_floating_point()
            if checked and not bool(torch.isfinite(_local(tensor)).all()):
                self.first = f"{name} ({type(module).__name__})"

        return hook

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
