"""What a device gives and what is taken of it: its rate of multiplying large matrices, and its memory in use."""

from __future__ import annotations

import functools
import time

import torch

EDGES = {"cpu": 1024, "cuda": 8192}
ROUNDS = 8


@functools.cache
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products in `dtype`; measured once a process, in under a second."""
    edge = EDGES[device.type]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # a run's draws do not depend on the measurement
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
    """GiB of a GPU that are in use: also those that DALI, NVDEC and cuDNN take beside PyTorch, and other processes.

    PyTorch keeps what it has once taken, so that its own part is that of its peak.
    """
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 2**30


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
