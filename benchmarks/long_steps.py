"""One GPU: whole training steps on one long row, against fla's and transformers' models of the same architecture.

A step is forward, loss, backward and AdamW on random tokens, with float32 weights under bfloat16 autocast, for all.
All compute each block again in the backward pass. ``mamba2_370m`` is 48 Mamba2 blocks of width 1,024 with a vocabulary
of 50,280, as published; ``mamba2_370m_dna`` the same with 16 symbols (317 M parameters). fla's model has its own fused
loss; transformers' would hold all logits, so it gets our loss. Each contender runs in a process of its own. With
``tiled``, for the longest rows, our residual stream is in bfloat16, as fla's always is.

    seqlong bench long_steps                     131,072 positions
    seqlong bench long_steps --longest           and double the length until our models no longer fit
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import torch  # noqa: E402
from _contenders import import_mamba_ssm, lend_convolution, missing, tune_briefly  # noqa: E402
from _models import preset  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# kernels.py beside this script is not PyPI's package of that name, which transformers looks for.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER]

from seqlong.backbone import Backbone, BackboneConfig  # noqa: E402
from seqlong.batch import SequenceBatch  # noqa: E402
from seqlong.bench import Row, main  # noqa: E402
from seqlong.heads import LanguageHead  # noqa: E402

LENGTH = 131_072
#: vocabulary of each model; layers and width are in ``_shape``.
MODELS = {"mamba2_370m": 50_280, "mamba2_370m_dna": 16, "hybridna_300m": 16}
PEERS = {
    "mamba2_370m": {"fla": "flash-linear-attention Mamba2ForCausalLM",
                    "transformers": "transformers Mamba2 with mamba-ssm kernels and our loss"},
    "mamba2_370m_dna": {"fla": "flash-linear-attention Mamba2ForCausalLM",
                        "transformers": "transformers Mamba2 with mamba-ssm kernels and our loss"},
    "hybridna_300m": {"transformers": "transformers Bamba with mamba-ssm kernels and our loss"},
}  # fmt: skip
PREFIX = "@@"
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # long rows: let the allocator join free pieces
Loss = Callable[[Tensor, Tensor], Tensor]


def _shape(model: str) -> tuple[int, int]:
    """Layers and width; on a CPU a toy, to try the script."""
    layers = 24 if model.startswith("hybridna") else 48
    return (layers, 1024) if torch.cuda.is_available() else (4, 64)


# -- Models: each gives (module, loss of tokens and targets) -----------------------------------------------------------


def ours(model: str, checkpointing: str) -> tuple[nn.Module, Loss]:
    layers, width = _shape(model)
    if model.startswith("hybridna"):
        config = preset(
            model, layers=layers, d_model=width, checkpointing=checkpointing, residual_in_fp32=checkpointing != "tiled"
        )
    else:
        from seqlong.mixers import Mamba2

        config = BackboneConfig(
            vocab_size=MODELS[model], d_model=width, pattern="m", mixers={"m": partial(Mamba2, d_state=128)},
            layers=layers, ffn=None, checkpointing=checkpointing,  # type: ignore[arg-type]
            residual_in_fp32=checkpointing != "tiled",
        )  # fmt: skip
    backbone = Backbone(config)
    head = LanguageHead(width, MODELS[model], backbone.embedding)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return head.loss(backbone(SequenceBatch(tokens=tokens)).hidden, targets).mean()

    return nn.ModuleList([backbone, head]), loss


def fla(model: str, _checkpointing: str) -> tuple[nn.Module, Loss]:
    import_mamba_ssm()
    from fla.models import Mamba2Config, Mamba2ForCausalLM

    layers, width = _shape(model)
    net = Mamba2ForCausalLM(Mamba2Config(
        head_dim=64, vocab_size=MODELS[model], hidden_size=width, state_size=128, num_hidden_layers=layers, n_groups=1,
        fuse_cross_entropy=False, fuse_linear_cross_entropy=True, tie_word_embeddings=True, use_cache=False,
    ))  # fmt: skip
    net.gradient_checkpointing_enable()
    return net, lambda tokens, targets: net(input_ids=tokens, labels=tokens, use_cache=False).loss


def transformers(model: str, _checkpointing: str) -> tuple[nn.Module, Loss]:
    import_mamba_ssm()
    import_module("mamba_ssm.ops.triton.selective_state_update")  # before transformers, which looks for them
    kernels = import_module("mamba_ssm.ops.triton.ssd_combined")

    from seqlong.kernels.cross_entropy import linear_cross_entropy

    layers, width = _shape(model)
    if model.startswith("hybridna"):
        import transformers.models.bamba.modeling_bamba as module
        from transformers import BambaConfig

        net: Any = module.BambaModel(BambaConfig(
            vocab_size=MODELS[model], hidden_size=width, intermediate_size=2048, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=4, attn_layer_indices=list(range(3, layers, 8)),
            mamba_n_heads=2 * width // 64, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128, mamba_expand=2,
            mamba_chunk_size=256, use_cache=False, max_position_embeddings=1 << 22, attn_implementation="sdpa",
        ))  # fmt: skip
        embedding = net.embed_tokens
    else:
        import transformers.models.mamba2.modeling_mamba2 as module
        from transformers import Mamba2Config

        net = module.Mamba2Model(Mamba2Config(
            num_heads=2 * width // 64, head_dim=64, vocab_size=MODELS[model], hidden_size=width, state_size=128,
            num_hidden_layers=layers, n_groups=1, expand=2, chunk_size=256, use_cache=False,
        ))  # fmt: skip
        embedding = net.embeddings
    fused = [name for name in vars(module) if name.endswith("split_conv1d_scan_combined")]
    for name in fused:  # whatever it found by itself
        setattr(module, name, _accepts(kernels.mamba_split_conv1d_scan_combined))
    if hasattr(module, "is_fast_path_available"):
        module.is_fast_path_available = True
    if not fused:
        raise ImportError("this transformers has no place for mamba-ssm's fused mixer")
    net.gradient_checkpointing_enable()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = net(input_ids=tokens, use_cache=False)[0]
        return linear_cross_entropy(hidden.bfloat16(), embedding.weight, targets).mean()

    return net, loss


def _accepts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leave out arguments that are None or unknown to mamba-ssm."""
    import inspect

    known = inspect.signature(function).parameters
    return lambda *values, **named: function(*values, **{key: value for key, value in named.items() if key in known})


BUILDERS = {"seqlong": ours, "fla": fla, "transformers": transformers}


# -- Measuring ---------------------------------------------------------------------------------------------------------


def step_speed(model: str, contender: str, length: int, steps: int, checkpointing: str) -> dict[str, Any]:
    """Best of ``steps`` training steps after two to warm up; of one, after one; of none, the first itself."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        net, loss_of = BUILDERS[contender](model, checkpointing)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device.type == "cuda")
    tokens = torch.randint(0, MODELS[model], (1, length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds, losses = [], []
    warm = min(2, steps)
    for _ in range(max(1, warm + steps)):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"tokens_per_s": length / min(seconds[warm:]), "first_s": seconds[0], "peak_gib": peak, "loss": losses[0],
            "parameters": sum(weight.numel() for weight in net.parameters())}  # fmt: skip


def work(
    model: str, contender: str, length: int, steps: int, checkpointing: str, share: int = 0, shares: int = 1
) -> None:
    """In a child: print what was found. Of what a peer autotunes over, a share."""
    tune_briefly(share, shares)
    try:
        found = step_speed(model, contender, length, steps, checkpointing)
        if not math.isfinite(found["loss"]):
            found = {"failed": f"loss is {found['loss']}"}
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    except Exception as error:  # a peer may fail in any way; the row tells which
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(PREFIX + json.dumps(found), flush=True)


def measured(model: str, contender: str, length: int, steps: int, checkpointing: str, patience: float, log: Path | None
             ) -> dict[str, Any]:  # fmt: skip
    """Run ``work`` in a child."""
    if contender != "seqlong" and torch.cuda.is_available():
        compile_ahead(model, contender, patience)
    job = json.dumps([model, contender, length, steps, checkpointing])
    try:
        command = [sys.executable, __file__, "--work", job]
        environment = {**os.environ, ALLOCATOR: "expandable_segments:True"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience, env=environment)
        said = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
        tail = " ".join(done.stderr.split())[-300:]
        found = json.loads(said[-1][len(PREFIX) :]) if said else {"failed": f"status {done.returncode}: {tail}"}
    except subprocess.TimeoutExpired:
        found = {"failed": f"gave no result within {patience:.0f} s"}
    found.update(model=model, contender=contender, length=length, checkpointing=checkpointing)
    print(f"{model}, {length:,}, {contender}: {json.dumps(found)}", flush=True)
    if log is not None:
        with log.open("a") as file:
            file.write(json.dumps(found) + "\n")
    return found


def compile_ahead(model: str, contender: str, patience: float) -> None:
    """Let a peer compile what it autotunes over in several processes, each a share, on a short row."""
    shares = max(1, min(6, (os.cpu_count() or 1) // 2))
    jobs = [json.dumps([model, contender, 4096, 1, "block", share, shares]) for share in range(shares)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    children = [subprocess.Popen([sys.executable, __file__, "--work", job], **quiet) for job in jobs]
    until = time.monotonic() + patience
    for child in children:
        try:
            child.wait(max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def rows(given: argparse.Namespace) -> Iterator[Row]:
    """Speed and memory of a step for each model and peer, then the longest rows."""
    once = partial(measured, steps=given.steps, patience=given.patience, log=given.log)
    for model in given.models.split(","):
        for length in (int(number) for number in given.lengths.split(",")):
            mine = once(model, "seqlong", length, checkpointing=given.checkpointing)
            if "tokens_per_s" not in mine:
                continue
            name = f"{model}, one row of {length:,}"
            peers = {key: said for key, said in PEERS[model].items() if key in given.peers.split(",")}
            if not peers:
                yield Row(name, "training", mine["tokens_per_s"], "tokens/s")
            for peer, said in peers.items():
                absent = missing("mamba-ssm") or (missing("fla") if peer == "fla" else None)
                theirs = {"failed": absent} if absent else once(model, peer, length, checkpointing="block")
                said += ", our convolution in it" * lend_convolution()
                label = f"{said} ({theirs['failed'][:80]})" if "failed" in theirs else said
                yield Row(name, "training", mine["tokens_per_s"], "tokens/s", label, theirs.get("tokens_per_s"))
                if mine["peak_gib"]:
                    yield Row(name, "peak memory", mine["peak_gib"], "GiB", label, theirs.get("peak_gib"))
        if given.longest:
            yield from longest(model, given)


def longest(model: str, given: argparse.Namespace) -> Iterator[Row]:
    """Double the length until a step no longer fits."""
    length, best = max(int(number) for number in given.lengths.split(",")), 0
    found: dict[str, Any] = {}
    while length <= given.most:
        now = measured(model, "seqlong", length, 1, given.longest, given.patience, given.log)
        if "tokens_per_s" not in now:
            break
        best, found, length = length, now, 2 * length
    if best:
        yield Row(f"{model}, longest row in a step", "positions", best, "positions")
        yield Row(f"{model}, one row of {best:,}, {given.longest}", "training", found["tokens_per_s"], "tokens/s")
        if found["peak_gib"]:
            yield Row(f"{model}, one row of {best:,}, {given.longest}", "peak memory", found["peak_gib"], "GiB")


def command() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--lengths", default=str(LENGTH) if cuda else "256")
    parser.add_argument("--peers", default="fla,transformers", help="by commas; '' for none")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the best counts; 0: the first")
    parser.add_argument("--checkpointing", default="block", help="none, selective, block or tiled; for our models")
    parser.add_argument("--longest", nargs="?", const="tiled", help="also double the length, with this checkpointing")
    parser.add_argument("--most", type=int, default=1 << 21 if cuda else 1024, help="positions to stop doubling at")
    parser.add_argument("--patience", type=float, default=200.0, help="seconds that one contender may take")
    parser.add_argument("--log", type=Path, help="append every measurement to this file, as it comes")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(*json.loads(given.work))
        return
    main("long_steps", rows(given))


if __name__ == "__main__":
    command()
