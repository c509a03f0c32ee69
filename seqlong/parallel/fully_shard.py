"""FullyShard: the Lightning strategy that holds weights, gradients and moments in parts (FSDP2), rows too if asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from seqlong.errors import CheckpointError, ConfigError
from seqlong.ffn import MoE
from seqlong.parallel.parts import folder_of, put_together, read_head, read_into, shapes
from seqlong.parallel.strategy import SequenceParallel

#: Bytes that a checkpoint has for a parameter: the weight and two moments, in float32.
BYTES = 12
#: Bytes from which on checkpoints are in parts, if nothing is said: more takes one process long to gather and write.
LARGE = 8 << 30


class FullyShard(SequenceParallel):
    """Every process holds a part of each weight, of its gradient and of the optimiser's moments; a block's weights are
    gathered while it runs, and given back (FSDP2; arXiv 1910.02054, 2304.11277).

    For models whose weights and moments, 16 bytes a parameter, are much of a GPU's memory. With ``degree`` rows are cut
    as well, as ``SequenceParallel`` does. Loss, gradients, clipping and steps are those of one process. Weights are
    gathered, and gradients added up, in float32; mixed precision is ``trainer.precision``'s, as everywhere.

    Checkpoints are whole, and the same as those of any other strategy, or, from 8 GiB of weights and moments on, in
    parts: each process writes what it holds. A run may go on from either with another strategy, or on another number of
    processes, each of which reads its own part.

    Args:
        degree: processes that share a row; 1: each has rows of its own; all there are if null.
        passes: see ``SequenceParallel``.
        replicas: groups of processes that each hold all of the weights between them. Within a machine gathering is
            cheap: one replica a machine needs only gradients to cross.
        expert_parallel: each process holds some of the experts of every MoE layer, whole, and positions travel to them,
            instead of the weights of all experts to every process.
        keep_gathered: keep a block's weights from the forward to the backward pass: one gathering less, at the memory
            of all weights.
        timeout_minutes: how long a process waits for another before it gives up.
        in_parts: checkpoints in parts: ``true``, ``false``, or null: from 8 GiB on.
        background: write checkpoints in parts while training goes on, from a copy in the host's memory.
    """

    def __init__(
        self,
        degree: int | None = 1,
        passes: bool = False,
        replicas: int = 1,
        expert_parallel: bool = False,
        keep_gathered: bool = False,
        timeout_minutes: float = 30.0,
        in_parts: bool | None = None,
        background: bool = True,
    ) -> None:
        super().__init__(
            degree=degree, passes=passes, timeout_minutes=timeout_minutes, in_parts=in_parts, background=background
        )
        if replicas < 1:
            raise ConfigError(f"FSDP2 needs 1 replica or more, found replicas={replicas}")
        if expert_parallel and replicas > 1:
            raise ConfigError("experts on several processes have one replica: set replicas=1 or expert_parallel=false")
        self.replicas, self.expert_parallel, self.keep_gathered = replicas, expert_parallel, keep_gathered
        self._weights: DeviceMesh | None = None
        self._from: tuple[Path, dict[str, Any]] | None = None  # parts that weights are to be read from, and their head

    # --- what is where -------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.world_size % self.replicas:
            raise ConfigError(
                f"replicas={self.replicas} needs a multiple of {self.replicas} processes, found {self.world_size}"
            )
        shape, names = (self.world_size,), ("shard",)
        if self.replicas > 1:
            shape, names = (self.replicas, self.world_size // self.replicas), ("replicate", "shard")  # type: ignore[assignment]
        self._weights = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def setup(self, trainer: Trainer) -> None:
        """Shard the model, then make its optimiser."""
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigError("FSDP2 scales no float16 losses; set trainer.precision=bf16-mixed or 32-true")
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self.lightning_module)
        assert self._weights is not None
        shard(self.lightning_module, self._weights, self.root_device, self.expert_parallel, self.keep_gathered)
        self._read_weights(self.lightning_module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        else:
            self._from = None
        self.setup_precision_plugin()
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # what is gathered under it could not be trained with

    # --- steps: through the hooks that gather what is in no block -------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._run("training_step", *args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._run("validation_step", *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._run("test_step", *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._run("predict_step", *args, **kwargs)

    def _run(self, step: str, *args: Any, **kwargs: Any) -> Any:
        model = self.lightning_module
        assert model is not None
        return self._forward_redirection(model, model, step, *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients where they are until the last batch of an accumulated step."""
        model: Any = self.lightning_module
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def writes_parts(self) -> bool:
        if self.in_parts is not None:
            return self.in_parts
        assert self.lightning_module is not None
        return BYTES * sum(parameter.numel() for parameter in self.lightning_module.parameters()) >= LARGE

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, on the CPU of the first process, nothing elsewhere; or those of this process."""
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return state if self.writes_parts else self._whole(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole moments, on the CPU of the first process, nothing elsewhere; or those of this process."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return optimizer.state_dict() if self.writes_parts else self._whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint; of one in parts what is not large, and the shapes of what is."""
        path = Path(checkpoint_path)
        head = read_head(path)
        folder = None if head is None else folder_of(path, head)
        if head is None or folder is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        known = shapes(folder)
        self._from = folder, put_together(head, known.__getitem__)
        return dict(self._from[1])

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the weights; those in parts when the model is in parts too (``setup``)."""
        if self._from is None:
            super().load_model_state_dict(checkpoint, strict)
            return
        assert self.lightning_module is not None
        ours, theirs = set(self.lightning_module.state_dict()), set(checkpoint["state_dict"])
        if strict and (wrong := sorted(ours ^ theirs)):
            where = "the model" if wrong[0] in theirs else self._from[0]
            raise CheckpointError(f"{self._from[0]} is of another architecture: {wrong[0]} is not in {where}")

    def _read_weights(self, model: nn.Module) -> None:
        if self._from is None:
            return
        folder, head = self._from
        saved = {name: value for name, value in head["state_dict"].items() if name in model.state_dict()}
        ours = {name: model.state_dict()[name] for name in saved}
        read_into(folder, {f"state_dict/{n}": ours[n] for n in saved if saved[n].is_meta}, self._cpu_group)
        with torch.no_grad():
            for name, value in saved.items():
                if not value.is_meta:
                    ours[name].copy_(self._part(value, ours[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of the moments."""
        targets: dict[str, Tensor] = {}
        made = []
        for place, (optimizer, saved) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state: dict[int, dict[str, Any]] = {}
            for number, values in saved["state"].items():
                state[number] = {name: self._room(value, parameters[number]) for name, value in values.items()}
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.is_meta:
                        targets[f"optimizer_states/{place}/state/{number}/{name}"] = state[number][name]
            made.append((optimizer, {**saved, "state": state}))
        if self._from is not None:
            read_into(self._from[0], targets, self._cpu_group)
            self._from = None
        for optimizer, content in made:
            optimizer.load_state_dict(content)

    @property
    def _cpu_group(self) -> dist.ProcessGroup:
        assert self.saver is not None
        return self.saver.group

    def _room(self, value: Any, parameter: Tensor) -> Any:
        """This process's part of a moment, or room for it where it is in parts."""
        if not isinstance(value, Tensor) or not value.is_meta:
            return self._part(value, parameter)
        if value.shape == parameter.shape:
            return torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
        return torch.zeros_like(value, device=self.root_device)

    def _whole(self, value: Any) -> Any:
        """``value`` with every part made whole: by all processes together, in one order."""
        if isinstance(value, dict):
            made = {name: self._whole(item) for name, item in value.items()}
            return made if self.is_global_zero else {}
        if isinstance(value, list | tuple):
            return type(value)([self._whole(item) for item in value])
        if isinstance(value, DTensor):
            value = value.full_tensor()
            return value.cpu() if self.is_global_zero else None
        return value.cpu() if isinstance(value, Tensor) else value

    def _part(self, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        value = value.to(self.root_device, parameter.dtype)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def teardown(self) -> None:
        """Let go of the machine. (The parts stay where they are: no process could use them alone.)"""
        self._finish_writing()
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    device: torch.device,
    expert_parallel: bool = False,
    keep_gathered: bool = False,
) -> None:
    """Leave each process its part of every weight, on its device; all begin with those of the first.

    Args:
        model: each of its ``backbone.blocks`` is gathered by itself, the rest for a whole step.
        mesh: of one dimension, or of two: replicas, and the processes that hold the weights between them.
        device: of this process.
        expert_parallel, keep_gathered: see ``FullyShard``.
    """
    apart: set[nn.Parameter] = set()
    for module in (*getattr(getattr(model, "backbone", None), "blocks", ()), model):
        module.to(device)
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.data, 0)
        if expert_parallel:
            apart |= _share_experts(module, mesh)
        again = None if module is model else not keep_gathered
        fully_shard(module, mesh=mesh, reshard_after_forward=again, ignored_params=apart)
        if device.type == "cpu" and hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # gloo averages wrongly in older torch


def _share_experts(module: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Give each process its experts of the MoE layers in a block; the parameters of these."""
    shared: set[nn.Parameter] = set()
    for layer in module.modules():
        if isinstance(layer, MoE) and layer.experts.exchange is None:
            if layer.choice == "expert":
                raise ConfigError("experts that choose positions need all of them: set choice=token of MoE")
            layer.experts.share(mesh)
            shared |= set(layer.experts.parameters())
    return shared
