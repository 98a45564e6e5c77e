"""Every kernel under NVIDIA's compute-sanitizer: `make sanitize`, or `python -m benchmarks.sanitize`.

memcheck finds accesses outside of a tensor (PyTorch's caching of memory is off, so that every tensor is an allocation),
racecheck races in shared memory. The kernels run through the cases of correctness.py. Exit status 1: the tool found
something, a case was wrong, or not all of them were reached in time.
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
"""Exit status of the sanitizer for what it finds."""


def find_sanitizer() -> str | None:
    """Its path: on PATH, or in the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit))


def check_all(seconds: float) -> int:
    """Runs the cases on the GPU; 0 if all were right."""
    import torch

    from benchmarks.correctness import rows

    verdicts = list(rows(torch.device("cuda"), time.monotonic() + seconds))
    bad = [row for row in verdicts if row["verdict"] != "right"]
    print("\n".join([*(f"{row['check']}: {row['verdict']} {row.get('reason', '')}" for row in bad)]))
    print(f"{len(verdicts) - len(bad)} of {len(verdicts)} cases right")
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--seconds", type=float, default=600, help="for the cases under one tool")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return check_all(options.seconds)
    import torch

    if not torch.cuda.is_available():
        print("sanitize: torch sees no GPU, and without one there is nothing to check", file=sys.stderr)
        return 2
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer is missing; it comes with the CUDA toolkit (cuda-sanitizer)", file=sys.stderr
        )
        return 2
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    child = [sys.executable, "-m", "benchmarks.sanitize", "--child", "--seconds", str(options.seconds)]
    status = 0
    for tool in options.tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *child]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        verdict = "clean" if code == 0 else "FOUND something" if code == FOUND else f"FAILED with exit status {code}"
        print(f"{tool}: {verdict}", flush=True)
        status = status or int(code != 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
