"""log_linear on a GPU: one run of scalar_decay's or delta_rule's Triton kernels for each level.

Seen from a token at position p, the tokens of level l are those whose positions begin as p does, but for bit l - 1,
which is 1 in p and 0 in theirs. So a level is the recurrence itself, started afresh at every multiple of 2^l: only
tokens with that bit 0 write (the values of others are zero, though they decay and erase), only those with it 1 read.

    o_t = levels_t^0 q_t β_t k_tᵀ v_t + Σ_l [bit l-1 of p_t] levels_t^l run_l(v [bit l-1 of p is 0])_t

What a run leaves at the end of the row is bucket l - 1 of the stack, if the count of tokens has that bit. Positions are
counted from segments' starts, so packed rows are no other case. The backward pass makes each run again, so that nothing
is kept but the inputs; sums over levels are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlong.kernels.delta_rule.op import SHUT
from seqlong.kernels.delta_rule.triton import delta_rule_triton, delta_rule_triton_backward
from seqlong.kernels.log_linear.levels import buckets, positions
from seqlong.kernels.plans import power
from seqlong.kernels.precision import as_written
from seqlong.kernels.scalar_decay.triton import CHUNKS, NOTHING, scalar_decay_triton, scalar_decay_triton_backward

#: Tokens whose products are held in float32 at once.
BLOCK = 16384
#: Gradients of q, k, v, log-decay and beta.
Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class _Runs:
    """The runs of one row: their marks, forwards and backwards."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, starts: Tensor | None,
                 levels: int) -> None:  # fmt: skip
        self.q, self.k, self.v, self.beta = q, k, v, beta
        self.log_decay = log_decay
        self.position = positions(starts, None, v.shape[1], v.device)
        self.count = self.position[:, -1] + 1  # of tokens in the last segment
        self.read = (v.shape[1] - 1).bit_length()  # levels that some token reads
        self.all = v.shape[1].bit_length()  # and those that some bucket is of
        self.stack = buckets(levels)

    def marks(self, level: int) -> tuple[Tensor, Tensor]:
        """(b t): whether a token reads, else it writes; and whether the run starts afresh before it."""
        reads = (self.position >> (level - 1) & 1).bool()
        return reads, (self.position & ((1 << level) - 1)) == 0

    def filled(self, level: int) -> Tensor:
        """(1 or b, 1, 1, 1): whether the bucket of the level is."""
        return (self.count >> (level - 1) & 1).bool()[:, None, None, None]

    def run(self, level: int, keep: bool) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor | None], Found]]:
        """Output (b t h v), final state (b h k v), and what makes gradients of q, k, v, log-decay and beta."""
        reads, begins = (x.expand(self.v.shape[:2]) for x in self.marks(level))
        values = self.v.masked_fill(reads[..., None, None], 0)
        q, k = self.q, self.k
        if self.beta is None:
            gate = self.log_decay
            output, final, *kept = scalar_decay_triton(
                q, k, values, gate, None, None, None, begins, None, False, CHUNKS if keep else NOTHING
            )

            def of_decay(grad: Tensor, grad_final: Tensor | None) -> Found:
                dq, dk, dv, dgate, *_ = scalar_decay_triton_backward(
                    grad, grad_final, q, k, values, None, None, None, begins, None, *kept, False
                )
                return dq, dk, dv.masked_fill_(reads[..., None, None], 0), dgate, None

            return output, final, of_decay
        shut = begins[..., None] | (self.log_decay < SHUT)
        gate = self.log_decay.float().masked_fill(shut, SHUT)
        weight = self.beta.float()
        output, final, *kept = delta_rule_triton(q, k, values, weight, gate, None, False, keep)

        def of_delta(grad: Tensor, grad_final: Tensor | None) -> Found:
            dq, dk, dv, dweight, dgate, _ = delta_rule_triton_backward(
                grad, grad_final, q, k, values, weight, gate, *kept, False
            )
            dv.masked_fill_(reads[..., None, None], 0)
            return dq, dk, dv, dgate.masked_fill_(shut, 0), dweight

        return output, final, of_delta

    def itself(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Block by block: where, q, k and the weight of v (b n h 1) without the level's, in float32."""
        repeat = self.v.shape[2] // self.q.shape[2]
        for begin in range(0, self.v.shape[1], BLOCK):
            part = slice(begin, begin + BLOCK)
            q, k = self.q[:, part].float(), self.k[:, part].float()
            weight = (q * k).sum(dim=-1).repeat_interleave(repeat, dim=2)
            yield part, q, k, weight if self.beta is None else weight * self.beta[:, part].float()


@torch.library.custom_op(
    "seqlong::log_linear_by_level",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor levels, Tensor? beta, Tensor? starts) "
    "-> (Tensor, Tensor, Tensor)",
)
@as_written
def log_linear_by_level(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    levels: Tensor,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b t h v), the stack after (b h m k v), its count (b)."""
    runs = _Runs(q, k, v, log_decay, beta, starts, levels.shape[3])
    total = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    for part, _, _, weight in runs.itself():
        torch.mul((weight * levels[:, part, :, 0].float())[..., None], v[:, part], out=total[:, part])
    (rows, _, _, width), (heads, value_width) = q.shape, v.shape[2:]
    stack = total.new_zeros(rows, heads, runs.stack, width, value_width)
    for level in range(1, runs.all + 1):
        output, final, _ = runs.run(level, keep=False)
        if level <= runs.read:
            reads, _ = runs.marks(level)
            total.addcmul_(output, (levels[..., level].float() * reads[..., None])[..., None])
        stack[:, :, min(level, runs.stack) - 1] += torch.where(runs.filled(level), final, 0)
    return total.to(v.dtype), stack, runs.count.expand(rows).clone()


@log_linear_by_level.register_fake
def _(q, k, v, log_decay, levels, beta, starts):  # type: ignore[no-untyped-def]
    (rows, _, _, width), (heads, value_width) = q.shape, v.shape[2:]
    stack = v.new_empty(rows, heads, buckets(levels.shape[3]), width, value_width, dtype=torch.float32)
    return v.new_empty(v.shape), stack, v.new_empty(rows, dtype=torch.long)


@torch.library.custom_op(
    "seqlong::log_linear_by_level_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_stack, Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor levels, "
    "Tensor? beta, Tensor? starts) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def log_linear_by_level_backward(
    grad_output: Tensor,
    grad_stack: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    levels: Tensor,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, levels and beta (empty without)."""
    runs = _Runs(q, k, v, log_decay, beta, starts, levels.shape[3])
    dq, dk, dv, dgate, dlevels = (torch.zeros(x.shape, dtype=torch.float32, device=x.device)
                                  for x in (q, k, v, log_decay, levels))  # fmt: skip
    dbeta = dq.new_zeros(0 if beta is None else beta.shape)
    groups, repeat = q.shape[2], v.shape[2] // q.shape[2]
    for part, query, key, weight in runs.itself():
        read = (grad_output[:, part].float() * v[:, part]).sum(dim=-1)  # (b n h)
        first = levels[:, part, :, 0].float()
        dlevels[:, part, :, 0] = read * weight
        torch.mul((weight * first)[..., None], grad_output[:, part], out=dv[:, part])
        through = read * first
        if beta is not None:
            pairs = (query * key).sum(dim=-1).repeat_interleave(repeat, dim=2)
            dbeta[:, part] = through * pairs
            through = through * beta[:, part].float()
        through = through.unflatten(2, (groups, repeat)).sum(dim=3)[..., None]
        dq[:, part], dk[:, part] = through * key, through * query
    for level in range(1, (runs.read if grad_stack is None else runs.all) + 1):
        output, _, gradients = runs.run(level, keep=True)
        reads, _ = runs.marks(level)
        if level <= runs.read:
            weight = levels[..., level].float() * reads[..., None]
            for begin in range(0, v.shape[1], BLOCK):
                part = slice(begin, begin + BLOCK)
                read = (grad_output[:, part].float() * output[:, part]).sum(dim=-1)
                dlevels[:, part, :, level] = read * reads[:, part, None]
            incoming = grad_output * weight[..., None].to(grad_output.dtype)
        else:
            incoming = torch.zeros_like(grad_output)
        final = None
        if grad_stack is not None:
            final = torch.where(runs.filled(level), grad_stack[:, :, min(level, runs.stack) - 1], 0)
        found = gradients(incoming.to(v.dtype), final)
        for total, one in zip((dq, dk, dv, dgate, dbeta), found, strict=True):
            if one is not None:
                total += one
    return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dgate.to(log_decay.dtype), dlevels.to(levels.dtype),
            dbeta if beta is None else dbeta.to(beta.dtype))  # fmt: skip


@log_linear_by_level_backward.register_fake
def _(grad_output, grad_stack, q, k, v, log_decay, levels, beta, starts):  # type: ignore[no-untyped-def]
    none = v.new_empty(0, dtype=torch.float32) if beta is None else beta
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, levels, none))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_stack, _grad_count):  # type: ignore[no-untyped-def]
    inputs = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(inputs[2])
    *grads, grad_beta = log_linear_by_level_backward(grad_output, grad_stack, *inputs)
    return *grads, None if inputs[5] is None else grad_beta, None


log_linear_by_level.register_autograd(_backward, setup_context=_setup_context)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    levels: Tensor,
    beta: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, stack and count of inputs of any width: padded to what kernels can read, and cut again."""
    width, value_width = q.shape[3], v.shape[3]
    per = 16 // v.element_size()
    more = -width % per
    # Several heads are read through one window onto v: a tile must not reach into the next head.
    value_more = power(value_width) - value_width if q.shape[2] != v.shape[2] else -value_width % per
    if more:
        q, k = (F.pad(x, (0, more)) for x in (q, k))
    if value_more:
        v = F.pad(v, (0, value_more))
    output, stack, count = log_linear_by_level(q, k, v, log_decay, levels, beta, starts)
    if more or value_more:
        output, stack = output[..., :value_width], stack[..., :width, :value_width]
    return output, stack, count
