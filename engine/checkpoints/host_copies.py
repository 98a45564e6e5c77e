"""Copies of a run's state in host memory that is kept from one checkpoint to the next.

On a GPU the memory is pinned, and the copies are queued on the current stream: after the update whose result they hold
and before the next step, whether that step launches its kernels, replays a CUDA graph or, with FSDP2, gathers weights.
The host does not wait for them. The device's next step does, for the time of the transfer: a side stream would save
this time only if every place that changes the state waited for it, and a replayed graph cannot wait in its middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

CHUNK = 2**28
"""Largest block in bytes of host memory that several tensors share. torch rounds pinned blocks up to powers of two."""
FIRST_CHUNK = 2**20
ALIGNMENT = 64
"""Copies start at multiples of this number of bytes."""


class HostBuffers:
    """Holds a copy of each tensor under its name; a later copy under the same name replaces it."""

    def __init__(
        self,
        device: torch.device,
        info: Callable[[str], None],
        *,
        allocate: Callable[..., Tensor] = torch.empty,
        event: Callable[[], Any] | None = None,
    ) -> None:
        """info: receives a line if no pinned memory can be had. allocate, event: replaced in tests."""
        self._pinned = device.type == "cuda"
        self._info, self._allocate = info, allocate
        self._event = event or (lambda: torch.cuda.Event(blocking=True))
        self._places: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Queues a copy; returns the tensor, contiguous, that holds it once the function of `queued` has returned."""
        key = name, tensor.shape, tensor.dtype
        if key not in self._places:
            self._places[key] = self._reserve(tensor)
        return self._places[key].copy_(tensor.detach(), non_blocking=True)

    def queued(self) -> Callable[[], None]:
        """Returns a function that waits, in any thread, until all copies queued so far are in host memory."""
        if not self._pinned:
            return lambda: None
        event = self._event()
        event.record()
        return event.synchronize

    def _reserve(self, tensor: Tensor) -> Tensor:
        needed = tensor.numel() * tensor.element_size()
        if self._used + needed > len(self._chunk):
            double = min(max(2 * len(self._chunk), FIRST_CHUNK), CHUNK)
            self._chunk, self._used = self._memory(max(double, needed)), 0
        part = self._chunk[self._used : self._used + needed]
        self._used += math.ceil(needed / ALIGNMENT) * ALIGNMENT
        return part.view(tensor.dtype).view(tensor.shape)

    def _memory(self, size: int) -> Tensor:
        if self._pinned:
            try:
                return self._allocate(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self._pinned = False
                self._info(
                    f"saving  {size / 2**20:.0f} MiB of pinned host memory cannot be allocated ({first}): checkpoints "
                    "are copied to ordinary memory, for which training waits"
                )
        return self._allocate(size, dtype=torch.uint8)


def new_copy(_: str, whole: Tensor) -> Tensor:
    """Returns a contiguous copy in new memory on the CPU, made before it returns."""
    return whole.to("cpu", copy=True, memory_format=torch.contiguous_format)


def copies(
    tensors: Mapping[str, Tensor], *, keep: bool, to_host: Callable[[str, Tensor], Tensor] = new_copy
) -> dict[str, Tensor]:
    """Returns complete, contiguous copies on the CPU. Every rank must call it; ranks with keep=False get no copies.

    to_host: makes the copy of a tensor from its name and the tensor; by default in new memory.
    """
    copied = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if keep:
            copied[name] = to_host(name, whole)
    return copied
