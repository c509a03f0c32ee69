"""delta_rule as matrix products over chunks, on any device, in pure torch: the op and its gradient.

The row is cut into blocks, and each block into chunks (``chunked_block.py``). Blocks run one after another and bound
the memory: the forward pass keeps the state at the entry of each block, the backward pass goes through the blocks from
the right and recomputes their insides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqlong.kernels.delta_rule.activations import (
    log_decays,
    log_decays_backward,
    normalized,
    normalized_backward,
    weights,
    weights_backward,
)
from seqlong.kernels.delta_rule.chunked_block import Block, backward, cut, forward, joined, make
from seqlong.kernels.precision import accumulation, as_written

#: (tokens a chunk, tokens a block) by device type, measured.
SIZES = {"cpu": (32, 512), "cuda": (64, 8192)}


class _Inputs:
    """The op's inputs, and a block of them with its activations."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, rate: Tensor | None,
                 bias: Tensor | None, starts: Tensor | None, normalize: bool, beta_activation: int, chunk: int,
                 block: int) -> None:  # fmt: skip
        self.q, self.k, self.v, self.beta, self.gate = q, k, v, beta, gate
        self.rate, self.bias, self.starts = rate, bias, starts
        self.normalize, self.beta_activation = normalize, beta_activation
        self.work = accumulation(v.dtype)
        self.chunk, self.block = sizes(q, chunk, block)

    def part(self, a: int, z: int) -> tuple[Block, tuple[Tensor, ...]]:
        """The block of tokens a to z, and what the gradients of its activations need."""
        q, k = (x[:, a:z].to(self.work) for x in (self.q, self.k))
        scales = (q.new_empty(0), q.new_empty(0))
        if self.normalize:
            (q, scale_q), (k, scale_k) = normalized(q), normalized(k)
            scales = scale_q, scale_k
        weight = weights(self.beta[:, a:z].to(self.work), self.beta_activation)
        if self.gate is None:
            raw = decay = torch.zeros_like(weight)
        else:
            raw = self.gate[:, a:z].to(self.work)
            decay = log_decays(raw, self.rate, self.bias)
        # A sum that held -1e6 would have no digits left for the tokens after it; e^floor is zero in the working type.
        floor = -111.0 if self.work == torch.float32 else -746.0
        decay = decay.clamp(min=floor)
        if self.starts is not None:
            begins = self.starts[:, a:z, None]
            decay = decay.masked_fill(begins if decay.dim() == 3 else begins[..., None], floor)
        return make(q, k, self.v[:, a:z].to(self.work), weight, decay, self.chunk), (q, k, *scales, weight, raw)

    @property
    def cuts(self) -> list[tuple[int, int]]:
        length = self.q.shape[1]
        return [(start, min(start + self.block, length)) for start in range(0, length, self.block)]

    def state(self, given: Tensor | None) -> Tensor:
        """A state or the gradient of one (b h k v) as (b g r k v) of the working type; zero if None."""
        (rows, _, groups, width), (heads, value_width) = self.q.shape, self.v.shape[2:]
        shape = (rows, groups, heads // groups, width, value_width)
        if given is None:
            return torch.zeros(shape, dtype=self.work, device=self.q.device)
        return given.to(self.work).reshape(shape)


def sizes(q: Tensor, chunk: int, block: int) -> tuple[int, int]:
    """Tokens of a chunk, a power of two, and of a block."""
    default_chunk, default_block = SIZES.get(q.device.type, SIZES["cuda"])
    chunk = chunk or min(default_chunk, max(16, 1 << max(q.shape[1] - 1, 0).bit_length()))
    return chunk, max(chunk, block or default_block)


@torch.library.custom_op(
    "seqlong::delta_rule_chunked",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? gate, Tensor? rate, Tensor? bias, Tensor? starts, "
    "Tensor? initial_state, bool normalize=False, int beta_activation=0, int chunk=0, int block=0) "
    "-> (Tensor, Tensor, Tensor)",
)
@as_written
def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    rate: Tensor | None,
    bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    normalize: bool = False,
    beta_activation: int = 0,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (b t h v), final state (b h k v), and the states at the entry of every block (m b g r k v).

    With ``rate`` the gate is raw: g = rate · softplus(gate + bias). beta_activation counts in ``inputs.BETA``.
    """
    given = _Inputs(q, k, v, beta, gate, rate, bias, starts, normalize, beta_activation, chunk, block)
    state = given.state(initial_state)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    entries = state.new_empty(len(given.cuts), *state.shape)
    for index, (a, z) in enumerate(given.cuts):
        entries[index] = state
        result, state = forward(given.part(a, z)[0], state)
        output[:, a:z] = joined(result.flatten(2, 3), z - a)
    return output, state.flatten(1, 2).clone(memory_format=torch.contiguous_format), entries


@delta_rule_chunked.register_fake
def _(q, k, v, beta, gate, rate, bias, starts, initial_state, normalize=False, beta_activation=0, chunk=0, block=0):  # type: ignore[no-untyped-def]
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    kept = accumulation(v.dtype)
    # Without asking for the length's power of two, which would fix a symbolic length.
    block = max(chunk, block or SIZES.get(q.device.type, SIZES["cuda"])[1])
    blocks = (length + block - 1) // block
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        v.new_empty(rows, heads, width, value_width, dtype=kept),
        v.new_empty(blocks, rows, groups, heads // groups, width, value_width, dtype=kept),
    )


@torch.library.custom_op(
    "seqlong::delta_rule_chunked_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? gate, "
    "Tensor? rate, Tensor? bias, Tensor? starts, Tensor entries, bool normalize=False, int beta_activation=0, "
    "int chunk=0, int block=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@as_written
def delta_rule_chunked_backward(
    grad_output: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    rate: Tensor | None,
    bias: Tensor | None,
    starts: Tensor | None,
    entries: Tensor,
    normalize: bool = False,
    beta_activation: int = 0,
    chunk: int = 0,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, gate, rate, bias (empty where there is none) and the initial state."""
    given = _Inputs(q, k, v, beta, gate, rate, bias, starts, normalize, beta_activation, chunk, block)
    groups = q.shape[2]
    grads = _results(q, k, v, beta, gate, rate, bias)
    grad_q, grad_k, grad_v, grad_beta, grad_gate, grad_rate, grad_bias = grads
    sums = [x.to(given.work).zero_() for x in (grad_rate, grad_bias)]
    grad_state = given.state(grad_final)
    for index, (a, z) in reversed(list(enumerate(given.cuts))):
        size = z - a
        part, (qn, kn, scale_q, scale_k, weight, raw) = given.part(a, z)
        incoming = cut(grad_output[:, a:z].to(given.work), given.chunk).unflatten(2, (groups, -1))
        found = backward(part, entries[index], incoming, grad_state)
        grad_state = found.state
        for out, grad, y, scale in ((grad_q, found.q, qn, scale_q), (grad_k, found.k, kn, scale_k)):
            grad = joined(grad, size)
            out[:, a:z] = normalized_backward(grad, y, scale) if normalize else grad
        grad_v[:, a:z] = joined(found.v.flatten(2, 3), size)
        grad_beta[:, a:z] = weights_backward(joined(found.beta.flatten(2, 3), size), weight, beta_activation)
        if gate is not None:
            decay = joined(found.log_decay.flatten(2, 3), size)
            decay = decay if gate.dim() == 4 else decay.squeeze(-1)
            grad_gate[:, a:z], of_rate, of_bias = log_decays_backward(decay, raw, rate, bias)
            for total, more in zip(sums, (of_rate, of_bias), strict=True):
                if more is not None:
                    total += more
    grad_rate.copy_(sums[0])
    grad_bias.copy_(sums[1])
    return (*grads, grad_state.flatten(1, 2).clone(memory_format=torch.contiguous_format))  # type: ignore[return-value]


def _results(q, k, v, beta, gate, rate, bias) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Room for the gradients of the inputs, an empty tensor for one that is not there."""
    return [
        v.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, beta, gate, rate, bias)
    ]


@delta_rule_chunked_backward.register_fake
def _(grad_output, grad_final, q, k, v, beta, gate, rate, bias, starts, entries, normalize=False, beta_activation=0,
      chunk=0, block=0):  # type: ignore[no-untyped-def]  # fmt: skip
    rows, width, heads, value_width = q.shape[0], q.shape[3], v.shape[2], v.shape[3]
    return (*_results(q, k, v, beta, gate, rate, bias), entries.new_empty(rows, heads, width, value_width))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, initial_state, normalize, beta_activation, chunk, block = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = (normalize, beta_activation, chunk, block)
    ctx.initial_type = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_final, _grad_entries):  # type: ignore[no-untyped-def]
    *tensors, entries = ctx.saved_tensors
    v, gate, rate, bias = tensors[2], *tensors[4:7]
    if grad_output is None:
        grad_output = torch.zeros_like(v)
    *grads, of_gate, of_rate, of_bias, of_state = delta_rule_chunked_backward(
        grad_output, grad_final, *tensors, entries, *ctx.options
    )
    optional = (found if x is not None else None for x, found in ((gate, of_gate), (rate, of_rate), (bias, of_bias)))
    of_state = of_state.to(ctx.initial_type) if ctx.initial_type is not None else None
    return (*grads, *optional, None, of_state, None, None, None, None)


delta_rule_chunked.register_autograd(_backward, setup_context=_setup_context)
