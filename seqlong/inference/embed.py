"""The verb ``seqlong embed``: hidden states of whole chromosomes, as an array."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqlong import runs
from seqlong.datamodules.dna.genome import Genome
from seqlong.errors import ConfigError
from seqlong.inference.arguments import Parser, integer, open_model, require_bases
from seqlong.inference.model import Model
from seqlong.inference.passes import Plan, chosen, chunk_of, clean, embeddings, fill

log = logging.getLogger("seqlong")

HELP = """Runs whole chromosomes through a model and keeps the mean of its last hidden states over every 128 bases.

Causal models read each contig from its first base to its last, in parts, with the state carried: exactly what one pass
over the whole contig gives, in the memory of one part. With --strands both they read the other strand too, and a row
holds both, so that it knows both sides. Masked models read overlapping windows. A command that was stopped goes on
where it was when it is given again.

.npy: rows of all contigs behind one another; FILE.bins.tsv tells whose they are. .zarr, .parquet: the same, with
contig, start and stop of each row."""
EXAMPLES = """examples:
  seqlong embed ref.fa --ckpt last --output ref.npy
  seqlong embed ref.fa --ckpt runs/my-run --contigs chr20 --strands both --every 1000 --output chr20.parquet
  seqlong embed plasmid.gbff --ckpt best --every 1 --output bases.zarr"""


def command(words: Sequence[str]) -> int:
    """``seqlong embed``; returns the exit status.

    Raises:
        SeqlongError: a mistake in the flags or the files.
    """
    parser = Parser("embed", HELP, EXAMPLES)
    parser.add_argument("sequences", nargs="+", metavar="FASTA", help="FASTA or GenBank, plain, gzip or bgzip")
    parser.add_model()
    parser.add_argument("--output", required=True, metavar="FILE", help=".npy, .zarr or .parquet")
    parser.add_argument("--every", type=integer, default=128, help="bases of a row, 1 for every base; 128 if left out")
    parser.add_argument("--strands", choices=("forward", "both"), default="forward", help="which to read")
    parser.add_argument("--contigs", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--chunk", type=integer, help="bases to read at once; 32,768, on a GPU 262,144")
    given = parser.parse_args(list(words))
    output = Path(given.output)
    check_output(output)
    model = open_model(given)
    require_bases(model, "embed")
    genome = Genome.open(given.sequences)
    reverse = (False, True) if given.strands == "both" else (False,)
    plan = Plan(genome, chosen(genome, given.contigs), given.every, chunk_of(model, given.chunk, given.every), reverse)
    embed(model, plan, output)
    return 0


def check_output(output: Path) -> None:
    """Raise a ConfigError unless the output can be written."""
    if output.suffix not in (".npy", ".zarr", ".parquet"):
        raise ConfigError(f"--output is '{output}'; expected a name that ends in .npy, .zarr or .parquet")
    package = {".zarr": "zarr", ".parquet": "pyarrow"}.get(output.suffix)
    if package:
        try:
            __import__(package)
        except ImportError as error:
            raise ConfigError(f"{output.suffix} needs {package}: pip install {package}, or write .npy") from error


def embed(model: Model, plan: Plan, output: Path) -> None:
    """Embed what ``plan`` reads, and write it; see ``HELP``."""
    width = model.width
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.partial")
    compute = partial(embeddings, every=plan.every)
    array = fill(model, plan, width, compute, unfinished, {"verb": "embed"}, "Embedding")  # type: ignore[arg-type]
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        if output.suffix == ".npy":
            runs.atomic_write(output.with_name(output.name.removesuffix(".npy") + ".bins.tsv"), _bins_table(plan))
            os.replace(unfinished, output)
        else:
            (_write_zarr if output.suffix == ".zarr" else _write_parquet)(plan, array, temporary)
            if output.is_dir():
                shutil.rmtree(output)
            os.replace(temporary, output)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    clean(unfinished)
    log.info("wrote %s: %s rows of %s", output, f"{array.shape[0]:,}", array.shape[1])


def _bins_table(plan: Plan) -> str:
    lines = ["contig\tlength\tbases_a_row\tfirst_row"]
    for number, first in plan.firsts().items():
        contig = plan.genome.contigs[number]
        lines.append(f"{contig.name}\t{contig.length}\t{plan.every}\t{first}")
    return "\n".join(lines) + "\n"


def _blocks(plan: Plan) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64], slice]]:
    """A million rows at most at a time: their contig, starts, stops, and where they are."""
    for number, first in plan.firsts().items():
        contig = plan.genome.contigs[number]
        starts = np.arange(0, contig.length, plan.every, dtype=np.int64)
        size = 1 << 16
        for at in range(0, len(starts), size):
            part = starts[at : at + size]
            stops = np.minimum(part + plan.every, contig.length)
            yield contig.name, part, stops, slice(first + at, first + at + len(part))


def _write_zarr(plan: Plan, array: NDArray[np.float32], path: Path) -> None:
    import zarr

    group = zarr.open_group(str(path), mode="w")
    rows, width = array.shape
    made: dict[str, Any] = {}
    for name, shape, kind in (
        ("embedding", (rows, width), "float32"),
        ("contig", (rows,), "int32"),
        ("start", (rows,), "int64"),
        ("stop", (rows,), "int64"),
    ):
        chunks = (min(rows, 4096), width) if len(shape) == 2 else (min(rows, 1 << 16),)
        made[name] = group.create_array(name, shape=shape, chunks=chunks, dtype=kind)
    names = [plan.genome.contigs[number].name for number in plan.contigs]
    group.attrs["contigs"] = names
    for name, starts, stops, where in _blocks(plan):
        made["embedding"][where] = array[where]
        made["contig"][where] = np.full(len(starts), names.index(name), dtype=np.int32)
        made["start"][where], made["stop"][where] = starts, stops


def _write_parquet(plan: Plan, array: NDArray[np.float32], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = array.shape[1]
    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("contig", pa.string()), ("start", pa.int64()), ("stop", pa.int64()), ("embedding", kind)])
    with pq.ParquetWriter(str(path), schema) as writer:
        for name, starts, stops, where in _blocks(plan):
            values = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array[where]).ravel()), width)
            columns = [pa.array([name] * len(starts)), pa.array(starts), pa.array(stops), values]
            writer.write_table(pa.table(columns, schema=schema))
