"""Describes the machine that a number belongs to: hardware, installed versions, and wheels brought along."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import processes

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".whl"
"""Wheels for a machine without a network; git ignores the folder."""
PACKAGES = (
    *("mam2", "torch", "triton", "transformers", "xformers", "liger-kernel", "cut-cross-entropy"),
    *("nvidia-dali-cuda130", "nvidia-dali-cuda120", "av", "tyro", "matplotlib", "pytest", "numpy"),
)
COMMIT = "MAM2_COMMIT"
"""Environment variable that names the commit, where the checkout's history does not."""
QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
CLOCKS = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")


def environment(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the environment variables of the sections, and lines about the wheels.

    Wheels in .whl/ are installed into `folder`. mam2 is imported from the checkout, installed or not.
    """
    paths, lines = [str(ROOT)], []
    wheels = sorted(WHEELS.glob("*.whl"))
    if wheels:
        target = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run(
            [*pip, "--target", str(target), *map(str, wheels)], capture_output=True, text=True, check=False
        )
        names = ", ".join(wheel.name.split("-")[0] for wheel in wheels)
        if done.returncode:
            lines.append(f".whl/: pip could not install {names}: {done.stderr.strip()[-300:]}")
        else:
            paths.append(str(target))
            lines.append(f".whl/: {names}")
    else:
        lines.append(".whl/: no wheels there")
    given = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])])}, lines


def describe(device: Any) -> dict[str, Any]:
    """Returns the machine and the versions that a number depends on."""
    import torch

    from mam2.kernels.launch import table_for

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine: dict[str, Any] = {
        "device": "CPU",
        "system": platform.system(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "launch_table": table_for(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": properties.L2_cache_size / 2**20,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return machine


def commit() -> str | None:
    """Returns the value of MAM2_COMMIT, or else the commit of the checkout, with a plus if files differ from it.

    A copy of a checkout on another machine may have an older history than its files.
    """
    if given := os.environ.get(COMMIT):
        return given
    try:
        options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        return head + ("+" if subprocess.run(["git", "status", "--porcelain"], **options).stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Clocks:
    """Clocks, power and temperature of the GPU while a section runs, sampled by nvidia-smi twice per second."""

    def __init__(self, wanted: bool) -> None:
        self._file = tempfile.TemporaryFile() if wanted else None  # noqa: SIM115 (closed with this object)
        self._child = None
        if self._file:
            command = [
                "nvidia-smi",
                f"--query-gpu={','.join(QUERY)}",
                "--format=csv,noheader,nounits",
                "-i",
                "0",
                "-lms",
                "500",
            ]
            try:
                self._child = processes.start(command, stdout=self._file, stderr=subprocess.DEVNULL)
            except OSError:  # no nvidia-smi: no samples, and the report says so
                self._child = None

    def stop(self) -> dict[str, Any]:
        """Stops sampling; returns {"sm_mhz": [minimum, median, maximum], …} of GPU 0, or {} without samples."""
        if self._child is None or self._file is None:
            return {}
        processes.kill_group(self._child)
        self._file.seek(0)
        return summarize(self._file.read().decode(errors="replace"))


def summarize(text: str) -> dict[str, Any]:
    """Returns minimum, median and maximum of each numeric column of nvidia-smi's output."""
    samples: dict[str, list[float]] = {name: [] for name in CLOCKS}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(CLOCKS):
            for name, cell in zip(CLOCKS, cells, strict=True):
                if cell.replace(".", "", 1).isdigit():
                    samples[name].append(float(cell))
    return {name: [min(v), statistics.median(v), max(v)] for name, v in samples.items() if v}
