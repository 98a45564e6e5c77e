"""CUDA graphs and the host's lead over the device: captures work, finds synchronizations, limits queued steps."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mam2.engine.runtime.distributed import first_line

Values = dict[str, Tensor]
AHEAD = 2
"""Steps that the host may be ahead of the device; each keeps its clips in memory until it is done."""


POOL = 32
"""Streams of a device that `torch.cuda.Stream` returns in turn."""
_OWNED: weakref.WeakKeyDictionary[object, torch.cuda.Stream] = weakref.WeakKeyDictionary()
"""Streams by the live objects that own them."""


def own_stream(owner: object, device: torch.device | None = None) -> torch.cuda.Stream:
    """Returns a stream of a device (default: the current one) that no other live owner has.

    `torch.cuda.Stream` returns the same stream again after 31 others. Work of another thread on a stream that captures
    would become part of the graph. And cuBLAS has one workspace per thread and stream: work during the replay of a
    graph would use the graph's workspace, if it were launched on the stream of the capture.
    """
    taken = set(_OWNED.values())
    for _ in range(POOL):
        stream = torch.cuda.Stream(device)
        if stream not in taken:
            break
    _OWNED[owner] = stream
    return stream


class Recorder(Protocol):
    """Captures work on a device. `CudaRecorder` implements it for CUDA; tests have one for the CPU."""

    def record(self, work: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        """Captures `work` without running it; returns a replay function and the tensors that hold its outputs."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs `work` often enough to be capturable; raises RuntimeError if it waits for the device."""

    def wait(self) -> None:
        """Waits until the device has finished all queued work."""

    def release(self) -> None:
        """Releases unused memory."""


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool and stream, because they never run at the same time.

    Graphs of different recorders may.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = own_stream(self)

    def record(self, work: Callable[[], Values]) -> tuple[Callable[[], None], Values]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # the loader's threads decode meanwhile: their driver calls must neither break the capture nor fail
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                values = work()
        except BaseException:
            torch.cuda.set_stream(stream)  # if a capture cannot be ended, its stream stays current
            raise
        return lambda: self._replay(graph), values

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:  # a method, because the recorder owns the stream
        graph.replay()

    def warm_up(self, work: Callable[[], object]) -> None:
        side = self._stream  # gradients accumulate on the stream that first used their weights
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
            # checked before the capture: a failed capture leaves allocator and random generator in a bad state
            waits = waits_for_device(work)
        torch.cuda.current_stream().wait_stream(side)
        if waits:
            raise RuntimeError(waits)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()


def waits_for_device(work: Callable[[], object]) -> str:
    """Runs `work`; returns PyTorch's message on the first place where this thread waits for the device, or "".

    The debug mode applies to all threads: as an error it would also hit the loader, which waits for its own copies.
    """
    mine, found = threading.get_ident(), []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        # not the notice at a process's first call that the mode is a prototype
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


class Captured:
    """A function of one tensor, replayed as a CUDA graph for each shape, which its first call with the shape captures.

    All calls must be on one stream, and the function may depend on nothing else that changes. What cannot be captured,
    or has another result as a graph, is launched kernel by kernel.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], recorder: Recorder, info: Callable[[str], None], name: str
    ) -> None:
        """info: receives a line for the log about each shape, which begins with `name`."""
        self._function, self._recorder, self._info, self._name = function, recorder, info, name
        self._graphs: dict[tuple[Any, ...], tuple[Tensor, Callable[[], None], Tensor] | None] = {}
        """The graph's input, its replay, and its result by shape and dtype; None: launched kernel by kernel."""

    def __call__(self, argument: Tensor) -> Tensor:
        key = argument.shape, argument.dtype
        if key not in self._graphs:
            self._graphs[key] = self._record(argument)
        graph = self._graphs[key]
        if graph is None:
            return self._function(argument)
        held, replay, result = graph
        held.copy_(argument)
        replay()
        return result.clone()

    def _record(self, argument: Tensor) -> tuple[Tensor, Callable[[], None], Tensor] | None:
        held = argument.clone()

        def work() -> Values:
            return {"result": self._function(held)}

        what = f"{self._name}, {list(argument.shape)}"
        try:
            self._recorder.warm_up(work)
            expected = self._function(held)
            replay, values = self._recorder.record(work)
            replay()
            problem = "" if torch.equal(values["result"], expected) else "a CUDA graph gives another result"
        except RuntimeError as error:  # also out of memory, because a graph reserves memory
            problem = f"it cannot be captured as a CUDA graph ({first_line(error)})"
        self._recorder.release()
        if problem:
            self._info(f"{what}: launched kernel by kernel: {problem}")
            return None
        self._info(f"{what}: one CUDA graph")
        return held, replay, values["result"]


class DeviceTimer:
    """Sums the device's milliseconds for the work that is queued within its context, without waiting for it."""

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        """event: creates a device event with the methods used here; default: a CUDA event."""
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._begun: Any = None
        self._queued: deque[tuple[Any, Any]] = deque()
        self.device_ms = 0.0
        """From the first kernel to the last of each body that is known to be done, with pauses between kernels."""
        self.done = 0
        """Number of these bodies."""

    def __enter__(self) -> None:
        self._begun = self._event()
        self._begun.record()

    def __exit__(self, *_: object) -> None:
        ended = self._event()
        ended.record()
        self._queued.append((self._begun, ended))
        while self._queued and self._queued[0][1].query():
            begun, ended = self._queued.popleft()
            self.device_ms += begun.elapsed_time(ended)
            self.done += 1


class Lead:
    """Keeps the host at most `AHEAD` steps ahead of the device, and times both without a further wait."""

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        """event: creates a device event with the methods used here; default: a CUDA event."""
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True, blocking=True))
        self._begun: Any = None
        self._queued: deque[tuple[Any, Any]] = deque()
        self.waited_s = 0.0
        """Seconds that the host has waited for the device."""
        self.device_ms = 0.0
        """Milliseconds of the device from the beginning of a step to its end, summed over the steps known to be done.
        Includes pauses in which the device waits for the host's next launch."""
        self.done = 0
        """Number of these steps."""

    def wait(self) -> None:
        """Waits until fewer than `AHEAD` steps are queued; call it before queuing a step."""
        start = time.perf_counter()
        while len(self._queued) >= AHEAD:
            begun, ended = self._queued.popleft()
            ended.synchronize()
            self.device_ms += begun.elapsed_time(ended)
            self.done += 1
        self.waited_s += time.perf_counter() - start
        self._begun = self._event()
        self._begun.record()

    def queued(self) -> None:
        """Records that a step was queued."""
        ended = self._event()
        ended.record()
        self._queued.append((self._begun, ended))
