"""Times the first training step, which compiles: the whole model, or every kind of block once (`run.compile_blocks`).

    python -m benchmarks.first_step [--objective NAME] [--batch N] [--precision …] [--ways …]

Every measurement is a process with a folder of its own for the compiled code: empty the first time ("cold"), and as the
first process left it the second time ("warm"). The seconds are those of one step, without imports and building the
model. The model is that of `benchmarks.bench_step`: ViT-B on a GPU, ViT-S on 16 frames of 112² on a CPU.

`--here` measures one way in this process and leaves its code in the usual cache, where `bench_step` and `make gpu` find
it: several such processes at the same time prepare a measurement on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_step import choose_attention, ours
from benchmarks.report import table
from benchmarks.step_sizes import OBJECTIVES, SMALL, sized

WAYS = ("eager", "compiled blocks", "compiled")
COLUMNS = ("objective", "batch", "precision", "step", "cold_s", "warm_s")
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def first_step_seconds(objective: str, batch: int, precision: str, way: str) -> float:
    """Returns the seconds of the first step in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = sized(objective, None if device.type == "cuda" else SMALL, precision)
    candidate = ours(config, batch, device, way, choose_attention(config, batch, device)[0])
    began = time.monotonic()
    candidate().item()
    return time.monotonic() - began


def in_a_process(objective: str, batch: int, precision: str, way: str, cache: Path) -> float:
    """Returns the same of a new process that stores compiled code in `cache`; raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "benchmarks.first_step", "--here", "--objective", objective, "--batch", str(batch)]
    command += ["--precision", precision, "--ways", way]
    done = subprocess.run(command, env=os.environ | {CACHE: str(cache)}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return float(done.stdout.split()[-1])


def rows(objective: str, batch: int, precision: str, ways: list[str]) -> list[dict[str, object]]:
    """Returns a row per way to compile, with the seconds of a first and a second process."""
    found: list[dict[str, object]] = []
    for way in ways:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (in_a_process(objective, batch, precision, way, Path(cache)) for _ in range(2))
        head = {"objective": objective, "batch": batch, "precision": precision, "step": way}
        found.append(head | {"cold_s": cold, "warm_s": warm})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, default="videomae")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--here", action="store_true", help="measure one way in this process, with the usual cache")
    options = parser.parse_args(arguments)
    given = options.objective, options.batch, options.precision
    if options.here:
        print(first_step_seconds(*given, options.ways[0]))
    else:
        print("seconds of the first step", table(rows(*given, options.ways), COLUMNS), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
