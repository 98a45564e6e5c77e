"""CUDA graphs and the host's lead over the device: recording work, finding where it waits, limiting what is queued."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Values = dict[str, Tensor]
AHEAD = 2
"""Steps that the host may be ahead of the device: each holds its clips until it is done."""


class Recorder(Protocol):
    """Captures work on a device. `CudaRecorder` is the real one; tests have one for the CPU."""

    def record(self, work: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        """Captures `work` without running it; returns a replay function and the tensors that hold its outputs."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` often enough to be capturable; raises RuntimeError if it waits for the device."""

    def wait(self) -> None:
        """Waits until the device has done everything that is queued."""

    def release(self) -> None:
        """Releases memory that nothing uses anymore."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # the loader's thread decodes meanwhile: what it asks of the driver must break neither the capture nor itself
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                values = work()
        except BaseException:
            torch.cuda.set_stream(stream)  # where a capture cannot be ended, its stream stays the current one
            raise
        return graph.replay, values

    def warm_up(self, work: Callable[[], object]) -> None:
        side = torch.cuda.Stream()  # gradients are added up on the stream that first saw their weights
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
            # asked before recording: a recording that fails leaves allocator and random numbers in a bad state
            waits = waits_for_device(work)
        torch.cuda.current_stream().wait_stream(side)
        if waits:
            raise RuntimeError(waits)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()


def waits_for_device(work: Callable[[], object]) -> str:
    """Does `work`; what PyTorch says of the first place where this thread waits for the device, "" if there is none.

    The debug mode is one for all threads: as an error it would reach the loader, which waits for copies of its own.
    """
    mine, found = threading.get_ident(), []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        # not the notice that the mode is a prototype, which the first call of a process gives
        if threading.get_ident() == mine and "called a synchronizing" in str(message):
            found.append(str(message))

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return found[0] if found else ""


class Lead:
    """Keeps the host at most `AHEAD` steps ahead of the device."""

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        """event: makes an event of the device, of which `record` and `synchronize` are used; a CUDA event."""
        self._event = event or (lambda: torch.cuda.Event(blocking=True))
        self._queued: deque[Any] = deque()

    def wait(self) -> None:
        """Before a step is queued: until fewer than `AHEAD` are."""
        while len(self._queued) >= AHEAD:
            self._queued.popleft().synchronize()

    def queued(self) -> None:
        """After a step was queued."""
        event = self._event()
        event.record()
        self._queued.append(event)
