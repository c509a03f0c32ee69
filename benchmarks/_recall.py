"""Models of the recall benchmark: their mixers, rows made on the device, and a light training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqlong import mixers
from seqlong.backbone import Backbone, BackboneConfig
from seqlong.batch import SequenceBatch
from seqlong.mixers import MixerFactory
from seqlong.optim import Optimizer, Schedule
from seqlong.tasks import CausalLM

ATTENTION: MixerFactory = partial(mixers.Attention, heads=2)
MAMBA2: MixerFactory = partial(mixers.Mamba2, d_state=16, head_dim=32)
LINEAR: MixerFactory = partial(mixers.LinearAttention, heads=2)
#: With the short convolution that DeltaNet and Mamba2 have: it can look one token back, and has no larger memory.
CONVOLVED: MixerFactory = partial(mixers.LinearAttention, heads=2, conv_width=4)
#: Settings give a width of 64 two heads of 32, and a state of 2,048 numbers a block where the mixer lets us choose.
SINGLE: dict[str, MixerFactory] = {
    "Attention": ATTENTION,
    "Attention, window 32": partial(mixers.Attention, heads=2, window=32),
    "LinearAttention": LINEAR,
    "LinearAttention, convolution": CONVOLVED,
    "Hedgehog": partial(mixers.Hedgehog, heads=2),
    "Based": partial(mixers.Based, heads=2, feature_dim=8),
    "LightningAttention": partial(mixers.LightningAttention, heads=2),
    "RetNet": partial(mixers.RetNet, heads=2, expand_v=1.0),
    "SimpleGLA": partial(mixers.SimpleGLA, heads=2),
    "GLA": partial(mixers.GLA, heads=2, expand_k=1.0),
    "HGRN2": partial(mixers.HGRN2, heads=2),
    "RG-LRU": partial(mixers.RGLRU, heads=2),
    "mLSTM": partial(mixers.MLSTM, heads=2, expand_k=1.0, input_bias=0.0),
    "Mamba2": MAMBA2,
    "DeltaNet": partial(mixers.DeltaNet, heads=2),
    "GatedDeltaNet": partial(mixers.GatedDeltaNet, heads=2, head_dim=32, expand_v=1.0),
    "KDA": partial(mixers.KDA, heads=2),
    "RWKV6": partial(mixers.RWKV6, heads=2),
    "RWKV7": partial(mixers.RWKV7, heads=2),
    "LogLinearMamba2": partial(mixers.LogLinearMamba2, d_state=16, head_dim=32, levels=9),
    "LogLinearGatedDeltaNet": partial(
        mixers.LogLinearGatedDeltaNet, heads=2, head_dim=32, expand_v=1.0, levels=9
    ),
}  # fmt: skip
#: Hybrids, and the linear mixer alone at their depth. A ratio of 3:1 takes four blocks, 7:1 eight.
HYBRIDS: dict[str, MixerFactory] = {
    "Mamba2": MAMBA2,
    "LinearAttention": LINEAR,
    "LinearAttention, convolution": CONVOLVED,
}
DEPTHS = {"1:1": "ma", "3:1": "mmma", "3:1 twice": "mmmammma", "7:1": "mmmmmmma", "alone": "mmmm"}


@dataclass(frozen=True)
class Setting:
    """What is asked, of models of which size.

    Attributes:
        pairs: of a key and a value, one number a group of rows; a batch has as many rows of each.
        length: positions in a row.
        vocab_size: keys are its lower half, values its upper.
        width: of the models.
        batch_size: rows in a batch, divided evenly among ``pairs``.
        steps: optimiser steps of each model.
        alpha: exponent of the power law of distances, see ``seqlong.datamodules.synthetic.MQAR``.
        eval_rows: rows of validation, and of test, for each number of pairs.
        bf16: train in bfloat16 autocast with float32 weights.
        solved: stop when every number of pairs has this accuracy on validation rows.
        lesson: of the steps, how many come first on rows of a quarter of the length with ``lesson_pairs``, four times
            as many in a batch: what recall is, is learnt on short rows at a fraction of the cost.
        lesson_pairs: of a key and a value in these rows.
    """

    pairs: tuple[int, ...] = (4, 16, 64)
    length: int = 256
    vocab_size: int = 256
    width: int = 64
    batch_size: int = 96
    steps: int = 2000
    alpha: float = 0.1
    eval_rows: int = 512
    bf16: bool = False
    solved: float = 0.995
    lesson: int = 0
    lesson_pairs: tuple[int, ...] = (2, 4, 8)

    @property
    def chance(self) -> float:
        """Accuracy of guessing among all values."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def at(self, step: int) -> Setting:
        """The setting that makes the rows of ``step``, counted from 0."""
        if step >= self.lesson:
            return self
        return replace(self, pairs=self.lesson_pairs, length=self.length // 4, batch_size=4 * self.batch_size)


def models() -> dict[str, tuple[str, dict[str, MixerFactory]]]:
    """Name -> pattern of blocks and their mixers. Every mixer alone has two blocks."""
    found = {name: ("mm", {"m": make}) for name, make in SINGLE.items()}
    for name, make in HYBRIDS.items():
        for ratio, pattern in DEPTHS.items():
            both = {"m": make} if ratio == "alone" else {"m": make, "a": ATTENTION}
            title = f"{name}, {len(pattern)} blocks" if ratio == "alone" else f"{name} + attention {ratio}"
            found[title] = (pattern, both)
    return found


def rows(setting: Setting, count: int, pairs: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets ``(count, length)`` of rows as ``MQAR`` makes them, all at once on the generator's device."""
    half, device, length = setting.vocab_size // 2, random.device, setting.length
    places = (length - 2 * pairs) // 2

    def noise(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, device=device)

    keys = 1 + noise(count, half - 1).argsort(dim=1)[:, :pairs]
    values = torch.randint(half, setting.vocab_size, (count, pairs), generator=random, device=device)
    tokens = torch.randint(1, setting.vocab_size, (count, length), generator=random, device=device)
    # The k largest of log p + Gumbel noise are k draws without replacement.
    chances = (setting.alpha - 1) * torch.arange(1, places + 1, device=device).log()
    gumbel = -(-noise(count, places).clamp(1e-20, 1 - 1e-7).log()).log()
    asked = 2 * pairs + 2 * (chances + gumbel).topk(pairs, dim=1).indices
    # What stands between must not say a key again, which would have another answer.
    other = torch.randint(half, setting.vocab_size, (count, length), generator=random, device=device)
    is_key = torch.zeros(count, setting.vocab_size, dtype=torch.bool, device=device).scatter_(1, keys, True)
    tokens = torch.where(is_key.gather(1, tokens), other, tokens)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens.scatter_(1, asked, keys)
    return tokens, torch.full_like(tokens, -1).scatter_(1, asked, values)


def batch(setting: Setting, random: torch.Generator) -> SequenceBatch:
    """Rows of every number of pairs; each row weighs the same, so that few pairs count as much as many."""
    share = setting.batch_size // len(setting.pairs)
    made = [rows(setting, share, pairs, random) for pairs in setting.pairs]
    tokens, targets = (torch.cat(parts) for parts in zip(*made, strict=True))
    weight = (targets >= 0).float()
    return SequenceBatch(tokens, targets, weight / weight.sum(1, keepdim=True))


def source(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


class Model:
    """One model at one learning rate: ``step`` on a batch, ``accuracy`` on rows.

    On CUDA a whole step is recorded as a CUDA graph if ``graph`` says so: steps this small cost more to launch than to
    compute.
    """

    def __init__(
        self, setting: Setting, pattern: str, parts: dict[str, MixerFactory], lr: float, device: torch.device,
        graph: bool,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)  # the same first weights at every learning rate
        config = BackboneConfig(setting.vocab_size, setting.width, pattern, parts, ffn=None)
        self.setting, self.device, self.lr = setting, device, lr
        self.task = CausalLM(config, Optimizer(lr=lr)).to(device).train()
        self.schedule = Schedule()
        self.optimizer = self.task.optimizer_settings.build(self.task, fused=device.type == "cuda")
        self.steps, self.done = 0, False
        self.curve: list[float] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self._record = graph and device.type == "cuda"
        if device.type == "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(lr, device=device)
                group["capturable"] = True

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.setting.bf16 else contextlib.nullcontext()

    def _step(self, given: SequenceBatch) -> None:
        with self._autocast():
            loss, _ = self.task.objective(given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()  # to None: a recorded step writes gradients afresh

    def step(self, given: SequenceBatch, progress: float) -> None:
        """One optimiser step; ``progress`` from 0 to 1 places it in the schedule."""
        rate = self.lr * self.schedule.factor(int(progress * self.setting.steps), self.setting.steps)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.steps += 1
        if not self._record:
            self._step(given)
            return
        assert given.tokens is not None and given.targets is not None and given.loss_weight is not None
        if self.graph is not None and self._given.shape != given.shape:  # after a lesson rows are longer
            self.graph = None
        if self.graph is None:
            self._given = replace(given)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled and moments made before anything is recorded
                for _ in range(3):
                    self._step(self._given)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(self._given)
            self.graph = graph
        for name in ("tokens", "targets", "loss_weight"):
            getattr(self._given, name).copy_(getattr(given, name))
        self.graph.replay()

    @torch.no_grad()
    def accuracy(self, given: list[tuple[Tensor, Tensor]]) -> list[float]:
        """Share of questions answered rightly, for each group of rows."""
        self.task.eval()
        found = []
        for tokens, targets in given:
            with self._autocast():
                said = self.task(SequenceBatch(tokens)).argmax(dim=-1)
            asked = targets >= 0
            found.append(float((said == targets)[asked].float().mean()))
        self.task.train()
        return found

    def finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.task.parameters())


def train(
    name: str, setting: Setting, rates: list[float], device: torch.device, seconds: float = float("inf"),
    graph: bool = True, say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Train ``name`` at every rate, side by side on the same batches; one result a rate.

    When ``seconds`` do not suffice, the schedule runs as the clock does, so that each model ends at a low rate.
    """
    pattern, parts = models()[name]
    together = [Model(setting, pattern, parts, rate, device, graph) for rate in rates]
    random = source(device, 1)
    validation, test = (
        [rows(setting, setting.eval_rows, pairs, source(device, seed)) for pairs in setting.pairs] for seed in (2, 3)
    )
    begin, number, every = time.monotonic(), 0, max(1, setting.steps // 20)
    while number < setting.steps and not all(model.done for model in together):
        clock = (time.monotonic() - begin) / seconds
        if clock >= 1:
            break
        given = batch(setting.at(number), random)
        for model in together:
            if not model.done:
                model.step(given, max(clock, number / setting.steps))
        number += 1
        if number % every == 0:
            for model in together:
                if not model.done:
                    right = model.accuracy(validation)
                    model.curve.append(sum(right) / len(right))
                    model.done = min(right) >= setting.solved
            say(f"{name}: {number} steps, {time.monotonic() - begin:.0f} s, {[m.curve[-1] for m in together]}")
    for model in together:
        right = model.accuracy(validation) if model.finite() else [setting.chance] * len(setting.pairs)
        tested = model.accuracy(test) if model.finite() else [setting.chance] * len(setting.pairs)
        late = not model.done and model.steps < setting.steps  # time ran out
        yield {"model": name, "lr": model.lr, "steps": model.steps, "late": late,
               "validation": sum(right) / len(right), "test": tested, "curve": model.curve,
               "seconds": time.monotonic() - begin, "state_bytes": state_bytes(model.task.backbone, setting.length),
               "parameters": sum(p.numel() for p in model.task.parameters())}  # fmt: skip


@torch.no_grad()
def state_bytes(backbone: Backbone, length: int) -> int:
    """Bytes that all blocks keep of one row of ``length`` tokens in order to go on, in float32."""
    device = backbone.embedding.weight.device
    state = backbone.initial_state(1, device, torch.float32)
    after = backbone.eval()(SequenceBatch(torch.ones(1, length, dtype=torch.int64, device=device)), state).state
    assert after is not None
    kept: list[Tensor] = []
    for block in after.blocks:
        block.map(lambda tensor: kept.append(tensor) or tensor)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)
