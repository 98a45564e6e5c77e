"""Matrix products of a linear head whose outputs exist only for some rows at a time.

A chunk of rows is what exists at a time: large enough to fill a GPU, or small enough for a CPU's cache. On an H200,
chunks that stay in the L2 cache were slower than larger ones in memory: each takes more launches and smaller products.

M rows, D width, V outputs.
"""

from collections.abc import Iterator, Sequence

import torch

from . import launch

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of hidden, weight and bias."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_gradients(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, needs: Sequence[bool]) -> Gradients:
    """Returns memory for the gradient of hidden in `dtype`, and of weight and bias in float32; empty if not needed."""
    wide = accumulation_dtype(dtype)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs[1] else (0,), dtype=wide),
        weight.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=wide),
    )


def compute_type(hidden: torch.Tensor, **others: torch.Tensor | None) -> torch.dtype:
    """Returns the type of a head's products: the autocast type under autocast, else that of hidden.

    Raises:
        ValueError: another tensor, such as weight=…, is on another device or of another type.
    """
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected the device of hidden ({hidden.device}), found {tensor.device}")
        if tensor is not None and tensor.dtype != hidden.dtype and not autocast:
            raise ValueError(f"{name}: expected the type of hidden ({hidden.dtype}), found {tensor.dtype}")
    return torch.get_autocast_dtype(kind) if autocast else hidden.dtype


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Divides start to stop into slices of `step`; the last one may be shorter."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def linear_into(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Writes hidden [M,D] · weightᵀ [D,V] + bias [V] into out [M,V]; all have one type."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds left · right to total, in the type of total, which is float32 or float64.

    On NVIDIA GPUs from sm_80 on, half-precision products are summed in float32 in one pass; elsewhere they are rounded
    once before they are added.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif launch.wide_sums(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif launch.wide_products(total.device):
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += torch.mm(left, right)


def add_column_sums(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds the sum over rows [M,V] to total [V], in the type of total."""
    total += rows.sum(dim=0, dtype=total.dtype)
