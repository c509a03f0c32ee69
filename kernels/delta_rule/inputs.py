"""What delta_rule accepts, said before anything is read: a kernel would read beyond a tensor in silence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqlong.kernels.inputs import four_axes, heads_of_groups, needed, one_type, shaped, token_marks

#: What becomes of beta before it is used, in the order in which ops know them by number.
BETA = ("none", "sigmoid", "double_sigmoid")
#: What becomes of the gate.
GATE = ("log_decay", "softplus")


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gate: Tensor | None,
    *,
    beta_activation: str = "none",
    gate_activation: str = "log_decay",
    rate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> None:
    """Raise a ValueError that names the argument, what was found and what was expected; shapes as in the README."""
    needed(op, {"q": q, "k": k, "v": v, "beta": beta})
    four_axes(op, {"q": q, "k": k, "v": v})
    (rows, length, groups, width), (heads, value_width) = q.shape, v.shape[2:]
    heads_of_groups(op, heads, groups)
    one_type(op, ("q", q), ("k", k))
    one_of(op, "beta_activation", beta_activation, BETA)
    one_of(op, "gate_activation", gate_activation, GATE)
    if gate_activation == "softplus":
        if gate is None or rate is None:
            missing = "gate" if gate is None else "rate"
            raise ValueError(f"{op} needs {missing} for gate_activation='softplus', found None")
    elif rate is not None or gate_bias is not None:
        found = "rate" if rate is not None else "gate_bias"
        raise ValueError(f"{op} uses {found} with gate_activation='softplus' only, found it with '{gate_activation}'")
    by_channel = gate is not None and gate.dim() == 4
    bias_by_channel = by_channel and gate_bias is not None and gate_bias.dim() == 2
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "k": (k, (rows, length, groups, width)),
        "v": (v, (rows, length, heads, value_width)),
        "beta": (beta, (rows, length, heads)),
        "gate": (gate, (rows, length, heads, width) if by_channel else (rows, length, heads)),
        "rate": (rate, (heads,)),
        "gate_bias": (gate_bias, (heads, width) if bias_by_channel else (heads,)),
        "initial_state": (initial_state, (rows, heads, width, value_width)),
    }
    shaped(op, expected)
    token_marks(op, {"starts": starts}, (rows, length), {"q": q})


def one_of(op: str, name: str, value: str, known: Sequence[str]) -> None:
    """Raise a ValueError if ``value`` is not one of the known words."""
    if value not in known:
        raise ValueError(f"{op} needs {name} to be one of {', '.join(known)}, found '{value}'")
