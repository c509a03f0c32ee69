"""SequenceParallel: the Lightning strategy that cuts rows among processes."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqlong.errors import CheckpointError, ConfigError
from seqlong.parallel.saver import Saver

log = logging.getLogger("seqlong")

#: Seconds that a run which ends by an error gives a checkpoint that is still being written.
GRACE = 300.0


class SequenceParallel(DDPStrategy):
    """Every row is held by ``degree`` processes, each with ``1 / degree`` of its positions and all of the weights.

    Memory of activations falls with the degree. What crosses between processes: for a linear mixer one state a
    process, whatever the length; for attention its queries, keys, values and results; gradients as in DDP. The loss and
    its gradients are those of one process.

    Processes that hold the same rows are neighbours (rank 0 and 1 for ``degree=2``): keep them on one machine.

    Checkpoints are whole, unless ``in_parts``: then each process writes a part, and any strategy, on any number of
    processes, reads them again (``seqlong.parallel.parts``).

    Args:
        degree: processes that share a row; all there are if not given. Must divide their number and the rows' length.
        passes: hand each recurrent state from process to process, instead of gathering those of all: less traffic, more
            waiting; for many processes.
        timeout_minutes: how long a process waits for another before it gives up.
        find_unused_parameters: for models of which a step may leave parameters out.
        in_parts: checkpoints in parts; null chooses by size where weights are held in parts (FSDP2).
        background: write checkpoints in parts while training goes on, from a copy in the host's memory.
    """

    def __init__(
        self,
        degree: int | None = None,
        passes: bool = False,
        timeout_minutes: float = 30.0,
        find_unused_parameters: bool = False,
        in_parts: bool | None = None,
        background: bool = True,
    ) -> None:
        if degree is not None and degree < 1:
            raise ConfigError(f"sequence parallelism needs a degree of at least 1, found {degree}")
        super().__init__(timeout=timedelta(minutes=timeout_minutes), find_unused_parameters=find_unused_parameters)
        self._degree, self.passes = degree, passes
        self.in_parts, self.background = in_parts, background
        self._mesh: DeviceMesh | None = None
        self.saver: Saver | None = None

    @property
    def degree(self) -> int:
        """Processes that share a row."""
        return self.world_size if self._degree is None else self._degree

    @property
    def sequence(self) -> tuple[dist.ProcessGroup, int, int, bool] | None:
        """What ``split`` is to know of the processes that hold this one's rows; None if it alone does."""
        assert self._mesh is not None
        if self.degree == 1:
            return None
        return self._mesh.get_group("sequence"), self._mesh.get_local_rank("sequence"), self.degree, self.passes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which rows are read here: the same by all that share them."""
        return {"num_replicas": self.world_size // self.degree, "rank": self.global_rank // self.degree}

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.world_size % self.degree:
            raise ConfigError(
                f"sequence parallelism of degree {self.degree} needs a multiple of {self.degree} processes, found "
                f"{self.world_size}; set trainer.devices and trainer.num_nodes to have one"
            )
        shape = (self.world_size // self.degree, self.degree)
        self._mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("data", "sequence"))
        # Writing may take long; a process that is gone is noticed without the timeout.
        writers = dist.new_group(backend="gloo", timeout=timedelta(hours=4))
        assert isinstance(writers, dist.ProcessGroup)  # every process is a member
        self.saver = Saver(writers, self.background)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def writes_parts(self) -> bool:
        """Whether checkpoints are written in parts."""
        return bool(self.in_parts)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or in parts; what is written in the background is awaited by ``saver.wait``."""
        if not self.writes_parts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        assert self.saver is not None
        names = storage_options or {}
        self.saver.save(checkpoint, Path(filepath), names.get("links", ()), names.get("stale", ()))

    def on_exception(self, exception: BaseException) -> None:
        self._finish_writing()
        super().on_exception(exception)

    def teardown(self) -> None:
        self._finish_writing()
        super().teardown()

    def _finish_writing(self) -> None:
        """Lose nothing that is on its way, whatever the run ends with."""
        if self.saver is not None:
            try:
                self.saver.wait(GRACE)
            except CheckpointError as error:
                log.error("%s", error)
