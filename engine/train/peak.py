"""The rate at which this machine multiplies large matrices: what utilisation is measured against."""

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


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
