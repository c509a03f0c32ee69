"""A mixture of experts, forward and backward, against a loop over experts and transformers' Mixtral block: tokens/s.

One layer of SwiGLU experts on one long row, softmax scores, no shared expert, nothing dropped, and the same weights for
all. On a GPU in bfloat16, elsewhere small and in float32. Before it is timed, a contender's output is compared with the
loop's, and one that is off by more than 3 % at the median position has WRONG in its name.

    seqlong bench moe                                            8, 64 and 128 experts, about a minute on an H100
    seqlong bench moe --implementations triton,grouped_mm        and further forms of ours as peers
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# kernels.py beside this script is not PyPI's package of that name, which transformers looks for.
FOLDER = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from seqlong.bench import Row, main  # noqa: E402
from seqlong.ffn import MoE  # noqa: E402
from seqlong.layout import SequenceLayout  # noqa: E402

Layer = Callable[[Tensor], Tensor]
WRONG = 0.03
LOOP = "torch loop over experts"


@dataclass(frozen=True)
class Shape:
    """Experts in all, those of a token, the inner width of each; tokens, and the width of the model."""

    experts: int
    active: int
    hidden: int
    tokens: int
    width: int

    def __str__(self) -> str:
        return f"{self.experts} experts of width {self.hidden:,}, {self.active} a token, {self.tokens:,} tokens"

    @property
    def flops(self) -> int:
        """Of the products of experts, forward and backward."""
        return 3 * 2 * 3 * self.tokens * self.active * self.width * self.hidden


def shapes(experts: list[int], tokens: int, width: int) -> list[Shape]:
    """Mixtral's form up to 8 experts (2 a token, 2.75 times the width), fine-grained above (8 a token, a quarter)."""
    return [
        Shape(e, min(e, 2), 11 * width // 4, tokens, width) if e <= 8 else Shape(e, 8, 11 * width // 16, tokens, width)
        for e in experts
    ]


class Loop(nn.Module):
    """What one would write first: for each expert, its tokens through a SwiGLU, added where they came from."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.router, self.experts = moe.router, moe.experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        routing = self.router(flat)
        output = torch.zeros_like(flat)
        # unbind: the gradient of weight[expert] would be as large as all experts together.
        matrices = (self.experts.gate_up_proj.weight.unbind(), self.experts.down_proj.weight.unbind())
        for expert, (up_proj, down_proj) in enumerate(zip(*matrices, strict=True)):
            token, place = torch.where(routing.experts == expert)
            gate, up = (flat[token] @ up_proj).chunk(2, dim=-1)
            made = (F.silu(gate) * up) @ down_proj
            output = output.index_add(0, token, made * routing.weights[token, place, None].to(made.dtype))
        return output.view_as(x)


class Ours(nn.Module):
    """The layer, as the backbone calls it."""

    def __init__(self, moe: MoE, tokens: int, device: torch.device) -> None:
        super().__init__()
        self.moe, self.layout = moe, SequenceLayout.build(1, tokens, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x, self.layout)[0]


def build(shape: Shape, device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> MoE:
    """The same weights every time."""
    torch.manual_seed(0)
    moe = MoE(shape.width, experts=shape.experts, active=shape.active, d_hidden=shape.hidden, shared=0,
              score="softmax", implementation=implementation)  # fmt: skip
    return moe.to(device).to(dtype)


def transformers_block(shape: Shape, moe: MoE, how: str) -> nn.Module:
    """``MixtralSparseMoeBlock`` with our weights; ``how`` is its implementation of experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.width, intermediate_size=shape.hidden, num_local_experts=shape.experts,
        num_experts_per_tok=shape.active,
    )  # fmt: skip
    config._experts_implementation = how
    block = MixtralSparseMoeBlock(config).to(moe.router.weight)
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(moe.experts.gate_up_proj.weight.transpose(1, 2))
        block.experts.down_proj.copy_(moe.experts.down_proj.weight.transpose(1, 2))
    return block


def contenders(
    shape: Shape, device: torch.device, dtype: torch.dtype, further: list[str]
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names, the distribution's first, and what builds each; ours comes first."""
    yield "seqlong", lambda: Ours(build(shape, device, dtype), shape.tokens, device)
    yield LOOP, lambda: Loop(build(shape, device, dtype))
    for how in ("grouped_mm", "eager"):
        yield (f"transformers MixtralSparseMoeBlock, {how}",
               lambda how=how: transformers_block(shape, build(shape, device, dtype), how))  # fmt: skip
    for implementation in further:
        yield (f"seqlong {implementation}",
               lambda i=implementation: Ours(build(shape, device, dtype, i), shape.tokens, device))  # fmt: skip


def measure(layer: nn.Module, x: Tensor, grad: Tensor, repeats: int) -> tuple[float, float | None]:
    """Seconds of a forward and a backward pass, and the GiB on the GPU that they add to what was there.

    The median, or on a CPU, which others use too, the least.
    """
    learnt = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    cuda = x.is_cuda

    def run() -> float:
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.autograd.grad(layer(x), learnt, grad)
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1000
        start = time.perf_counter()
        torch.autograd.grad(layer(x), learnt, grad)
        return time.perf_counter() - start

    for _ in range(3 if cuda else 1):
        run()
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = [run() for _ in range(repeats)]
    seconds = statistics.median(times) if cuda else min(times)
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error at the median token: where two experts score alike, rounding may choose another."""
    error, size = ((x.float().flatten(0, 1)).norm(dim=-1) for x in (found - expected, expected))
    return float((error / size.clamp(min=1e-20)).median())


def rows(sizes: list[Shape], device: torch.device, repeats: int, further: list[str]) -> Iterator[Row]:
    """Speed beside every peer, then memory; a peer that cannot run says why in its name."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    memory: list[Row] = []
    for shape in sizes:
        random = torch.Generator(device).manual_seed(1)
        x, grad = (
            torch.randn(1, shape.tokens, shape.width, generator=random, device=device).to(dtype) for _ in range(2)
        )
        with torch.no_grad():
            expected = Loop(build(shape, device, dtype))(x)
        x.requires_grad_()
        ours: tuple[float, float | None] = (0.0, None)
        for name, make in contenders(shape, device, dtype, further):
            try:
                layer = make().train()
                with torch.no_grad():
                    error = off(layer(x), expected)
                wrong = not error <= WRONG  # so that one that is not a number is wrong too
                if wrong and name == "seqlong":
                    raise RuntimeError(
                        f"{shape}: seqlong's output is off by {error:.0%} from the loop's; nothing is timed"
                    )
                seconds, gib = measure(layer, x, grad, repeats)
            except (ImportError, RuntimeError, ValueError, AttributeError) as problem:
                if name == "seqlong":
                    raise
                why = str(problem).strip().splitlines() or [""]
                said = f"{name} ({type(problem).__name__}: {why[0][:60]})"
                yield Row(str(shape), "forward and backward", shape.tokens / ours[0], "tokens/s", said)
                continue
            finally:
                layer = None  # type: ignore[assignment]
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            if wrong:
                name += f" (WRONG by {error:.0%})"
            if name.startswith("seqlong") and not ours[0]:
                ours = (seconds, gib)
                if device.type == "cuda":
                    yield Row(str(shape), "products of experts", shape.flops / seconds / 1e12, "TFLOP/s")
                continue
            yield Row(str(shape), "forward and backward", shape.tokens / ours[0], "tokens/s", name,
                      shape.tokens / seconds)  # fmt: skip
            if gib is not None and ours[1] is not None:
                memory.append(Row(str(shape), "memory added", ours[1], "GiB", name, gib))
    yield from memory


def _main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="8,64,128", help="numbers of experts")
    parser.add_argument("--tokens", type=int, default=32768 if cuda else 2048)
    parser.add_argument("--width", type=int, default=1024 if cuda else 128)
    parser.add_argument("--repeats", type=int, default=10 if cuda else 7)
    parser.add_argument("--implementations", help="further forms of ours: chunked, grouped_mm, triton")
    given = parser.parse_args()
    sizes = shapes([int(number) for number in given.experts.split(",")], given.tokens, given.width)
    further = given.implementations.split(",") if given.implementations else []
    main("moe", rows(sizes, device, given.repeats, further))


if __name__ == "__main__":
    _main()
