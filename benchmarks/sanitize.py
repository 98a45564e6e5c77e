"""Every kernel under NVIDIA's compute-sanitizer: `make sanitize`, or `python -m benchmarks.sanitize`.

memcheck finds accesses outside of a tensor (PyTorch's memory cache is off, so that every tensor is a separate
allocation); racecheck finds races in shared memory. Each kernel runs once per layout, on a case of correctness.py.
Exit status 1: a tool found something, a case was wrong, or the time did not suffice for all cases.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
FOUND = 99
"""Exit status of the sanitizer if it finds something."""
LATE = 3
"""Exit status of the cases if the time did not suffice for all of them."""
VERDICTS = {0: "clean", FOUND: "FOUND something", LATE: "clean so far, but NOT ALL cases were reached"}


def find_sanitizer() -> str | None:
    """Returns the path of compute-sanitizer: from PATH, or in the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit))


def check_all(seconds: float, runs: int, subset: bool) -> int:
    """Runs the cases on the GPU; returns 0 if all are right, LATE if some were not reached and the others are right."""
    import torch

    from benchmarks.correctness import rows

    verdicts = list(rows(torch.device("cuda"), time.monotonic() + seconds, runs=runs, subset=subset))
    wrong = [row for row in verdicts if row["verdict"] == "wrong"]
    late = sum(row["verdict"] == "skipped" for row in verdicts)
    print("\n".join([*(f"{row['check']}: {row['verdict']} {row.get('reason', '')}" for row in wrong)]))
    print(f"{len(verdicts) - len(wrong) - late} of {len(verdicts)} right, {late} not reached in {seconds:.0f} s")
    return 1 if wrong else LATE if late else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS[:1], help=f"default: {TOOLS[0]}")
    parser.add_argument("--seconds", type=float, default=240, help="limit for the cases under one tool")
    parser.add_argument("--runs", type=int, default=1, help="runs of each case")
    parser.add_argument("--all", action="store_true", help="every case; default: one per kernel and layout")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return check_all(options.seconds, options.runs, not options.all)
    import torch

    if not torch.cuda.is_available():
        print("sanitize: torch sees no GPU; this check needs one", file=sys.stderr)
        return 2
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer is missing; it comes with the CUDA toolkit (cuda-sanitizer)", file=sys.stderr
        )
        return 2
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    child = [sys.executable, "-m", "benchmarks.sanitize", "--child", "--seconds", str(options.seconds)]
    child += ["--runs", str(options.runs), *["--all"] * options.all]
    status = 0
    for tool in options.tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *child]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        print(f"{tool}: {VERDICTS.get(code, f'FAILED with exit status {code}')}", flush=True)
        status = status or int(code != 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
