"""Timing: interleaved rounds, inputs that do not stay in the cache, medians, and measured ceilings.

On a GPU the calls are captured in a CUDA graph if possible, and its replays are timed with events, so that gaps between
launches do not count. On a CPU only ratios of two candidates of the same run are meaningful.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

CEILINGS = {"cuda": (4 << 30, 8192, torch.bfloat16), "cpu": (64 << 20, 1024, torch.float32)}
"""For the ceilings of a device: bytes to copy, and edge and type of the matrices to multiply."""
CALLS = 10
"""Minimum number of calls in a timed round on a GPU, so that launches and events add little."""
ROUND_MS = 10.0
"""Time of a round on a GPU after which no call is repeated to reach `CALLS`."""
LEAST_ROUNDS = 5


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
    candidates: Mapping[str, Sequence[Callable[[], Any]]],
    device: torch.device,
    *,
    rounds: int,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Times candidates in turn, round by round, so that a change of clocks affects all of them.

    Each candidate is a list of the same call on different inputs; for the calls in a round see `calls_of_a_round`.
    There are at most `rounds` rounds; fewer if the first one shows that they would take more than `seconds` per
    candidate, but not fewer than `LEAST_ROUNDS`.
    """
    timed = {name: prepare(calls, device) for name, calls in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    wanted, done = rounds, 0
    while done < wanted:
        began = time.perf_counter()
        for name, (run, count, _) in timed.items():
            samples[name].append(elapsed_ms(run, device) / count)
        if not done:
            wanted = rounds_within(seconds * max(len(timed), 1), time.perf_counter() - began, most=rounds)
        done += 1
    return {name: summary(samples[name], replayed=timed[name][2]) for name in candidates}


def rounds_within(seconds: float, one: float, *, most: int) -> int:
    """Returns how many rounds of `one` second fit into `seconds`: at least LEAST_ROUNDS if `most` allows them."""
    return int(max(min(most, LEAST_ROUNDS), min(most, seconds / one))) if one > 0 else most


def calls_of_a_round(inputs: int, ms: float, *, waits: bool) -> int:
    """Returns the number of calls in a round on a GPU, from the number of inputs and the milliseconds of a call.

    It is a multiple of the inputs and at least CALLS; but once the calls take ROUND_MS, no call is repeated, and if the
    host waits for the device in each call (`waits`), further inputs are left out too: such a call is limited by the
    host, whatever the cache holds. There are at least two calls.
    """
    enough = math.ceil(ROUND_MS / ms) if ms > 0 else math.inf
    return max(2, int(min(inputs * math.ceil(CALLS / inputs), enough if waits else max(enough, inputs))))


def prepare(calls: Sequence[Callable[[], Any]], device: torch.device) -> tuple[Callable[[], Any], int, bool]:
    """Warms up; returns a round as one function, its number of calls, and whether it is a captured graph."""
    count = len(calls)

    def launch() -> None:
        for call in itertools.islice(itertools.cycle(calls), count):
            call()

    if device.type != "cuda":
        launch()
        return launch, count, False
    side = torch.cuda.Stream()  # capture needs a warm-up on a separate stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
        waits = _waits_for_device(calls[0])
        count = calls_of_a_round(len(calls), elapsed_ms(calls[-1], device), waits=waits)
        launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if waits:
        return launch, count, False
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            launch()
    except RuntimeError:  # PyTorch does not detect every synchronization
        torch.cuda.set_stream(stream)  # if a capture cannot be ended, its stream stays current
        torch.cuda.synchronize()
        return launch, count, False
    graph.replay()
    return graph.replay, count, True


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
    """Returns calls that each read and write `moved` bytes together, of enough tensors to exceed a GPU's cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [copy_of(moved // 2, device) for _ in range(min(2 * cache // max(moved, 1) + 2, 64))]


def copy_of(size: int, device: torch.device) -> Callable[[], Any]:
    """Returns a call that reads `size` bytes, rounded down to 4, and writes as many: it inverts them in one kernel.

    `Tensor.copy_` would be a memcpy. In a CUDA graph, one of 1 GiB runs on the copy engine, which is slower than any
    kernel can be: 2.7 TB/s on an H200, where the same memcpy launched in a stream and this kernel reach 4.2.
    """
    source = torch.randint(-(2**31), 2**31, (max(size // 4, 1),), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return lambda: torch.bitwise_not(source, out=target)


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
    """Returns GB/s (read + written) of a large copy and TFLOP/s of a large product; bfloat16 on a GPU, else float32.

    The copy is `copy_of`: the rate that a kernel can reach.
    """
    copied, edge, dtype = CEILINGS[device.type]
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    calls = {"copy": [copy_of(copied, device)], "product": [lambda: torch.mm(left, right, out=out)]}
    timings = interleaved(calls, device, rounds=10)
    return {
        "copy_gb_per_s": 2 * copied / timings["copy"].median_ms / 1e6,
        "matmul_tflop_per_s": 2 * edge**3 / timings["product"].median_ms / 1e9,
    }
