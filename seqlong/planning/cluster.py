"""A training step on many GPUs: what each computes, what crosses which link, and what it waits for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from seqlong.cost import mixer_cost, used_experts
from seqlong.errors import ConfigError
from seqlong.ffn.moe import MoE
from seqlong.mixers.attention import Attention
from seqlong.mixers.base import Mixer
from seqlong.planning.estimate import Estimate, Memory, Time, room
from seqlong.planning.machines import Machine, Reached
from seqlong.planning.step import Job

Sharing = Literal["ddp", "fsdp"]
#: Mixers whose state is multiplied with a matrix: what they tell each other holds one a head too.
DENSE = ("DeltaNet", "GatedDeltaNet", "KDA", "RWKV7")
#: Share of a step's computation behind which weights and gradients can travel.
HIDDEN = 0.5
#: Bytes of a weight or gradient that travels: both are float32.
WEIGHT = 4

ASSUMPTIONS = (
    "every group of --sp GPUs has rows of its own: more GPUs, more tokens a step (weak scaling)",
    "GPUs that share a row are neighbours in a server; collectives over servers use all of a server's network cards",
    "weights and gradients travel in float32, behind at most half of the computation but for the last block's; "
    "states, heads and tokens of experts are waited for",
    "all GPUs are equally fast, and nothing waits for data",
)


@dataclass(frozen=True)
class Exchange:
    """What one GPU receives in a step for one purpose.

    Attributes:
        what: the purpose.
        received: bytes.
        times: collectives.
        group: GPUs that take part.
        paired: whether each two of the group talk (all-to-all), so that most pairs share a server's slow way out.
        behind: whether it travels while the GPU computes.
    """

    what: str
    received: float | int
    times: int
    group: int
    paired: bool = False
    behind: bool = False

    def seconds(self, machine: Machine, reached: Reached) -> float:
        """How long the links need."""
        if self.group < 2:
            return 0.0
        inside = min(self.group, machine.peers)
        servers = math.ceil(self.group / machine.peers)
        latency = reached.latency[0] + (reached.latency[1] * math.ceil(math.log2(servers)) if servers > 1 else 0.0)
        rate = machine.link
        if servers > 1 and self.paired:
            outside = (self.group - inside) / (self.group - 1)
            rate = 1 / max(outside / machine.network, (1 - outside) / machine.link)
        elif servers > 1:
            rate = min(machine.link, machine.network * machine.peers)
        return self.received / (rate * reached.link) + self.times * latency


@dataclass(frozen=True)
class Row:
    """A number of GPUs, and what a step takes there.

    Attributes:
        gpus: in all.
        servers: that hold them.
        rows: groups of GPUs, each with rows of its own.
        tokens: of a step.
        compute: seconds that a GPU is busy, or waits for the host to say what is to be done.
        hosted: whether it is the latter.
        waits: seconds that it waits, by purpose.
        hidden: seconds of travel behind the computation.
        memory: at the fullest moment.
        fits: whether that is less than there is.
        single: tokens a second of one GPU with rows of the same length, whether they fit or not.
    """

    gpus: int
    servers: int
    rows: int
    tokens: int
    compute: float
    hosted: bool
    waits: dict[str, float]
    hidden: float
    memory: Memory
    fits: bool
    single: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + sum(self.waits.values())

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def efficiency(self) -> float:
        """Speed as a share of that many single GPUs'."""
        return self.speed / (self.gpus * self.single)

    @property
    def bound(self) -> str:
        """What most of the step goes to."""
        if not self.fits:
            return "does not fit"
        name, seconds = max(self.waits.items(), key=lambda item: item[1], default=("", 0.0))
        if self.compute < seconds:
            return name
        return "host" if self.hosted else "compute"


class Cluster:
    """Predicts steps of a job on any number of GPUs.

    Args:
        job: what is trained.
        estimate: its steps on one GPU.
        machine: the GPU.
        reached: what of its rates is reached.
        sharing: ``ddp``: every GPU has all weights; ``fsdp``: a part of each, gathered block by block.
        sp: GPUs that share a row.
        ep: GPUs that share experts.

    Raises:
        ConfigError: groups that do not go together.
    """

    def __init__(
        self, job: Job, estimate: Estimate, machine: Machine, reached: Reached, sharing: Sharing = "ddp", sp: int = 1,
        ep: int = 1,
    ) -> None:  # fmt: skip
        self.job, self.estimate, self.machine, self.reached = job, estimate, machine, reached
        self.sharing, self.sp, self.ep = sharing, sp, ep
        if job.length % sp:
            raise ConfigError(f"--sp {sp} does not divide rows of {job.length:,} tokens")
        self.blocks: list[Any] = list(job.model()["backbone"].blocks)  # type: ignore[index, arg-type]
        self.moes = [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]
        if ep > 1 and not self.moes:
            raise ConfigError(f"--ep {ep} shares out experts, and this model has none")
        if ep > 1 and self.moes[0].experts.count % ep:
            raise ConfigError(f"--ep {ep} does not divide {self.moes[0].experts.count} experts")
        self.whole = [type(block.mixer).__name__ for block in self.blocks if not self._divides(block.mixer)]

    def row(self, gpus: int) -> Row:
        """The step on ``gpus`` GPUs.

        Raises:
            ConfigError: a number that the groups do not divide.
        """
        for size, flag in ((self.sp, "--sp"), (self.ep, "--ep")):
            if gpus % size:
                raise ConfigError(f"{flag} {size} does not divide {gpus} GPUs")
        job = self.job
        alone = self.estimate.time(job.length, self.machine, self.reached, job.batches)
        tokens = job.rows * job.length * job.batches
        compute = self._compute(alone)
        waits: dict[str, float] = {}
        hidden = 0.0
        for exchange in self.exchanges(gpus):
            seconds = exchange.seconds(self.machine, self.reached)
            if exchange.behind:
                hidden += seconds
            elif seconds:
                waits[exchange.what] = waits.get(exchange.what, 0.0) + seconds
        if hidden:  # the last block's gradients have nothing left to hide behind
            late = max(hidden - HIDDEN * compute, hidden / len(self.blocks) / 2)
            waits["weights and gradients"] = late
            hidden -= late
        memory = self.memory(gpus)
        groups = gpus // self.sp
        servers = math.ceil(gpus / self.machine.peers)
        fits = memory.peak <= room(self.machine, self.reached)
        return Row(
            gpus, servers, groups, tokens * groups, compute, compute == alone.host, waits, hidden, memory, fits,
            tokens / alone.total,
        )  # fmt: skip

    def exchanges(self, gpus: int) -> Iterator[Exchange]:
        """All that crosses links in a step."""
        job, sp = self.job, self.sp
        passes = job.batches * (2 if job.checkpointing == "none" else 3)  # forward, again, backward
        kind = 2 if job.precision.startswith("bf16") else 4
        here = job.rows * job.length / sp
        for block in self.blocks if sp > 1 else ():
            mixer = block.mixer
            if not self._divides(mixer):
                width = block.mixer_norm.weight.numel()
                if isinstance(mixer, Attention):  # its queries, keys and values are gathered, not what makes them
                    width = (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim
                yield Exchange("whole rows", passes * (sp - 1) * here * width * kind, passes, sp)
            elif isinstance(mixer, Attention):
                each = (2 * mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim * kind
                yield Exchange("heads of attention", passes * (sp - 1) / sp * here * each, 4 * passes, sp, paired=True)
            else:
                yield Exchange("states", passes * (sp - 1) * job.rows * state_bytes(mixer), passes, sp)
        for moe in self.moes if self.ep > 1 else ():
            width = self.blocks[0].mixer_norm.weight.numel()
            sent = 2 * passes * (self.ep - 1) / self.ep * here * used_experts(moe) * width * kind
            yield Exchange("tokens of experts", sent, 2 * passes, self.ep, paired=True)
        if gpus == 1:
            return
        share = (gpus - 1) / gpus * self._parameters() * WEIGHT
        if self.sharing == "ddp":
            yield Exchange("weights and gradients", 2 * share, len(self.blocks), gpus, behind=True)
        else:
            gathered = job.batches * (1 if job.checkpointing == "none" else 2)
            yield Exchange("weights and gradients", (gathered + 1) * share, 3 * len(self.blocks), gpus, behind=True)

    def memory(self, gpus: int) -> Memory:
        """What each GPU holds."""
        memory = self.estimate.memory(self.job.length / self.sp)
        elsewhere = self._experts() * (1 - 1 / self.ep) / self.estimate.long.parameters
        memory = replace(
            memory,
            weights=memory.weights * (1 - elsewhere),
            moments=memory.moments * (1 - elsewhere),
            gradients=memory.gradients * (1 - elsewhere),
        )
        whole = self._parameters() * WEIGHT
        if self.sharing == "ddp":  # its buckets are copies of the gradients
            return replace(memory, working=memory.working + whole * (gpus > 1))
        experts = self._experts() * WEIGHT
        block = (whole - experts) / max(1, len(self.blocks))
        part = 1 / gpus
        return replace(
            memory,
            weights=memory.weights * part,
            moments=memory.moments * part,
            gradients=memory.gradients * part,
            working=memory.working + 3 * block,  # a block's weights, the next one's, and its gradients
        )

    def _compute(self, alone: Time) -> float:
        """Seconds: a part of each row, but whole rows where a mixer cannot do with a part."""
        if self.sp == 1:
            return alone.total
        costs = [(mixer_cost(block.mixer, self.job.length).flops, self._divides(block.mixer)) for block in self.blocks]
        every = sum(flops for flops, _ in costs) + sum(
            2.0 * p.numel() for block in self.blocks if block.ffn is not None for p in block.ffn.parameters()
        )
        kept = sum(flops for flops, divides in costs if not divides) / max(every, 1.0)
        return max(alone.device * (kept + (1 - kept) / self.sp), alone.host)

    def _divides(self, mixer: Any) -> bool:
        if isinstance(mixer, Attention):
            return mixer.heads % self.sp == 0
        return self.sp == 1 or bool(mixer.sequence_parallel)

    def _parameters(self) -> float:
        """Weights of a GPU's experts, and all others."""
        experts = self._experts()
        return self.estimate.long.parameters - experts + experts / self.ep

    def _experts(self) -> float:
        return float(sum(p.numel() for moe in self.moes for p in moe.experts.parameters()))


def state_bytes(mixer: Any) -> int:
    """What a fragment of a row tells the others, bytes: its state, the tail of its convolution, its transition."""
    try:
        states = mixer.initial_state(1, "meta", torch.bfloat16)
    except ValueError:  # both directions: each has a state, but a window of a row none
        return sum(state_bytes(inner) for inner in mixer.children() if isinstance(inner, Mixer))
    found = 0
    stack: list[Any] = [states]
    dense = any(base.__name__ in DENSE for base in type(mixer).__mro__)
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            found += item.numel() * item.element_size()
            if item.dim() == 4:  # (b h k v)
                found += 4 * item.shape[1] * (item.shape[2] ** 2 if dense else 1)
        elif isinstance(item, dict):
            stack += list(item.values())
        elif isinstance(item, list | tuple):
            stack += list(item)
        elif hasattr(item, "__dict__"):
            stack += list(vars(item).values())
    return found


def table(cluster: Cluster, counts: Sequence[int]) -> list[Row]:
    """A row for each number of GPUs; fewer than share a row or experts share them among all there are."""
    made = []
    for count in counts:
        sp, ep = min(cluster.sp, count), min(cluster.ep, count)
        same = (sp, ep) == (cluster.sp, cluster.ep)
        here = cluster if same else Cluster(
            cluster.job, cluster.estimate, cluster.machine, cluster.reached, cluster.sharing, sp, ep
        )  # fmt: skip
        made.append(here.row(count))
    return made
