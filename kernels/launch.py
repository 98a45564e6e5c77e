"""Chooses the implementation (path) and launches the Triton kernels.

The path depends on the device of the tensors: CUDA (and ROCm) uses Triton, every other device uses PyTorch.
`MAM2_KERNELS=triton|pytorch` forces one; `triton` on CPU tensors needs Triton's interpreter (`TRITON_INTERPRET=1`
before the first import).
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
except ImportError:  # no wheel for this platform, the PyTorch path needs none; kernels' annotations still read tl
    triton, tl = None, SimpleNamespace(constexpr=None, int32=None, int64=None)  # type: ignore[assignment]

PATHS = ("triton", "pytorch")


def jit(function: Any = None, **options: Any) -> Any:
    """Applies `triton.jit`, or returns the function unchanged without Triton, so that every module can be imported.

    `options` are those of `triton.jit`; with options, the call returns the decorator.
    """
    if function is None:
        return functools.partial(jit, **options)
    return triton.jit(function, **options) if triton is not None else function


def active_path(where: torch.Tensor | torch.device | str) -> str:
    """Returns which implementation runs for a tensor or a device: "triton" or "pytorch".

    Raises:
        ValueError: MAM2_KERNELS is neither of the two.
        RuntimeError: the path needs Triton, and Triton cannot be imported.
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


PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain_cpu(*tensors: torch.Tensor | None) -> bool:
    """Whether a call can go past PyTorch's dispatcher to the PyTorch path: it costs as much as a small operator.

    It cannot where something records or transforms the call: torch.compile, export, torch.func, fake tensors.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or not tensor.is_cpu):
            return False
    return (os.environ.get("MAM2_KERNELS") or "pytorch") == "pytorch"


_DATA = json.loads(importlib.resources.files(__package__).joinpath("launch_table.json").read_text(encoding="utf-8"))
WARPS: dict[str, dict[str, list[list[int]]]] = _DATA["warps"]
"""Launch tables: architecture -> kernel -> [[largest block of values, warps], …], written by benchmarks/tune.py.

The last row also applies to every larger block. If an architecture does not list a kernel, the rows of "default" apply.
"""

CHUNK_BYTES: dict[str, int] = _DATA["chunk_bytes"]
"""Architecture -> bytes of a head's outputs (logits, predictions) that exist at a time; on a CPU they fit in its L3."""


@functools.cache
def architecture(device: torch.device) -> str:
    """Returns a GPU's architecture, such as "sm_90" or "gfx942"; for any other device its type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def table_for(device: torch.device) -> str:
    """Returns the name of the launch table for a device: its architecture if the tables list it, else "default"."""
    name = architecture(device)
    return name if name in WARPS else "default"


def warps(kernel: str, block: int, device: torch.device, *, scattered: bool = False) -> int:
    """Returns the number of warps for a program of `kernel` that processes `block` values; doubled if `scattered`.

    `scattered`: every value needs a separate address, because the values are not contiguous in memory.

    Raises:
        ValueError: launch_table.json has no row for the kernel.
    """
    table = WARPS[table_for(device)].get(kernel) or WARPS["default"].get(kernel)
    if table is None:
        known = ", ".join(sorted(WARPS["default"]))
        raise ValueError(f"kernel: expected one that launch_table.json lists ({known}), found {kernel!r}: add it there")
    count = next((count for largest, count in table if block <= largest), table[-1][1])
    return 2 * count if scattered else count


@functools.cache
def processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; 1 for any other device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_two(size: int) -> int:
    """Returns the smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


GPU_ROWS = 1024
"""Minimum rows of a chunk on a GPU: with fewer, reading the weight takes longer than multiplying by it."""
TILE = 128
"""Edge of the tile of a product's result that one multiprocessor computes."""


def chunk_rows(codes: int, dtype: torch.dtype, device: torch.device, width: int = 0) -> int:
    """Returns the number of rows of a head's outputs [rows,codes] per chunk, a multiple of 128.

    Every chunk reads the weight [codes,width] twice, for the gradients; on a GPU the chunk's logits are therefore at
    least as large as the weight, and if the chunk is large enough, the tiles of its gradient [rows,width] fill all
    multiprocessors a whole number of times.
    """
    rows, least = CHUNK_BYTES.get(architecture(device), CHUNK_BYTES["default"]) // (codes * dtype.itemsize), TILE
    if device.type == "cuda":
        least = max(GPU_ROWS, _whole_tiles(width))
        wave = TILE * max(processors(device) // max(_whole_tiles(width) // TILE, 1), 1)
        rows = rows // wave * wave or rows
    return max(rows // TILE * TILE, least)


def _whole_tiles(size: int) -> int:
    return -(-size // TILE) * TILE


def half_sums() -> bool:
    """Returns whether matrix products may accumulate in float16."""
    return torch.backends.cuda.matmul.allow_fp16_accumulation


def wide_products(device: torch.device) -> bool:
    """Whether `torch.mm` of half types can return float32 (`out_dtype`): on GPUs from sm_80 on, unless `half_sums`."""
    if device.type != "cuda" or half_sums():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def wide_sums(device: torch.device) -> bool:
    """Whether `torch.addmm` can add a product of half types to a float32 matrix: where `wide_products`, on NVIDIA."""
    return torch.version.hip is None and wide_products(device)


def triton_type(dtype: torch.dtype) -> Any:
    """Returns the Triton type of a PyTorch type."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def run_kernel(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Launches `programs` programs on the device of the first argument, a tensor; 0 programs launch nothing."""
    if programs == 0:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Triton 3.10 fuses multiplication and addition only on request
        kernel[(programs,)](*arguments, **meta, enable_fp_fusion=True)
