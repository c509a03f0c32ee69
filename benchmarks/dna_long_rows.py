"""One GPU: whole training steps of HybriDNA-300M on rows of 131,072 bases, against a Transformer of its size."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator

from _fit import fit

from seqlong.bench import Row, main


def rows(folder: str) -> Iterator[Row]:
    """Four steps each, the best speed of a step and the peak memory."""
    common = (
        "experiment=dna/pretrain", "data.path=ecoli", "data.stages=null", "data.length=131072", "data.batch_size=1",
        "trainer.accumulate_grad_batches=1", "trainer.max_steps=4", "trainer.log_every_n_steps=1",
        "trainer.limit_val_batches=0",
    )  # fmt: skip
    found = {}
    for model in ("hybridna_300m", "transformer_300m"):
        metrics = fit(folder, *common, f"model={model}")
        found[model] = max(metrics["throughput/tokens_per_s"]), metrics["memory/peak_gib"][-1]
    ours, theirs = found["hybridna_300m"], found["transformer_300m"]
    yield Row("HybriDNA-300M, one row of 131,072", "training", ours[0], "tokens/s", "transformer_300m", theirs[0])
    yield Row("HybriDNA-300M, one row of 131,072", "peak memory", ours[1], "GiB", "transformer_300m", theirs[1])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        main("dna_long_rows", rows(scratch))
