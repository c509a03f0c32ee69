"""What vector_decay accepts, said before anything is read: a kernel would read beyond a tensor in silence."""

from __future__ import annotations

import math

from torch import Tensor

from seqlong.kernels.inputs import four_axes, is_here, needed, one_type, shaped, token_marks

#: How a gate becomes a decay; ``gates.py`` has the formulas.
ACTIVATIONS = ("log_decay", "logsigmoid", "lower_bound")


def check(
    op: str,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    gate: Tensor,
    activation: str,
    divisor: float,
    *,
    lower_bound: Tensor | None = None,
    bonus: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> None:
    """Raise a ValueError that names the argument, what was found and what was expected."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op} has no activation '{activation}'; it has {', '.join(ACTIVATIONS)}")
    if activation != "logsigmoid" and divisor != 1.0:
        raise ValueError(f"{op} has a divisor with activation 'logsigmoid' only, found {divisor} with '{activation}'")
    if not (math.isfinite(divisor) and divisor > 0):
        raise ValueError(f"{op} needs a positive divisor, found {divisor}")
    bounded = activation == "lower_bound"
    if bounded != (lower_bound is not None):
        found = "none" if lower_bound is None else "one"
        raise ValueError(f"{op} needs lower_bound with activation 'lower_bound' and no other, found {found} with "
                         f"'{activation}'")  # fmt: skip
    if bounded != (k is None):
        wanted = "makes k itself: pass k=None" if bounded else "needs k, found None"
        raise ValueError(f"{op} with activation '{activation}' {wanted}")
    needed(op, {"q": q, "v": v, "gate": gate})
    four_axes(op, {"q": q, "k": k, "v": v, "gate": gate})
    (rows, length, heads, width), value_width = q.shape, v.shape[3]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "v": (v, (rows, length, heads, value_width)),
        "k": (k, (rows, length, heads, width)),
        "gate": (gate, (rows, length, heads, width)),
        "lower_bound": (lower_bound, (heads, width)),
        "bonus": (bonus, (heads, width)),
        "initial_state": (initial_state, (rows, heads, width, value_width)),
    }
    shaped(op, expected)
    if k is not None:
        one_type(op, ("q", q), ("k", k))
    token_marks(op, {"starts": starts}, (rows, length), {"q": q})
    # On a GPU looking would wait for it. A bound of 1, where rounding may lead, neither forgets nor writes.
    if lower_bound is None or lower_bound.device.type != "cpu" or not is_here(lower_bound):
        return
    if not bool(((lower_bound >= 0) & (lower_bound <= 1)).all()):
        least, most = lower_bound.aminmax()
        raise ValueError(f"{op} needs lower_bound in [0, 1), the least decay, found {least:.4g} to {most:.4g}")
