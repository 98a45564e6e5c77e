"""How things are timed: interleaved rounds, inputs that do not stay in the cache, medians, and ceilings.

On a GPU the calls are captured in a CUDA graph where that is possible and its replays timed with events, so that the
gaps between launches are left out. On a CPU only ratios of two candidates of the same run mean something.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

MATMUL_EDGE = 8192
COPY_BYTES = 4 << 30
CALLS = 10
"""Least number of calls in a timed round on a GPU: launches and events weigh little on it."""


class Timing(NamedTuple):
    """Milliseconds of one call over all rounds: the median, and 20 and 80 of 100 are below `p20` and `p80`."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    replayed: bool
    """Whether a CUDA graph was replayed; else the calls were launched one by one."""


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of 100 samples lie, interpolated linearly. ValueError without samples."""
    if not samples:
        raise ValueError("samples: expected at least one, found none")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples_ms: Sequence[float], *, replayed: bool = False) -> Timing:
    return Timing(*(percentile(samples_ms, percent) for percent in (50, 20, 80)), replayed)


def ratios(timings: dict[str, Timing], base: str) -> dict[str, float | None]:
    """How many times as fast as `base` each is, by medians; None for all where `base` was not timed."""
    reference = timings.get(base)
    return {name: reference.median_ms / t.median_ms if reference else None for name, t in timings.items()}


def interleaved(
    candidates: dict[str, Sequence[Callable[[], Any]]], device: torch.device, *, rounds: int
) -> dict[str, Timing]:
    """Times candidates in turn, round by round, so that a change of clocks meets all of them.

    Each candidate is a list of the same call on different inputs; a round goes through the list at least once.
    """
    timed = {name: _prepare(calls, device) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, (run, count, _) in timed.items():
            samples[name].append(elapsed_ms(run, device) / count)
    return {name: summary(samples[name], replayed=timed[name][2]) for name in candidates}


def _prepare(calls: Sequence[Callable[[], Any]], device: torch.device) -> tuple[Callable[[], Any], int, bool]:
    """A round as one function, its number of calls, and whether it is a captured graph. Warms up."""
    repeats = -(-CALLS // len(calls)) if device.type == "cuda" else 1

    def launch() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    if device.type != "cuda":
        launch()
        return launch, len(calls), False
    side = torch.cuda.Stream()  # capture needs a warm-up on a stream of its own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError:  # something in it waits for the device
        torch.cuda.synchronize()
        return launch, repeats * len(calls), False
    graph.replay()
    return graph.replay, repeats * len(calls), True


def elapsed_ms(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call of `run`, to the end of its work on the device."""
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


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that `run` holds at most above what is held before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_gb_per_s(device: torch.device) -> float:
    """GB/s, read plus written, of a large copy within the device's memory."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": [lambda: target.copy_(source)]}, device, rounds=10)["copy"]
    return 2 * COPY_BYTES / timing.median_ms / 1e6


def matmul_tflop_per_s(device: torch.device) -> float:
    """TFLOP/s of a bfloat16 product of two random matrices of 8192 by 8192."""
    left, right = (torch.randn(MATMUL_EDGE, MATMUL_EDGE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(left)
    timing = interleaved({"product": [lambda: torch.mm(left, right, out=out)]}, device, rounds=10)["product"]
    return 2 * MATMUL_EDGE**3 / timing.median_ms / 1e9
