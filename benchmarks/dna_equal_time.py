"""One GPU on E. coli: a 25 M hybrid against pure attention and pure Mamba2 of its size, trained for the same time."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator

from _fit import fit

from seqlong.bench import Row, main

MODELS = ("hybrid_medium", "transformer_medium", "mamba2_medium")


def rows(folder: str, seconds: float) -> Iterator[Row]:
    """Each model's schedule is fitted to the steps that it can do in the time, by its speed in a short first run."""
    bits, speeds, steps, floor = {}, {}, {}, ("markov", 2.0)
    for model in MODELS:
        common = ("experiment=dna/ecoli", f"model={model}")
        probe = fit(folder, *common, "trainer.max_steps=40", "trainer.limit_val_batches=0")
        speeds[model] = max(probe["throughput/tokens_per_s"])
        steps[model] = max(100, int(seconds * speeds[model] / (4 * 8192)))
        metrics = fit(folder, *common, f"trainer.max_steps={steps[model]}",
                      f"trainer.val_check_interval={steps[model] // 4}")  # fmt: skip
        bits[model] = metrics["val/bits"][-1]
        floor = next((name, values[-1]) for name, values in metrics.items() if name.startswith("floor/markov"))
        print(model, f"{steps[model]} steps", f"val/bits {metrics['val/bits']}", flush=True)
    hybrid, what = MODELS[0], "validation bits per base"
    name = f"{seconds:.0f} s of training, rows of 8,192"
    yield Row(name, what, bits[hybrid], "bits", floor[0].removeprefix("floor/"), floor[1])
    for other in MODELS[1:]:
        yield Row(name, what, bits[hybrid], "bits", other, bits[other])
    for other in MODELS[1:]:
        yield Row("rows of 8,192", "training speed", speeds[hybrid], "tokens/s", other, speeds[other])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="training time of each model")
    with tempfile.TemporaryDirectory() as scratch:
        main("dna_equal_time", rows(scratch, parser.parse_args().seconds))
