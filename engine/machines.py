"""Rates and memory of the machine that a run is planned for: of a GPU's data sheet, or measured here."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any, NamedTuple

import torch

from mam2.engine.config.training import TrainConfig, micro_batches_per_step
from mam2.engine.errors import UserError
from mam2.engine.runtime.device import matmul_dtype, pick_device
from mam2.engine.runtime.peak import measured_peak_flops


class GPU(NamedTuple):
    """Specifications of a GPU from its data sheet."""

    name: str
    bf16_tflop_per_s: float
    """Rate of dense bfloat16 products, without sparsity."""
    gb_per_s: float
    memory_gb: float


GPUS = {
    "b200": GPU("NVIDIA B200", 2250, 8000, 180),
    "h200": GPU("NVIDIA H200 SXM", 989, 4800, 141),
    "h100": GPU("NVIDIA H100 SXM", 989, 3350, 80),
    "h100pcie": GPU("NVIDIA H100 PCIe", 756, 2000, 80),
    "a100": GPU("NVIDIA A100 SXM 80 GB", 312, 2039, 80),
    "a10040gb": GPU("NVIDIA A100 PCIe 40 GB", 312, 1555, 40),
    "l40s": GPU("NVIDIA L40S", 362, 864, 48),
    "l4": GPU("NVIDIA L4", 121, 300, 24),
    "a40": GPU("NVIDIA A40", 149.7, 696, 48),
    "a30": GPU("NVIDIA A30", 165, 933, 24),
    "a10": GPU("NVIDIA A10", 125, 600, 24),
    "rtx6000ada": GPU("NVIDIA RTX 6000 Ada", 364, 960, 48),
    "rtxa6000": GPU("NVIDIA RTX A6000", 154.8, 768, 48),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", 209.5, 1792, 32),
    "rtx5080": GPU("NVIDIA GeForce RTX 5080", 112.6, 960, 16),
    "rtx5070ti": GPU("NVIDIA GeForce RTX 5070 Ti", 87.9, 896, 16),
    "rtx5070": GPU("NVIDIA GeForce RTX 5070", 61.7, 672, 12),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 165, 1008, 24),
    "rtx4080": GPU("NVIDIA GeForce RTX 4080", 97.5, 717, 16),
    "rtx4070ti": GPU("NVIDIA GeForce RTX 4070 Ti", 80.2, 504, 12),
    "rtx4070": GPU("NVIDIA GeForce RTX 4070", 58.3, 504, 12),
    "rtx4060": GPU("NVIDIA GeForce RTX 4060", 30.2, 272, 8),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", 71, 936, 24),
    "rtx3080": GPU("NVIDIA GeForce RTX 3080", 59.5, 760, 10),
    "rtx3070": GPU("NVIDIA GeForce RTX 3070", 40.6, 448, 8),
    "rtx3060": GPU("NVIDIA GeForce RTX 3060", 25.5, 360, 12),
    "mi300x": GPU("AMD Instinct MI300X", 1307, 5300, 192),
}
"""NVIDIA's and AMD's data sheets; a GeForce card's rate is twice that of its float32 units, as in NVIDIA's white papers
for bfloat16 with float32 accumulation."""
WITHOUT_BFLOAT16 = {
    "v100",
    "t4",
    "p100",
    "titanv",
    "rtx2080ti",
    "rtx2080",
    "rtx2070",
    "rtx2060",
    "gtx1080ti",
    "gtx1080",
}
"""NVIDIA's cards before Ampere: training there needs float32, for which there is no estimate."""
MAKERS = ("nvidia", "amd", "geforce", "quadro", "tesla", "instinct")
UTILIZATION = {"data sheet": 0.31, "cuda": 0.39, "cpu": 0.5}
"""Default assumption for the share of the peak that a step reaches.

On an H200 a step of mam2-fast with 64 clips reached 38.9 % of the rate of a large product (docs/benchmarks.md), which
itself reached 78 % of the data sheet (772 of 989 TFLOP/s). Other recipes, batches and GPUs are not measured.
"""


def machine_rates(config: TrainConfig, gpu: str, gpus: int, utilization: float) -> dict[str, Any]:
    """Returns the fields of a plan that depend on the machine; arguments and errors as in `plan`."""
    if not 0 <= utilization <= 1:
        raise UserError(f"--utilization is a share from 0 to 1, found {utilization:g}")
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: expected at least 1")
    known = _known(gpu) if gpu else ""
    micro_batches_per_step(config, gpus)
    device = torch.device("cuda") if gpu else pick_device(config.run)
    planned = bool(gpu) and config.run.precision == "auto"  # whatever GPU is here
    dtype = torch.bfloat16 if planned else matmul_dtype(config.run, device)
    if gpu:
        name, tflop_per_s, gb_per_s, memory_gb = GPUS[known]
        if dtype == torch.float32:
            raise UserError("--gpu: its rate is known only for bfloat16; leave run.precision at auto")
        peak, rate, memory = tflop_per_s * 1e12, gb_per_s * 1e9, memory_gb * 1e9 / 2**30
        machine = f"{name} (data sheet)"
    else:
        peak, rate, memory = measured_peak_flops(device, dtype), math.inf, math.inf
        machine = "this machine's CPU (measured product)"
        if device.type == "cuda":
            machine = f"{torch.cuda.get_device_name(device)} (measured product)"
            memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return {
        "dtype": dtype,
        "machine": machine,
        "peak_flops": peak,
        "bytes_per_s": rate,
        "memory_gib": memory,
        "utilization": utilization or UTILIZATION["data sheet" if gpu else device.type],
        "gpus": gpus,
        "cuda": device.type == "cuda",
        "automatic": config.optim.micro_batch == "auto",
    }


def _known(gpu: str) -> str:
    """Returns the key of `GPUS` for a user's spelling; raises UserError with the nearest keys if there is none."""
    name = re.sub(r"[^a-z0-9]", "", gpu.lower())
    for maker in MAKERS:
        name = name.replace(maker, "")
    name = name if name in GPUS or f"rtx{name}" not in GPUS else f"rtx{name}"
    if name in WITHOUT_BFLOAT16:
        raise UserError(
            f"--gpu {gpu}: it has no bfloat16 products, and only these are estimated; cards from Ampere (2020) on have "
            "them. A run there takes --run.precision float32"
        )
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--gpu {gpu}: expected one of {', '.join(GPUS)}, or nothing for this machine{hint}")
    return name
