"""Hardware counters of the main kernels at the shapes of mam2-fast, read by Nsight Compute (ncu) if it is installed.

python -m benchmarks.counters        # the profiled program; `make gpu` starts it under ncu
"""

from __future__ import annotations

import csv
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import processes
from benchmarks.machine import ROOT

METRICS = {
    "gpu__time_duration.sum": ("us", 1e-3),
    "launch__registers_per_thread": ("registers", 1.0),
    "dram__bytes_read.sum": ("read_mb", 1e-6),
    "dram__bytes_write.sum": ("written_mb", 1e-6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("percent_of_dram", 1.0),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("percent_of_issue", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("percent_of_warps", 1.0),
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": ("sectors_per_load", 1.0),
}
"""ncu's metric in base units (nanoseconds, bytes) -> column and factor."""
KERNELS = "masked_loss|scale_gradient|gather_tubes|softmax_gradient|motion_energy|frame_difference"


def find_ncu() -> str | None:
    """Returns the path of ncu: from PATH, or in the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("ncu") or shutil.which("ncu", path=str(toolkit))


def rows(device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields a row per profiled kernel, or one row with the reason why there is none."""
    row = {"kernel": "all"}
    if device.type != "cuda":
        yield row | {"verdict": "skipped", "reason": "counters need a GPU"}
        return
    ncu = find_ncu()
    if ncu is None:
        yield row | {"verdict": "skipped", "reason": "ncu is not installed"}
        return
    command = [ncu, "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--kernel-name", f"regex:({KERNELS})", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "benchmarks.counters"]
    with tempfile.TemporaryFile() as output:
        ended = processes.run(command, limit=lambda: deadline, cwd=ROOT, environment=os.environ, output=output)
        output.seek(0)
        text = output.read().decode(errors="replace")
    found = list(read(text))
    yield from found
    if ended.code != 0 or not found:
        lines = [line for line in text.splitlines() if "==ERROR==" in line] or text.splitlines()[-1:]
        how = "cut off" if ended.code is None else f"exit status {ended.code}"
        yield row | {"verdict": "skipped", "reason": f"ncu: {how}: {' '.join(lines)[:300]}"}


def read(text: str) -> Iterator[dict[str, Any]]:
    """Returns a row per kernel from ncu's CSV, which has one metric per line after its messages.

    Of several successive launches of one kernel, such as one per chunk of logits, it keeps the first.
    """
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        row = found.setdefault(line["ID"], {"kernel": line["Kernel Name"].split("(")[0].strip("_")})
        if line["Metric Name"] in METRICS:
            column, factor = METRICS[line["Metric Name"]]
            try:
                row[column] = float(line["Metric Value"].replace(",", "")) * factor
            except ValueError:  # "n/a": this GPU has no such counter
                row[column] = None
    for _, launches in itertools.groupby(found.values(), key=lambda row: row["kernel"]):
        yield {**next(launches), "verdict": "right"}


def main() -> int:
    """Calls each operator once to warm up and once under the profiler."""
    from benchmarks.check import outputs, upstream_of
    from benchmarks.clips import Shape
    from benchmarks.operators import OPERATORS

    if not torch.cuda.is_available():
        print("counters: torch sees no GPU", file=sys.stderr)
        return 2
    device, shape, start = torch.device("cuda"), Shape(batch=64), time.monotonic()
    for operator in OPERATORS:
        torch.manual_seed(0)
        inputs, upstream = operator.inputs(shape, device), upstream_of(operator, shape, device)
        ours = operator.providers(shape, device)["ours"]
        outputs(operator, ours, inputs, upstream)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        outputs(operator, ours, inputs, upstream)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"counters: {time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
