"""Measures a device: its rate of multiplying large matrices, and its memory in use."""

from __future__ import annotations

import functools
import time

import torch

EDGES = {"cpu": 1024, "cuda": 8192}
ROUNDS = 8


@functools.cache
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of the fastest of a few square products in `dtype`.

    Measured once per process, within a second.
    """
    edge = EDGES[device.type]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the measurement must not affect a run's random draws
        left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    out = left @ right  # to warm up
    seconds = []
    for _ in range(ROUNDS):
        _finish(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return 2 * edge**3 / min(seconds)


def used_gib(device: torch.device) -> float:
    """Returns the GiB of a GPU in use, including memory of DALI, NVDEC, cuDNN and other processes.

    PyTorch keeps its allocated memory, so that its share is that of its peak.
    """
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
