"""One process of tests/test_video_text.py: matching of videos and texts, some of the pairs with each process.

python video_text_parallel.py RANK RANKS STORE
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
from seqlong.datamodules.video.clips import Clip
from seqlong.datamodules.video.multimodal import DNA, Rows, Told
from seqlong.datamodules.video.tubelets import Tubelets
from seqlong.embeddings import PatchEmbedding
from seqlong.mixers import Attention, Bidirectional, Mamba2
from seqlong.tasks import VideoTextMatching

LOSSES = ("softmax", "sigmoid")
MIXERS = {
    "m": partial(Mamba2, d_state=8, head_dim=8),
    "a": partial(Attention, heads=2, window=64, rope_axes=[4, 2, 2]),
    "s": partial(Bidirectional, mixer=partial(Mamba2, d_state=8, head_dim=8)),
}


def config(pattern: str, size: int = 12) -> BackboneConfig:
    """A small model of patches, bytes and bases."""
    patches = partial(PatchEmbedding, size=size, modalities=[0, DNA])
    return BackboneConfig(vocab_size=276, d_model=16, pattern=pattern, mixers=MIXERS, patches=patches)  # type: ignore[arg-type]


def matching(loss: str = "softmax") -> VideoTextMatching:
    """A task of weights that are always the same."""
    torch.manual_seed(0)
    task = VideoTextMatching(config("ma"), width=8, loss=loss).double()  # type: ignore[arg-type]
    task._trainer = SimpleNamespace(strategy=None)  # type: ignore[assignment]
    return task


def pairs(count: int) -> SequenceBatch:
    """Pairs of which the first two have the same text, and the last is broken if there are more than four."""
    random = torch.Generator().manual_seed(1)
    clips = [Clip(torch.randint(0, 256, (2, 4, 6, 3), generator=random, dtype=torch.uint8)) for _ in range(count)]
    texts = ["ab", "ab", "c", "defg", "hi", "j", "kl", "m"]
    told = [Told(texts[n], video=n, name=texts.index(texts[n])) for n in range(count)]
    if count > 4:
        clips[5] = Clip(None)
    batch = Rows(Tubelets(1, 2, 2), 12, 6, 0, "pair").join(clips, told, torch.arange(count))
    assert batch.patches is not None
    batch.patches = batch.patches.double()
    return batch


def batches(ranks: int) -> list[SequenceBatch]:
    """The shares of a batch of eight."""
    whole, share = pairs(8), 8 // ranks
    return [
        SequenceBatch(**{
            name: None if value is None else value[rank * share : (rank + 1) * share]
            for name, value in vars(whole).items()
        })
        for rank in range(ranks)
    ]  # fmt: skip


def gradients(loss: str, batch: SequenceBatch, ranks: int = 1) -> dict[str, Tensor]:
    """Loss and gradients, as sums over processes."""
    task = matching(loss)
    value, figures = task.objective(batch)
    value.backward()
    found = {"loss": value.detach() / ranks, "nats": figures["nats"], "count": figures["count"].double()}
    return found | {key: weight.grad / ranks for key, weight in task.named_parameters() if weight.grad is not None}


def together(rank: int, ranks: int, store: str) -> dict[str, dict[str, Tensor]]:
    """What all processes find, added up."""
    at = f"file://{store}"
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=ranks, timeout=timedelta(seconds=240))
    try:
        results = {loss: gradients(loss, batches(ranks)[rank], ranks) for loss in LOSSES}
        for found in results.values():
            for value in found.values():
                dist.all_reduce(value)
    finally:
        dist.destroy_process_group()
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    together(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
