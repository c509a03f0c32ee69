"""One process of tests/test_video_parallel.py: tasks of video on a part of the rows.

python video_parallel.py RANK RANKS STORE
"""

from __future__ import annotations

import sys
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from seqlong.backbone import BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.embeddings import PatchEmbedding
from seqlong.mixers import Attention, Bidirectional, Mamba2
from seqlong.tasks import MaskedVideo, SequenceTask, VideoClassification, VideoPrediction

SIZE, GRID = 12, (6, 3, 4)
MIXERS = {
    "m": partial(Mamba2, d_state=8, head_dim=8),
    "a": partial(Attention, heads=2, window=64, rope_axes=[4, 2, 2]),
    "b": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8)),
}


def _config(pattern: str) -> BackboneConfig:
    patches = partial(PatchEmbedding, size=SIZE)
    return BackboneConfig(vocab_size=4, d_model=16, pattern=pattern, mixers=MIXERS, patches=patches)  # type: ignore[arg-type]


#: Name -> a task of weights that are always the same.
TASKS = {
    "classification by the mean": lambda: VideoClassification(_config("ma"), 3),
    "classification by the last": lambda: VideoClassification(_config("m"), 3, pool="last"),
    "masked": lambda: MaskedVideo(_config("b"), rate=0.5),
    "prediction": lambda: VideoPrediction(_config("ma")),
}


def clips() -> SequenceBatch:
    """Two clips, one of them short."""
    torch.manual_seed(1)
    positions = Tubelets(1, 1, 1).positions(GRID)
    ids = torch.ones(2, len(positions), dtype=torch.int32)
    ids[1, 48:] = 0
    targets = torch.full((2, len(positions)), -1)
    targets[0, -1], targets[1, 47] = 2, 1
    return SequenceBatch(
        targets=targets, segment_ids=ids, positions=positions.expand(2, -1, 3).clone(), index=torch.arange(2),
        patches=torch.randn(2, len(positions), SIZE, dtype=torch.float64),
    )  # fmt: skip


def gradients(name: str, sequence: tuple[object, int, int] | None) -> dict[str, Tensor]:
    """Loss and gradients, as sums over processes, and what callbacks are handed in evaluation."""
    torch.manual_seed(0)
    task: SequenceTask = TASKS[name]().double()
    task._trainer = SimpleNamespace(strategy=SimpleNamespace(sequence=sequence))  # type: ignore[assignment]
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    ranks = 1 if sequence is None else sequence[2]
    loss, _ = task.train().objective(clips())
    loss.backward()
    found = {"loss": loss.detach() / ranks}
    found |= {key: weight.grad / ranks for key, weight in task.named_parameters() if weight.grad is not None}
    with torch.no_grad():
        said = task.eval()._evaluate(clips(), "val")
    return found | {f"said {key}": value / ranks for key, value in said.items()}


def together(rank: int, ranks: int, store: str) -> dict[str, dict[str, Tensor]]:
    """What all processes find, added up."""
    at = f"file://{store}"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=ranks, timeout=timedelta(seconds=100))
    try:
        results = {name: gradients(name, (dist.group.WORLD, rank, ranks)) for name in TASKS}
        for found in results.values():
            for value in found.values():
                dist.all_reduce(value)
    finally:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    together(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
