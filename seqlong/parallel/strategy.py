"""SequenceParallel: the Lightning strategy that cuts rows among processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqlong.errors import ConfigError


class SequenceParallel(DDPStrategy):
    """Every row is held by ``degree`` processes, each with ``1 / degree`` of its positions and all of the weights.

    Memory of activations falls with the degree. What crosses between processes: for a linear mixer one state a
    process, whatever the length; for attention its queries, keys, values and results; gradients as in DDP. The loss and
    its gradients are those of one process.

    Processes that hold the same rows are neighbours (rank 0 and 1 for ``degree=2``): keep them on one machine.

    Args:
        degree: processes that share a row; all there are if not given. Must divide their number and the rows' length.
        passes: hand each recurrent state from process to process, instead of gathering those of all: less traffic, more
            waiting; for many processes.
        timeout_minutes: how long a process waits for another before it gives up.
        find_unused_parameters: for models of which a step may leave parameters out.
    """

    def __init__(
        self,
        degree: int | None = None,
        passes: bool = False,
        timeout_minutes: float = 30.0,
        find_unused_parameters: bool = False,
    ) -> None:
        if degree is not None and degree < 1:
            raise ConfigError(f"sequence parallelism needs a degree of at least 1, found {degree}")
        super().__init__(timeout=timedelta(minutes=timeout_minutes), find_unused_parameters=find_unused_parameters)
        self._degree, self.passes = degree, passes
        self._mesh: DeviceMesh | None = None

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
