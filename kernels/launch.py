"""Which path runs, and how each Triton kernel is launched.

The path is chosen from the device of the tensors: CUDA (and ROCm) goes through Triton, every other device
through PyTorch. `MAM2_KERNELS=triton|pytorch` forces one; `triton` on CPU tensors needs Triton's interpreter
(`TRITON_INTERPRET=1` before the first import).
"""

import contextlib
import functools
import importlib.resources
import json
import os
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform, and the PyTorch path needs none; annotations of kernels still read tl
    triton, tl = None, SimpleNamespace(constexpr=None, int32=None, int64=None)  # type: ignore[assignment]

PATHS = ("triton", "pytorch")


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, or the bare function where Triton is missing, so that every module can be imported.

    `options` are Triton's; with them this is called first and decorates what it returns.
    """
    if function is None:
        return functools.partial(jit, **options)
    return triton.jit(function, **options) if triton is not None else function


def active_path(where: torch.Tensor | torch.device | str) -> str:
    """Says which implementation runs for a tensor or a device: "triton" or "pytorch".

    Raises:
        ValueError: MAM2_KERNELS holds something else than a path.
        RuntimeError: the path needs Triton and Triton cannot be imported.
    """
    device = where.device if isinstance(where, torch.Tensor) else torch.device(where)
    path = os.environ.get("MAM2_KERNELS") or ("triton" if device.type == "cuda" else "pytorch")
    if path not in PATHS:
        raise ValueError(f"MAM2_KERNELS: expected one of {', '.join(PATHS)}, found {path!r}")
    if path == "triton" and triton is None:
        raise RuntimeError(
            f"mam2.kernels runs on {device.type} through Triton, which cannot be imported: install `triton` "
            "for this build of PyTorch, or set MAM2_KERNELS=pytorch for the slower path"
        )
    return path


_DATA = json.loads(importlib.resources.files(__package__).joinpath("launch_table.json").read_text(encoding="utf-8"))
WARPS: dict[str, dict[str, list[list[int]]]] = _DATA["warps"]
"""Launch tables: architecture -> kernel -> [[largest block of values, warps], …], written by benchmarks/tune.py.

The last row serves every larger block; a kernel that an architecture does not name takes the rows of "default".
"""

CHUNK_BYTES: dict[str, int] = _DATA["chunk_bytes"]
"""Architecture -> logits of linear_cross_entropy held at a time: what stays in the cache (L2 of a GPU, L3 of a CPU)."""


@functools.cache
def architecture(device: torch.device) -> str:
    """Of a GPU, as "sm_90" or "gfx942"; of any other device, its type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def table_for(device: torch.device) -> str:
    """Name of the launch table that a device takes: its architecture's, else "default"."""
    name = architecture(device)
    return name if name in WARPS else "default"


def warps(kernel: str, block: int, device: torch.device, *, scattered: bool = False) -> int:
    """Warps of a program of `kernel` that works on `block` values; twice as many if each has an address of its own.

    Raises:
        ValueError: a kernel without a row in launch_table.json.
    """
    table = WARPS[table_for(device)].get(kernel) or WARPS["default"].get(kernel)
    if table is None:
        known = ", ".join(sorted(WARPS["default"]))
        raise ValueError(f"kernel: expected one that launch_table.json lists ({known}), found {kernel!r}: add it there")
    count = next((count for largest, count in table if block <= largest), table[-1][1])
    return 2 * count if scattered else count


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


GPU_ROWS = 1024
"""Least rows of a chunk on a GPU: with fewer, reading the weight takes longer than multiplying by it."""


def chunk_rows(codes: int, dtype: torch.dtype, device: torch.device, width: int = 0) -> int:
    """Rows of logits [rows,codes] to hold at a time, a multiple of 128.

    Every chunk reads the weight [codes,width] three times; on a GPU its logits therefore take at least as many bytes.
    """
    rows, least = CHUNK_BYTES.get(architecture(device), CHUNK_BYTES["default"]) // (codes * dtype.itemsize), 128
    if device.type == "cuda":
        least = max(GPU_ROWS, -(-width // 128) * 128)
    return max(rows // 128 * 128, least)


def half_sums() -> bool:
    """Whether products may add up in float16."""
    return torch.backends.cuda.matmul.allow_fp16_accumulation


def wide_products(device: torch.device) -> bool:
    """Whether `torch.mm(..., out_dtype=float32)` of half types runs there: on GPUs from sm_80 on, unless `half_sums`."""
    if device.type != "cuda" or half_sums():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def triton_type(dtype: torch.dtype) -> Any:
    """The Triton type of a PyTorch type."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def run(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Launches `programs` programs on the device of the first argument, a tensor; none launches nothing."""
    if programs == 0:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Triton 3.10 turns the fusing of multiplication and addition off unless asked for
        kernel[(programs,)](*arguments, **meta, enable_fp_fusion=True)
