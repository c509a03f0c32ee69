"""One process of tests/test_sequence_parallel.py: mixers on a fragment of the rows, saved as tensors.

python sequence_parallel.py RANK RANKS STORE RESULT MIXERS PASSES
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from mixer_cases import MIXERS, WIDTH
from torch import Tensor

from seqlong.block import on_whole_rows
from seqlong.fragment import Fragment
from seqlong.layout import SequenceLayout
from seqlong.mixers import Mixer

ROWS, LENGTH = 2, 24
#: Name -> segment ids (b t), or None.
PACKINGS: dict[str, Tensor | None] = {
    "dense": None,
    "packed": torch.tensor([[1] * 4 + [2] * 11 + [3] * 9, [1] * 1 + [2] * 1 + [3] * 22], dtype=torch.int32),
    "starts at cuts": torch.tensor([[1] * 12 + [2] * 6 + [3] * 6, [1] * 6 + [2] * 18], dtype=torch.int32),
    "padded": torch.tensor([[1] * 5 + [2] * 4 + [0] * 15, [1] * 10 + [2] * 9 + [0] * 5], dtype=torch.int32),
}
Run = Callable[[Mixer, Tensor], Tensor]


def cases(names: list[str]) -> Iterator[tuple[str, Mixer, Tensor, Tensor, SequenceLayout]]:
    """Every mixer on every packing: its name, itself, its input and the weights of its output, the whole layout."""
    for name in names:
        for packing, ids in PACKINGS.items():
            for length in (LENGTH, 8) if packing == "dense" else (LENGTH,):
                torch.manual_seed(3)
                mixer = MIXERS[name](WIDTH).double()
                with torch.no_grad():
                    for parameter in mixer.parameters():
                        parameter += 0.2 * torch.randn_like(parameter)
                hidden, weigh = torch.randn(2, ROWS, length, WIDTH, dtype=torch.float64).unbind()
                if ids is not None:
                    weigh = weigh * (ids != 0)[..., None]
                layout = SequenceLayout.build(ROWS, length, ids)
                yield f"{name}, {packing}, {length}", mixer, hidden, weigh, layout


def gradients(mixer: Mixer, hidden: Tensor, weigh: Tensor, run: Run) -> dict[str, Tensor]:
    """Output, where it counts, and the gradients of input and parameters."""
    hidden = hidden.clone().requires_grad_()
    output = run(mixer, hidden)
    found = torch.autograd.grad((output * weigh).sum(), [hidden, *mixer.parameters()], allow_unused=True)
    named = dict(zip(["hidden", *(name for name, _ in mixer.named_parameters())], found, strict=True))
    kept = {name: value for name, value in named.items() if value is not None}
    return {"output": (output * (weigh != 0)).detach(), **kept}


def main(rank: int, ranks: int, store: str, result: str, names: list[str], passes: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    results = {}
    for case, mixer, hidden, weigh, whole in cases(names):
        length = hidden.shape[1] // ranks
        fragment = Fragment(dist.group.WORLD, rank, ranks, whole, passes=passes)
        layout = fragment.layout(ROWS, length)

        def run(mixer: Mixer, mine: Tensor, fragment: Fragment = fragment, layout: SequenceLayout = layout) -> Tensor:
            if not mixer.sequence_parallel:
                return on_whole_rows(mixer, mine, fragment)
            return mixer(mine, layout)[0]

        mine, weights = (x.chunk(ranks, dim=1)[rank] for x in (hidden, weigh))
        found = gradients(mixer, mine, weights, run)
        for name, value in found.items():
            if name in ("output", "hidden"):
                every = [torch.empty_like(value) for _ in range(ranks)]
                dist.all_gather(every, value.contiguous())
                found[name] = torch.cat(every, dim=1)
            else:
                dist.all_reduce(value)
        results[case] = found
    if rank == 0:
        torch.save(results, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5].split(","), sys.argv[6] == "True")
