"""Timing: interleaved rounds, inputs that do not stay in the cache, medians, and measured ceilings.

On a GPU the calls are captured in a CUDA graph if possible, and its replays are timed with events, so that gaps between
launches do not count. On a CPU only ratios of two candidates of the same run are meaningful.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

CEILINGS = {"cuda": (4 << 30, 8192, torch.bfloat16), "cpu": (64 << 20, 1024, torch.float32)}
"""For the ceilings of a device: bytes to copy, and edge and type of the matrices to multiply."""
CALLS = 10
"""Minimum number of calls in a timed round on a GPU, so that launches and events add little."""


class Timing(NamedTuple):
    """Milliseconds of one call over all rounds: the median, and the 20th and 80th percentiles."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    replayed: bool
    """Whether a CUDA graph was replayed; otherwise the calls were launched one by one."""


def percentile(samples: Sequence[float], percent: float) -> float:
    """Returns the percentile `percent` of the samples, interpolated linearly; raises ValueError without samples."""
    if not samples:
        raise ValueError("samples: expected at least one, found none")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples_ms: Sequence[float], *, replayed: bool = False) -> Timing:
    median, p20, p80 = (percentile(samples_ms, percent) for percent in (50, 20, 80))
    return Timing(median, p20, p80, replayed)


def ratios(timings: dict[str, Timing], base: str) -> dict[str, float | None]:
    """Returns the speed of each relative to `base`, by medians; None for all if `base` was not timed."""
    reference = timings.get(base)
    return {name: reference.median_ms / t.median_ms if reference else None for name, t in timings.items()}


def interleaved(
    candidates: Mapping[str, Sequence[Callable[[], Any]]], device: torch.device, *, rounds: int
) -> dict[str, Timing]:
    """Times candidates in turn, round by round, so that a change of clocks affects all of them.

    Each candidate is a list of the same call on different inputs; a round goes through the list at least once.
    """
    timed = {name: prepare(calls, device) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (run, count, _) in timed.items():
            samples[name].append(elapsed_ms(run, device) / count)
    return {name: summary(samples[name], replayed=timed[name][2]) for name in candidates}


def prepare(calls: Sequence[Callable[[], Any]], device: torch.device) -> tuple[Callable[[], Any], int, bool]:
    """Warms up; returns a round as one function, its number of calls, and whether it is a captured graph."""
    repeats = -(-CALLS // len(calls)) if device.type == "cuda" else 1

    def launch() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    if device.type != "cuda":
        launch()
        return launch, len(calls), False
    side = torch.cuda.Stream()  # capture needs a warm-up on a separate stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()
        alone = not _waits_for_device(launch)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if not alone:
        return launch, repeats * len(calls), False
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError:  # PyTorch does not detect every synchronization
        torch.cuda.set_stream(stream)  # if a capture cannot be ended, its stream stays current
        torch.cuda.synchronize()
        return launch, repeats * len(calls), False
    graph.replay()
    return graph.replay, repeats * len(calls), True


def _waits_for_device(launch: Callable[[], Any]) -> bool:
    """Whether the host waits for the device in `launch`.

    Checked first: a failed capture breaks the random generator.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def dispatch_us(calls: Sequence[Callable[[], Any]], *, rounds: int = 20) -> float:
    """Returns the host's microseconds to launch one call on a GPU, without waiting for it; median over the rounds."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in itertools.islice(itertools.cycle(calls), CALLS):
            call()
        samples.append((time.perf_counter() - start) * 1e6 / CALLS)
    torch.cuda.synchronize()
    return percentile(samples, 50)


def elapsed_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Returns milliseconds of one call of `run`, until its work on the device ends."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1000
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def copies(moved: int, device: torch.device) -> list[Callable[[], Any]]:
    """Returns copies that together read and write `moved` bytes, of enough tensors to exceed a GPU's cache."""
    size = max(moved // 2, 1)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = min(2 * cache // max(moved, 1) + 2, 64)

    def one() -> Callable[[], Any]:
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [one() for _ in range(count)]


def launched_ms(calls: Sequence[Callable[[], Any]], device: torch.device, *, rounds: int = 5) -> float:
    """Returns median milliseconds of one call launched kernel by kernel, as for a peer that cannot be captured."""

    def run() -> None:
        for call in itertools.islice(itertools.cycle(calls), CALLS):
            call()

    run()
    return percentile([elapsed_ms(run, device) / CALLS for _ in range(rounds)], 50)


def kernels_of(call: Callable[[], Any]) -> int:
    """Returns the number of kernels, copies and fills that one call runs on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ())


def peak_mib(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the peak MiB of tensors that `run` allocates; on a CPU PyTorch's profiler counts them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0)) / 2**20


def ceilings(device: torch.device) -> dict[str, float]:
    """Returns GB/s (read + written) of a large copy and TFLOP/s of a large product; bfloat16 on a GPU, else float32."""
    copied, edge, dtype = CEILINGS[device.type]
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    calls = {"copy": [lambda: target.copy_(source)], "product": [lambda: torch.mm(left, right, out=out)]}
    timings = interleaved(calls, device, rounds=10)
    return {
        "copy_gb_per_s": 2 * copied / timings["copy"].median_ms / 1e6,
        "matmul_tflop_per_s": 2 * edge**3 / timings["product"].median_ms / 1e9,
    }
