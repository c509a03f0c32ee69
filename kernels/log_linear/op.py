"""log_linear and its step: the public functions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqlong.kernels.delta_rule import op as delta_rule
from seqlong.kernels.dispatch import choose_along_a_row
from seqlong.kernels.inputs import four_axes, heads_of_groups, needed, said, shaped, token_marks
from seqlong.kernels.log_linear.chunked import log_linear_chunked
from seqlong.kernels.log_linear.levels import Fenwick, buckets
from seqlong.kernels.log_linear.reference import log_linear_reference
from seqlong.kernels.precision import accumulation, as_written
from seqlong.kernels.scalar_decay import op as scalar_decay

OFFERED = {
    "triton": "a run of the Triton kernels of scalar_decay or delta_rule for each level",
    "chunked": "matrix products over chunks in torch, any device",
    "reference": "float64 loop over tokens",
}


def why_not_triton(
    q: Tensor, v: Tensor, levels: Tensor, beta: Tensor | None, state: tuple[Tensor, Tensor] | None
) -> str | None:
    """None if the Triton kernels serve these inputs, else the reason why not."""
    if state is not None:
        return "Triton kernels start without a stack"
    if v.shape[1] > 1 << (int(levels.shape[3]) - 1):
        return f"Triton kernels need a level for each power of two of {v.shape[1]} tokens, not {levels.shape[3]}"
    if beta is None:
        return scalar_decay.why_not_triton(q, v) or scalar_decay.why_none(q, v, ssd=False)
    if v.shape[3] > delta_rule.WIDEST[1]:
        return f"Triton kernels hold values up to {delta_rule.WIDEST[1]} wide, not {v.shape[3]}"
    return delta_rule.why_not_triton(q, v) or delta_rule.PLANS.why_none(q, v, channels=False)


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    levels: Tensor,
    beta: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    marks: dict[str, Tensor | None],
) -> None:
    """Raise a ValueError that names the argument, what was found and what was expected."""
    needed(op, {"q": q, "k": k, "v": v, "log_decay": log_decay, "levels": levels})
    if state is not None and not (isinstance(state, tuple) and len(state) == 2):
        raise ValueError(f"{op} needs a state such as it returns, Fenwick(states, tokens), found {said(state)}")
    four_axes(op, {"q": q, "v": v, "levels": levels})
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    heads_of_groups(op, heads, groups)
    if levels.shape[3] < 1:
        raise ValueError(f"{op} needs at least one level, found {said(levels)}")
    stack = buckets(levels.shape[3])
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, q.shape),
        "v": (v, (rows, length, heads, value_width)),
        "log_decay": (log_decay, (rows, length, heads)),
        "levels": (levels, (rows, length, heads, levels.shape[3])),
        "beta": (beta, (rows, length, heads)),
        "states": (None if state is None else state[0], (rows, heads, stack, width, value_width)),
        "tokens": (None if state is None else state[1], (rows,)),
    }
    shaped(op, expected)
    token_marks(op, marks, (rows, length))
    if state is not None and state[1].dtype != torch.int64:
        raise ValueError(f"{op} needs tokens of type int64, found {state[1].dtype}")


def log_linear(
    q: Float[Tensor, "b t g k"],
    k: Float[Tensor, "b t g k"],
    v: Float[Tensor, "b t h v"],
    log_decay: Float[Tensor, "b t h"],
    levels: Float[Tensor, "b t h l"],
    *,
    beta: Float[Tensor, "b t h"] | None = None,
    starts: Bool[Tensor, "b t"] | None = None,
    initial_state: Fenwick | None = None,
    implementation: str | None = None,
) -> tuple[Float[Tensor, "b t h v"], Fenwick]:
    """Linear attention with a weight for each power of two of distance: ``o_t = Σ_l levels_t^l q_t S_t^l``.

    ``S_t^l`` is the state that tokens of level ``bit_length(t XOR s)`` have left, positions counted within the segment:
    each goes through ``S = e^g S + kᵀ v``, or with beta through ``S = e^g S; S = S + β kᵀ (v - k S)``, of which a level
    holds its tokens' part. All weights 1 is scalar_decay, or the gated delta rule. Time is t log t, the state log t.

    Args:
        q: queries, g groups that divide the h heads.
        k: keys; the delta rule wants them of length one.
        v: values.
        log_decay: g_t <= 0, natural logarithm; ``-inf`` forgets all that came before, as far as weights go.
        levels: weights, >= 0 (nothing depends on that). A segment of t tokens has ``bit_length(t - 1) + 1`` levels;
            with fewer, whatever lies higher has the last one's weight; more are not looked at.
        beta: strengths of writing; None is scalar decay.
        starts: True where state and levels start afresh before the token.
        initial_state: what tokens before have left; None if there are none. A row cut in two is the row.
        implementation: ``triton``, ``chunked`` or ``reference``; None lets dispatch choose.

    Returns:
        The output in v's type and what the row leaves, in float32 (float64 if v is), with its count of tokens.

    Raises:
        ValueError: shapes or types do not fit, or the implementation asked for cannot serve the inputs.

    Source: arXiv 2506.04761.
    """
    check("log_linear", q, k, v, log_decay, levels, beta, initial_state, {"starts": starts})
    choice = choose_along_a_row("log_linear", v, why_not_triton(q, v, levels, beta, initial_state), implementation)
    states, count = (None, None) if initial_state is None else initial_state
    if choice.implementation == "triton":
        from seqlong.kernels.log_linear.by_level import run

        output, after, number = run(q, k, v, log_decay, levels, beta, starts)
        return output, Fenwick(after, number)
    if choice.implementation == "reference":
        output, after, number = log_linear_reference(q, k, v, log_decay, levels, beta, starts, states, count)
    else:
        output, after, number, _ = log_linear_chunked(q, k, v, log_decay, levels, beta, starts, states, count)
    return output, Fenwick(after, number)


def log_linear_step(
    q: Float[Tensor, "b n g k"],
    k: Float[Tensor, "b n g k"],
    v: Float[Tensor, "b n h v"],
    log_decay: Float[Tensor, "b n h"],
    levels: Float[Tensor, "b n h l"],
    state: Fenwick,
    *,
    beta: Float[Tensor, "b n h"] | None = None,
    starts: Bool[Tensor, "b n"] | None = None,
    padding: Bool[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b n h v"], Fenwick]:
    """The next n tokens of ``log_linear``: one in decoding, some in streaming or speculation.

    The state given is not changed.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: as in ``log_linear``.
        levels: weights.
        state: what tokens before have left.
        beta: strengths of writing; None is scalar decay.
        starts: True where state and levels start afresh before the token.
        padding: True where there is no token: the state stays, whatever stands there, and the output means nothing.

    Returns:
        The output in v's type and what is left after.

    Raises:
        ValueError: shapes or types do not fit.

    Source: arXiv 2506.04761.
    """
    if state is None:
        raise ValueError(
            "log_linear_step needs state, a Fenwick, found None; before the first token it is Fenwick of zeros "
            "(b h buckets k v), and zeros (b) of int64, with buckets(levels.shape[3]) buckets"
        )
    check("log_linear_step", q, k, v, log_decay, levels, beta, state, {"starts": starts, "padding": padding})
    if q.shape[1] != 1 and padding is None:
        return log_linear(
            q, k, v, log_decay, levels, beta=beta, starts=starts, initial_state=state, implementation="chunked"
        )
    states, count = state
    outputs = []
    for n in range(q.shape[1]):
        token = [x[:, n] for x in (q, k, v, log_decay, levels)]
        options = (None if x is None else x[:, n] for x in (beta, starts, padding))
        output, states, count = _one(states, count, *token, *options)
        outputs.append(output)
    if not outputs:
        return torch.empty_like(v), Fenwick(states.clone(), count.clone())
    return torch.stack(outputs, dim=1), Fenwick(states, count)


@as_written
def _one(
    states: Tensor,
    count: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    levels: Tensor,
    beta: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token: its output, the states and the count of tokens after."""
    kept, repeat = accumulation(v.dtype), v.shape[1] // q.shape[1]
    before = states.to(kept)
    stays = before, count
    query, key = (x.to(kept).repeat_interleave(repeat, dim=1) for x in (q, k))
    if starts is not None:
        before, count = before.masked_fill(starts[:, None, None, None, None], 0), count.masked_fill(starts, 0)
    decayed = before * log_decay.to(kept).exp()[..., None, None, None]
    value = v.to(kept)
    if beta is not None:
        strength = beta.to(kept)[..., None]
        erased = (key[:, :, None, None] @ decayed) * strength[..., None, None]  # (b h m 1 v)
        decayed = decayed - key[:, :, None, :, None] * erased
        value = value * strength
    update = key[..., None] * value[:, :, None]
    # Bucket m is seen at level m + 1, or at the last there is.
    stack, count_levels = before.shape[2], levels.shape[-1]
    weight = levels.to(kept)[..., 1:] if count_levels > 1 else levels.to(kept)
    read = (query[:, :, None, None] @ decayed)[:, :, :, 0]  # (b h m v)
    output = (weight[..., None] * read).sum(dim=2) + levels[..., :1].to(kept) * (query[..., None] * update).sum(dim=2)

    # Buckets up to the lowest bit of the new count are added up there.
    number = count + 1
    bucket = torch.arange(stack, device=count.device)
    whole = number[:, None] % (2 ** (bucket + 1)) != 0  # the lowest bit is this one or below
    up_to = ~(whole.cumsum(dim=1) - whole.long()).bool()
    into = up_to & (whole | (bucket == stack - 1))
    low, there = up_to[:, None, :, None, None], into[:, None, :, None, None]
    total = torch.where(low, decayed, 0).sum(dim=2) + update
    after = torch.where(there, total[:, :, None], torch.where(low, 0, decayed))
    if padding is not None:
        after = torch.where(padding[:, None, None, None, None], stays[0], after)
        number = torch.where(padding, stays[1], number)
    return output.to(v.dtype), after, number
