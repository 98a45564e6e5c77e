"""An H200 in numbers: rates for predictions, with their source, and what was measured on one (results/nvidia-h200)."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

MEASURED = Path(__file__).parent / "results" / "nvidia-h200"

CLIPS = 64
"""Clips of a measured and of a predicted step."""
COPY, GEMM = 4.3e12, 790e12
"""Bytes and bfloat16 operations per second."""
SMS, CLOCK = 132, 1.755e9
REGISTERS, WARPS, BLOCKS, SHARED = 65_536, 64, 32, 233_472
"""Limits of an SM; each block reserves 1 KB of shared memory in addition to its own."""
EXPONENTIALS = 16
"""Exponentials per clock of an SM (CUDA C++ Programming Guide, arithmetic throughput, compute capability 9.0)."""
LATENCY, GAP = 0.8e-6, 1.5e-6
"""Seconds, assumed: latency of a load from busy memory, and the gap between a kernel and the next one that waits for
it."""
LAUNCH = 5e-6
"""Seconds that the host needs at least for a kernel of an operator of PyTorch, assumed."""
NVDEC_ENGINES = 7
"""H200 datasheet."""
NVDEC_FPS, NVDEC_CLOCK = 771, 1.860e9
"""Frames of 1920x1080 in H.264 that an engine decodes per second at this video clock: NVIDIA's NVDEC application note,
Video Codec SDK 13.0. It gives them for Turing; Hopper has the same engine, at its own clock."""
VIDEO_CLOCK = 1.545e9
"""Highest video clock of an H200, as nvidia-smi lists it."""
LINKS = {"NVLink": 450e9, "PCIe 4.0 x16": 25e9}
"""Bytes per second in one direction, assumed for an all-reduce."""


class Profile(NamedTuple):
    """A profiled step of mam2-fast with 64 clips, compiled as a whole."""

    kernels: int
    busy: float
    """Seconds of all kernels."""
    attention: float
    """Seconds of the kernels of attention."""


def step_seconds(file: str, objective: str, way: str) -> float:
    """Returns the median seconds of a step of CLIPS clips, timed in turns with the others if it was.

    Args:
        file: name of a file of results without ".json".
        objective: a name of `bench_step.OBJECTIVES`.
        way: its variant, such as "compiled blocks graph".
    """
    wanted = (objective, CLIPS, way)
    rows = [row for row in _rows(file, "step") if (row["objective"], row.get("batch"), row.get("step")) == wanted]
    return rows[-1]["median_ms"] / 1000  # the row of all ways in turns comes after that of each alone


def operator_seconds(file: str, operator: str) -> float:
    """Returns the median seconds of our operator at its main shape, forward and backward."""
    rows = _rows(file, "operators")
    (found,) = (row for row in rows if (row["operator"], row.get("provider")) == (operator, "ours"))
    return found["median_ms"] / 1000


def _rows(file: str, section: str) -> list[dict[str, Any]]:
    return json.loads((MEASURED / f"{file}.json").read_text(encoding="utf-8"))["sections"][section]["rows"]


def profile() -> Profile:
    """Returns what kernels-of-a-step.txt counts."""
    lines = (MEASURED / "kernels-of-a-step.txt").read_text(encoding="utf-8").splitlines()
    kernels, busy = next(re.findall(r"[\d.]+", line) for line in lines if line.startswith("kernels "))
    of_attention = [float(line.split()[0]) for line in lines if re.search(r"cudnn(_generated|::fusion)", line)]
    return Profile(round(float(kernels)), float(busy) / 1000, sum(of_attention) / 1000)
