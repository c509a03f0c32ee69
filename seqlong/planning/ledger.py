"""A training step on tensors without contents: every allocation is written down, and what each operation moves.

Tensors are fake (shapes, types and lifetimes only), the code is the one that trains: so what is live at any moment is
counted, not modelled. Triton kernels are left out, but what their callers allocate for them is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from seqlong import backbone
from seqlong.offload import HostMemory, Kept

#: torch's allocators hand out multiples of this.
GRAIN = 512
#: Kinds of operations: matrix products, softmax attention, kernels of ours in Triton, and the rest, which moves bytes.
KINDS = ("products", "attention", "kernels", "other")


@dataclass
class Moment:
    """The fullest moment of a part of the step.

    Attributes:
        live: bytes of all tensors.
        kept: bytes of those that were made in the forward pass, or before the step but after the model.
        serial: how many storages had been made.
    """

    live: int = 0
    kept: int = 0
    serial: int = 0


@dataclass
class Work:
    """What operations of one kind do.

    Attributes:
        flops: additions and multiplications; 0 where bytes decide.
        moved: bytes read and written.
        calls: launches.
        names: calls by name.
    """

    flops: float = 0.0
    moved: float = 0.0
    calls: int = 0
    names: dict[str, float] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        live: bytes of all tensors made under it that still exist.
        part: name of the part of the step that now runs; set by the caller.
        forward: whether storages made now count as made in the forward pass.
        moments: the fullest moment of each part.
        work: what was done, by kind.
        opaque: ops of ours whose inside could not be followed, and why: their outputs alone are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.kept = self.serial = 0
        self.part, self.forward = "model", False
        self.moments: dict[str, Moment] = {}
        self.work = {kind: Work() for kind in KINDS}
        self.opaque: dict[str, str] = {}
        self._storages: dict[int, tuple[int, bool, int]] = {}

    def serial_of(self, tensor: Tensor) -> int | None:
        """When a tensor's storage was made; None if not under this ledger."""
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[2]

    def clear(self) -> None:
        """Forget moments and work, not what is live."""
        self.moments = {}
        self.work = {kind: Work() for kind in KINDS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = OPDEFS.get(func._schema.name) if func.namespace == "seqlong" else None
        if own is not None and str(func) not in self.opaque:
            try:
                with self:
                    return own._init_fn(*args, **kwargs)
            except (RuntimeError, DataDependentOutputException, UnsupportedOperatorException) as error:
                self.opaque[str(func)] = " ".join(str(error).split())[:200]
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if _compound(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._count(func, args, kwargs, out, given, made)
        for tensor in made:
            self._add(tensor)
        return out

    def launched(self, name: str, values: list[Any]) -> None:
        """A Triton kernel was to run."""
        moved = sum((_bytes(x) for x in {id(v): v for v in values if isinstance(v, Tensor)}.values()), 0.0)
        self._note("kernels", name, 0.0, moved)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self.serial += 1
        self._storages[key] = (size, self.forward, self.serial)
        self.live += size
        self.kept += size if self.forward else 0
        moment = self.moments.setdefault(self.part, Moment())
        if self.live > moment.live:
            moment.live, moment.kept, moment.serial = self.live, self.kept, self.serial
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size, forward, _ = self._storages.pop(key)
        self.live -= size
        self.kept -= size if forward else 0

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        if name.startswith(("empty", "new_empty")):
            return
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        known = {x.untyped_storage()._cdata for x in given}
        if not writes and made and all(x.untyped_storage()._cdata in known for x in made):
            return  # a view
        if "attention" in name and "scaled_dot_product" in name:
            self._note("attention", name, _attention(name, func, args, kwargs), 0.0)
            return
        moved = sum((_bytes(x) for x in (*given, *made)), 0.0)
        if name.startswith("_fused_adam"):
            moved *= 7 / 4  # reads four tensors, writes three of them
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self._note("products", name, float(formula(*args, **kwargs, out_val=out)), moved)
        else:
            self._note("other", name, 0.0, moved)

    def _note(self, kind: str, name: str, flops: float, moved: float) -> None:
        work = self.work[kind]
        work.flops += flops
        work.moved += moved
        work.calls += 1
        work.names[name] = work.names.get(name, 0.0) + (flops if kind == "attention" else moved)


@lru_cache
def _compound(func: Any) -> bool:
    """Whether an op is others in a row: reached under an op of ours, where autograd has not taken it apart."""
    own = any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in ("CPU", "Meta"))
    return bool(func._can_decompose()) and not own


def _bytes(tensor: Tensor) -> float:
    """Read or written once; what is expanded from less, as less."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))


def _attention(name: str, func: Any, args: Any, kwargs: Any) -> float:
    """4 products of the width a pair forward, 10 backward (arXiv 2307.08691); half of the pairs if causal."""
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    q, k, v = named["query"], named["key"], named["value"]
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (0.5 if named.get("is_causal") else 1.0)
    return float((5.0 if name.endswith("backward") else 2.0) * pairs * (q.shape[3] + v.shape[3]))


@contextmanager
def as_on_gpu(ledger: Ledger, processors: int) -> Iterator[None]:
    """Fake tensors take the ways that tensors on a GPU take; kernels are noted and not run.

    Without Triton installed, as on some machines, ops run as they do without it, which keeps nearly the same.
    """
    from seqlong.kernels import runtime

    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any, create: bool = False) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=create))

        def leave_out(kernel: Any, *values: Any, **named: Any) -> None:
            ledger.launched(getattr(kernel, "__name__", "kernel"), [*values, *named.values()])

        if runtime._INSTALLED:
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            for kind in (JITFunction, InterpretedFunction):
                patch(kind, "run", leave_out)
            patch(runtime, "INTERPRETED", True)  # "kernels run here, whatever the device"
        patch(FakeTensor, "is_cuda", True, create=True)
        patch(backbone, "HostMemory", _Elsewhere)
        patch(FakeTensor, "data_ptr", lambda tensor: 0, create=True)
        patch(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=processors))
        patch(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        yield


class _Elsewhere(HostMemory):
    """What goes to the host's memory is not on the GPU, until it comes back."""

    def keep(self, tensor: Tensor, number: int) -> Kept:
        return _Gone(tensor, number)


class _Gone(Kept):
    def __init__(self, tensor: Tensor, number: int) -> None:
        self.number, self.shape, self.dtype = number, tensor.shape, tensor.dtype
        self.back, self.fetched, self.stream = None, False, None

    def ask(self) -> None:
        if self.back is None:
            self.back = torch.empty(self.shape, dtype=self.dtype)
