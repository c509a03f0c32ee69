"""Several GPUs: training steps with rows and weights in parts, against one GPU and against gathering whole rows.

A step is forward, loss, backward and AdamW on random tokens, float32 weights under bfloat16 autocast. ``sp`` processes
share a row, and there are GPUs / sp rows. ``states`` is how our recurrent layers do it: all gather one state of each.
``passed`` hands states from one process to the next (All-Scan). Two baselines: ``heads`` exchanges positions for heads
at every recurrent layer, as Ulysses does for attention; ``rows`` gathers whole rows there. Bytes are those that a
process receives in a step, counted in its collectives. The same script runs on any number of GPUs, and on CPU processes
(toy widths, to try it).

    seqlong bench parallel                                              131,072 positions on all GPUs
    seqlong bench parallel --gpus 1,2 --lengths 131072,1048576 --checkpointing tiled
    seqlong bench parallel --gpus 1 --checkpointing none,selective,block,tiled,block+offload,tiled+offload
    seqlong bench parallel --gpus 2 --weights replicated,sharded        DDP against FSDP2
    seqlong bench parallel --models linear_moe_2b --weights sharded,experts
    seqlong bench parallel --gpus 2 --longest                           and double the length until it no longer fits
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from _heads import exchange_heads  # noqa: E402
from _kept import keep, kept  # noqa: E402
from _models import preset  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from seqlong.backbone import Backbone, BackboneConfig  # noqa: E402
from seqlong.batch import SequenceBatch  # noqa: E402
from seqlong.bench import Row, main  # noqa: E402
from seqlong.errors import SeqlongError  # noqa: E402
from seqlong.fragment import split  # noqa: E402
from seqlong.heads import LanguageHead  # noqa: E402
from seqlong.parallel.fully_shard import shard  # noqa: E402

CUDA = torch.cuda.is_available()
PREFIX = "@@"
MODELS = ("hybridna_300m", "gdn_hybrid", "linear_moe_2b")
RECURRENT = ("states", "passed", "heads", "rows")
WEIGHTS = {"replicated": "DDP", "sharded": "FSDP2", "experts": "FSDP2, experts apart"}


@dataclass(frozen=True)
class Case:
    """One measurement: what runs, on how many processes, and how it is cut."""

    model: str
    length: int
    gpus: int
    degree: int
    weights: str
    recurrent: str
    checkpointing: str
    steps: int

    @property
    def name(self) -> str:
        """For a table."""
        rows = self.gpus // self.degree
        how = "" if self.gpus == 1 else f", {WEIGHTS[self.weights]}"
        kind = "" if self.degree == 1 else f", {self.recurrent}"
        return (
            f"{self.model}, {rows} x {self.length:,}, {self.gpus} GPUs, sp={self.degree}{how}{kind}, "
            f"{self.checkpointing}"
        )


def config(case: Case) -> BackboneConfig:
    """The preset; ``gdn_hybrid`` is HybriDNA-300M with Gated DeltaNet for Mamba2. On a CPU a toy of it."""
    checkpointing, _, more = case.checkpointing.partition("+")
    changes: dict[str, Any] = {"checkpointing": checkpointing, "offload": bool(more)}
    if not CUDA:
        changes |= {"d_model": 128, "layers": 4, "vocab_size": 16}
    name = case.model
    if name == "gdn_hybrid":
        name = "hybridna_300m"
        heads = 8 if CUDA else 2
        changes["mixers"] = {
            "m": {"class_path": "seqlong.mixers.GatedDeltaNet", "init_args": {"heads": heads, "head_dim": 64}},
            "a": {"class_path": "seqlong.mixers.Attention", "init_args": {"heads": 2 * heads, "positions": "none"}},
        }
    changes["residual_in_fp32"] = checkpointing != "tiled"
    return preset(name, **changes)


class Model(nn.Module):
    """Backbone and head; the loss of this process's part, scaled so that the mean over processes is that of all."""

    def __init__(self, made: BackboneConfig) -> None:
        super().__init__()
        self.backbone = Backbone(made)
        self.head = LanguageHead(made.d_model, made.vocab_size, self.backbone.embedding)

    def forward(self, batch: SequenceBatch, processes: int, total: int) -> Tensor:
        output = self.backbone(batch)
        assert batch.targets is not None
        loss = self.head.loss(output.hidden, batch.targets).sum()
        balance = output.aux.get("router_loss_sum", 0.0)
        return (loss + balance) * processes / total


class Received(TorchDispatchMode):
    """Counts the bytes that collectives bring to this process from others."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d.") and "send" not in name:
            self.total += _received(name, args)
        return function(*args, **(kwargs or {}))


def _received(name: str, args: tuple[Any, ...]) -> int:
    size = dist.get_world_size()
    for value in args:
        if hasattr(value, "size") and callable(value.size) and not isinstance(value, Tensor):
            size = value.size()  # the group's
    others = 1.0 if "recv" in name else (size - 1) / size
    tensors = [value for value in args[:2] if isinstance(value, Tensor)]
    if not tensors and isinstance(args[0], list):
        tensors = [value for value in args[0] if isinstance(value, Tensor)][:1]
    if not tensors:
        return 0
    largest = max(value.numel() * value.element_size() for value in tensors)
    times = 2 if "allreduce" in name else 1  # reduce-scatter, then all-gather
    return int(times * others * largest)


def run(case: Case, rank: int, device: torch.device) -> dict[str, Any]:
    """The best step of a few, on all processes together; None for what does not fit is the parent's business."""
    torch.manual_seed(0)
    rows = case.gpus // case.degree
    grid = init_device_mesh(device.type, (rows, case.degree), mesh_dim_names=("data", "sequence"))
    model: Any = Model(config(case))
    if case.recurrent == "heads":
        exchange_heads(model.backbone)
    if case.recurrent == "rows":
        for block in model.backbone.blocks:
            if block.mixer.bounded_state:
                block.mixer.sequence_parallel = False
    if case.weights == "replicated" or case.gpus == 1:
        model.to(device)
        net = DistributedDataParallel(model) if case.gpus > 1 else model
    else:
        mesh = init_device_mesh(device.type, (case.gpus,), mesh_dim_names=("shard",))
        shard(model, mesh, device, expert_parallel=case.weights == "experts")
        net = model
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device.type == "cuda")
    source = torch.Generator().manual_seed(grid.get_local_rank("data"))
    tokens = torch.randint(0, 16, (1, case.length + 1), generator=source).to(device)
    whole = SequenceBatch(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())
    group, place = grid.get_group("sequence"), grid.get_local_rank("sequence")
    batch = split(whole, group, place, case.degree, passes=case.recurrent == "passed")
    total = rows * case.length

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = net(batch, case.gpus, total)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    counted = Received()
    with counted:
        first = step()
    dist.all_reduce(first)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(case.steps):
        dist.barrier()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    found = torch.tensor([min(seconds), peak, counted.total / 2**20], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    best, peak, received = found.tolist()
    return {
        "seconds": best, "tokens_per_s": rows * case.length / best, "peak_gib": peak, "received_mib": received,
        "loss": float(first) / case.gpus, "parameters": sum(weight.numel() for weight in net.parameters()),
    }  # fmt: skip


def work(rank: int, size: int, store: str, jobs: list[dict[str, Any]], patience: float) -> None:
    """One process of a group: run the cases in turn. An error ends the group, since the others would wait."""
    device = torch.device("cuda", rank) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if CUDA else "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=patience), device_id=device if CUDA else None,
    )  # fmt: skip
    for job in jobs:
        try:
            found = run(Case(**job), rank, device)
        except torch.OutOfMemoryError:
            print(PREFIX + json.dumps({"failed": "out of memory"}), flush=True)
            os._exit(3)  # the others wait for this one: no clean end
        except SeqlongError as error:
            print(PREFIX + json.dumps({"failed": str(error)}), flush=True)
            os._exit(3)
        if rank == 0:
            print(PREFIX + json.dumps(found), flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def measured(cases: list[Case], patience: float, log: Path | None) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Run cases of one number of GPUs in one group of processes; where one fails, the rest in another group. Those that
    ``log`` has are taken from there."""
    left = []
    for case in cases:
        if found := kept(log, asdict(case)):
            yield case, found
        else:
            left.append(case)
    cases = left
    while cases:
        done = 0
        for found in _group(cases, patience):
            case = cases[done]
            done += 1
            print(f"{case.name}: {json.dumps(found)}", flush=True)
            keep(log, asdict(case), found)
            yield case, found
            if "failed" in found:
                break
        cases = cases[done:]


def _group(cases: list[Case], patience: float) -> Iterator[dict[str, Any]]:
    size = cases[0].gpus
    with tempfile.TemporaryDirectory() as folder:
        jobs = json.dumps([asdict(case) for case in cases])
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        if not CUDA:
            environment["OMP_NUM_THREADS"] = "1"
        children, errors = [], []
        for rank in range(size):
            errors.append((Path(folder) / f"errors-{rank}").open("w+"))
            words = [str(rank), str(size), str(Path(folder) / "store"), jobs, str(patience)]
            command = [sys.executable, __file__, "--work", *words]
            children.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors[-1], text=True, env=environment)
            )
        said: queue.Queue[str | None] = queue.Queue()
        readers = [threading.Thread(target=_read, args=(child.stdout, said), daemon=True) for child in children]
        for reader in readers:
            reader.start()
        try:
            ended, expected = 0, len(cases)
            while expected and ended < size:
                try:
                    line = said.get(timeout=patience)
                except queue.Empty:
                    yield {"failed": f"no result within {patience:.0f} s"}
                    return
                if line is None:
                    ended += 1
                    failing = [child.poll() for child in children if child.poll()]
                    if failing and expected and said.empty():
                        yield {"failed": f"a process ended with status {failing[0]}: {_tail(errors)}"}
                        return
                elif line.startswith(PREFIX):
                    expected -= 1
                    found = json.loads(line[len(PREFIX) :])
                    yield found
                    if "failed" in found:
                        return
            if expected:
                yield {"failed": f"the processes ended early: {_tail(errors)}"}
        finally:
            for child in children:
                child.kill()
                child.wait()
            for file in errors:
                file.close()


def _read(stream: Any, said: queue.Queue[str | None]) -> None:
    for line in stream:
        said.put(line)
    said.put(None)


def _tail(errors: list[Any]) -> str:
    texts = []
    for file in errors:
        file.flush()
        file.seek(0)
        texts.append(" ".join(file.read().split())[-300:])
    return max(texts, key=len)


def rows(given: argparse.Namespace) -> Iterator[Row]:
    """Speed, memory and bytes for each way of cutting; the peer is the same model and length on one GPU."""
    alone: dict[tuple[str, int], dict[str, Any]] = {}
    for gpus in sorted(given.gpus):
        cases = list(_cases(given, gpus))
        for case, found in measured(cases, given.patience, given.log):
            if "failed" in found:
                continue
            key = case.model, case.length
            if gpus == 1:
                alone[key] = found
            one = alone.get(key, {}) if gpus > 1 else {}
            peer = None if gpus == 1 else "seqlong on one GPU" + ("" if one else " (does not fit, or was not asked)")
            yield Row(case.name, "training", found["tokens_per_s"], "tokens/s", peer, one.get("tokens_per_s"))
            if found["peak_gib"]:
                yield Row(case.name, "peak memory of a GPU", found["peak_gib"], "GiB", peer, one.get("peak_gib"))
            if gpus > 1:
                yield Row(case.name, "received by a GPU in a step", found["received_mib"], "MiB")
        if given.longest:
            yield from longest(given, gpus)


def longest(given: argparse.Namespace, gpus: int) -> Iterator[Row]:
    """Double the length, all GPUs on one row, until a step no longer fits."""
    for model in given.models:
        case, best = Case(model, max(given.lengths), gpus, gpus, "sharded", "states", given.longest, 1), None
        while case.length <= given.most:
            ((_, found),) = measured([case], given.patience, given.log)
            if "failed" in found:
                break
            best, case = (case, found), replace(case, length=2 * case.length)
        if best is not None:
            yield Row(f"{model}, longest row in a step, {gpus} GPUs", "positions", best[0].length, "positions")
            yield Row(best[0].name, "training", best[1]["tokens_per_s"], "tokens/s")
            if best[1]["peak_gib"]:
                yield Row(best[0].name, "peak memory of a GPU", best[1]["peak_gib"], "GiB")


def _cases(given: argparse.Namespace, gpus: int) -> Iterator[Case]:
    for model in given.models:
        for length in given.lengths:
            for degree in given.degrees or [n for n in range(1, gpus + 1) if gpus % n == 0]:
                if gpus % degree:
                    continue
                for weights in given.weights if gpus > 1 else ["replicated"]:
                    if weights == "experts" and "moe" not in model:
                        continue
                    for recurrent in given.recurrent if degree > 1 else ["states"]:
                        for way in given.checkpointing:
                            yield Case(model, length, gpus, degree, weights, recurrent, way, given.steps)


def command() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    there = torch.cuda.device_count() if CUDA else 2

    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    every = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= there]
    parser.add_argument("--gpus", type=numbers, default=every, help="numbers of GPUs, by commas")
    parser.add_argument("--models", type=words, default=["hybridna_300m"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--lengths", type=numbers, default=[131_072 if CUDA else 256], help="positions in a row")
    parser.add_argument(
        "--degrees", type=numbers, help="processes that share a row; all divisors of the GPUs if left out"
    )
    parser.add_argument("--weights", type=words, default=["sharded"], help=f"of {', '.join(WEIGHTS)}")
    parser.add_argument("--recurrent", type=words, default=["states"], help=f"of {', '.join(RECURRENT)}")
    ways = [way + more for way in ("none", "selective", "block", "tiled") for more in ("", "+offload")]
    parser.add_argument("--checkpointing", type=words, default=["block"], help=f"of {', '.join(ways)}")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the best counts")
    parser.add_argument(
        "--longest",
        nargs="?",
        const="tiled+offload",
        choices=ways,
        help="also double the length, with this checkpointing, until it does not fit",
    )
    parser.add_argument("--most", type=int, default=1 << 24 if CUDA else 1024, help="positions to stop doubling at")
    parser.add_argument("--patience", type=float, default=240.0, help="seconds that one case may take")
    parser.add_argument("--log", type=Path, help="append every measurement to this file, and take from it what it has")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        rank, size, store, jobs, patience = given.work
        work(int(rank), int(size), store, json.loads(jobs), float(patience))
        return
    for name, known in (
        ("models", MODELS),
        ("weights", tuple(WEIGHTS)),
        ("recurrent", RECURRENT),
        ("checkpointing", ways),
    ):
        if unknown := set(getattr(given, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if CUDA and max(given.gpus) > there:
        parser.error(f"--gpus {max(given.gpus)}: this machine has {there}")
    main("parallel", rows(given))


if __name__ == "__main__":
    command()
