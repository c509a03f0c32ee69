"""The names of our strategies in ``trainer.strategy``."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from seqlong.parallel.fully_shard import FullyShard
from seqlong.parallel.strategy import SequenceParallel


def register() -> None:
    """Make them known to Lightning."""
    for name, kind, degree, what in (
        ("sequence_parallel", SequenceParallel, None, "every row is shared by all processes, each has all weights"),
        ("seqlong_fsdp2", FullyShard, 1, "each process has rows of its own, and a part of every weight"),
        ("seqlong_sp", FullyShard, None, "every row is shared by all processes, and so is every weight"),
    ):
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, kind, description=what, degree=degree)
