"""Lists the kernels of a training step by time, as PyTorch's profiler counts them: what to make faster next.

    python -m benchmarks.step_kernels [--objective NAME] [--batch N] [--step WAY] [--lines N]

Needs a GPU. The step is that of `benchmarks.bench_step`.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_step import OBJECTIVES, choose_attention, ours
from benchmarks.report import table
from benchmarks.step_sizes import sized

STEPS = 3
"""Profiled steps."""
WAYS = ("eager", "compiled blocks", "compiled")
COLUMNS = ("ms", "percent", "launches", "kernel")


def kernel_rows(found: list[tuple[str, float]], steps: int) -> list[dict[str, object]]:
    """Returns a row per kernel of (name, microseconds) of all its launches in `steps` steps, the slowest first."""
    sums: dict[str, tuple[int, float]] = {}
    for name, us in found:
        count, total = sums.get(name, (0, 0.0))
        sums[name] = count + 1, total + us
    whole = sum(us for _, us in found)
    return [
        {"ms": us / 1000 / steps, "percent": 100 * us / whole, "launches": count / steps, "kernel": name[:120]}
        for name, (count, us) in sorted(sums.items(), key=lambda item: -item[1][1])
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--step", choices=WAYS, default="compiled")
    parser.add_argument("--lines", type=int, default=70)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("step_kernels: torch sees no GPU; this needs one", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    config = sized(options.objective, None, "bfloat16")
    choices, lines = choose_attention(config, options.batch, device)
    step = ours(config, options.batch, device, options.step, choices)
    for _ in range(3):
        step().item()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    found = [(e.name, e.device_time) for e in profiler.events() or () if e.device_type == on_device]
    print(
        "\n".join(lines),
        f"{len(found) / STEPS:.0f} kernels, {sum(us for _, us in found) / 1000 / STEPS:.1f} ms",
        sep="\n",
    )
    print(table(kernel_rows(found, STEPS)[: options.lines], COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
