"""What training keeps for the backward pass, in the host's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Bytes below which a tensor stays where it is.
LEAST = 1 << 20


class HostMemory(torch.autograd.graph.saved_tensors_hooks):
    """While it is entered, tensors that are saved for the backward pass go to pinned memory of the host.

    Copies run beside the computation, on a stream of their own: out while the next block runs, and back, the one that
    will be asked for next first, while the block behind it is differentiated. Enter a new one for each forward pass.

    Args:
        least: bytes below which a tensor stays where it is.
        everywhere: also tensors of the CPU, which gains nothing: for tests.
    """

    def __init__(self, least: int = LEAST, everywhere: bool = False) -> None:
        self.least, self.everywhere = least, everywhere
        self.kept: list[Kept] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        super().__init__(self._put, self._get)

    def __enter__(self) -> HostMemory:  # type: ignore[override]
        super().__enter__()
        return self

    def _put(self, tensor: Tensor) -> Any:
        small = tensor.numel() * tensor.element_size() < self.least
        if small or (tensor.is_leaf and tensor.requires_grad) or not (tensor.is_cuda or self.everywhere):
            return tensor
        kept = self.keep(tensor, len(self.kept))
        self.kept.append(kept)
        return kept

    def keep(self, tensor: Tensor, number: int) -> Kept:
        """Begin to move a tensor."""
        return Kept(tensor, number, self._stream(tensor.device))

    def _get(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor = kept.fetch()
        if kept.number and not self.kept[kept.number - 1].fetched:
            self.kept[kept.number - 1].ask()
        return tensor

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Kept:
    """A tensor in the host's memory, and on its way there and back."""

    def __init__(self, tensor: Tensor, number: int, stream: torch.cuda.Stream | None) -> None:
        self.number, self.stream, self.device = number, stream, tensor.device
        self.back: Tensor | None = None
        self.fetched = False
        if stream is None:
            self.host = tensor.clone()
            return
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before the copy is made

    def ask(self) -> None:
        """Begin to bring it back."""
        if self.back is not None:
            return
        if self.stream is None:
            self.back = self.host.clone()
            return
        with torch.cuda.stream(self.stream):  # behind the copy to the host, if that still runs
            self.back = self.host.to(self.device, non_blocking=True)

    def fetch(self) -> Tensor:
        """It, on its device."""
        self.ask()
        tensor, self.back, self.fetched = self.back, None, True
        assert tensor is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            tensor.record_stream(current)
        return tensor
