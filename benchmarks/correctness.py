"""Every operator's kernels against the same operator in float64: on a GPU, or on the CPU in Triton's interpreter.

A case is right if, for each of its outputs,

    ‖kernel − exact‖ ≤ 2 · ‖plain − exact‖ + floor · ‖exact‖

where `exact` is the PyTorch path in float64 and `plain` is PyTorch in the case's type, both on the CPU. Integers must
be equal, and every repeated run must give the same bits. A structural zero (the gradient of an ignored row, of a weight
of 0, of a frame without a target) is 0 for all values of the inputs, and must be exactly 0. A difference that is 0 only
for these values, such as 102/255 − 0.4, need not be 0, because the GPU rounds a product and a sum only once. Memory
that an operator allocates is filled with NaN first, so that an unwritten value is found. Where Triton should run, a
case that launches no Triton kernel is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.cases import BRAIN, BYTES, DOUBLE, HALF, SINGLE, Case, cases, few
from benchmarks.launches import compile_ahead, counted, fallback
from mam2.kernels import active_path

CPU = torch.device("cpu")
FLOOR = {SINGLE: 5e-6, HALF: 5e-6, BRAIN: 5e-6, DOUBLE: 1e-12}
"""Relative error that an output may have if plain PyTorch has none: float32 sums in another order."""
if os.environ.get("TRITON_INTERPRET") == "1":
    FLOOR[BRAIN] = 2**-7  # the interpreter truncates to bfloat16 instead of rounding


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialized allocations with NaN (integers: a huge number), so that an unwritten value is found."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*arguments: Any, **options: Any) -> Tensor:
            out = allocate(*arguments, **options)
            return out.fill_(float("nan") if out.dtype.is_floating_point else 2**40) if out.numel() else out

        return allocate_poisoned

    new_empty = patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty))
    with new_empty, patch.object(torch, "empty_like", poisoned(torch.empty_like)):
        yield


def in_double(tensor: Tensor) -> Tensor:
    """Converts to float64: bytes become pixels in [0,1]; other integers stay unchanged."""
    if tensor.dtype == BYTES:
        return tensor.double() / 255
    return tensor.double() if tensor.dtype.is_floating_point else tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor with its strides and the memory around it, which `.to` alone would drop."""
    flat = tensor.new_empty(0).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return flat.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def otherwise(tensor: Tensor) -> Tensor:
    """Returns other values close to these; zeros and integers stay unchanged."""
    if not tensor.dtype.is_floating_point:
        return tensor
    generator = torch.Generator().manual_seed(7)
    return tensor * (1 + 0.01 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))


def verdict(case: Case, device: torch.device, runs: int) -> dict[str, Any]:
    """{"check": name, "verdict": "right"} with the largest relative error, or "wrong" with the reason."""
    row: dict[str, Any] = {"check": case.name, "verdict": "wrong"}
    plain = case.plain or case.run
    wide = {name: in_double(tensor) for name, tensor in case.inputs.items()}
    with patch.dict(os.environ, MAM2_KERNELS="pytorch"):
        exact = plain(DOUBLE, **wide)
        near = plain(DOUBLE, **{name: otherwise(tensor) for name, tensor in wide.items()})
        usual = plain(case.dtype, **case.inputs)
    try:
        inputs = {name: on_device(tensor, device) for name, tensor in case.inputs.items()}
        found = [case.run(case.dtype, **inputs) for _ in range(runs)]
    except Exception as problem:
        return row | {"reason": f"{type(problem).__name__}: {problem}"[:300]}
    for place, (truth, other_truth, other, *mine) in enumerate(zip(exact, near, usual, *found, strict=True)):
        reason, error = judge(mine[0].cpu(), other, truth, other_truth)
        row["error"] = max(error, row.get("error", 0.0))
        if not reason and any(not same_bits(mine[0], again) for again in mine[1:]):
            reason = "a repeated run gave different bits"
        if reason:
            return row | {"error": error, "reason": f"output {place}: {reason}"}
    return row | {"verdict": "right"}


def judge(mine: Tensor, other: Tensor, truth: Tensor, other_truth: Tensor) -> tuple[str, float]:
    """Returns what is wrong with a result ("" if nothing), and its relative error.

    other: plain PyTorch in the case's type; truth: float64; other_truth: float64 for other values of the floats.
    """
    if mine.shape != truth.shape or mine.dtype != other.dtype:
        return f"{mine.dtype} {list(mine.shape)}, expected {other.dtype} {list(truth.shape)}", float("inf")
    if not mine.dtype.is_floating_point:
        return ("", 0.0) if torch.equal(mine, truth) else ("numbers differ from the definition's", float("inf"))
    if not (mine[(truth == 0) & (other_truth == 0)] == 0).all():
        return "not 0 where the definition is 0", float("inf")
    if not torch.equal(mine.isnan(), truth.isnan()):
        return "NaN in other places than in the definition", float("inf")
    numbers, usual, truth = (result.double().nan_to_num(0) for result in (mine, other, truth))
    length = truth.norm().item() or 1
    error = (numbers - truth).norm().item() / length
    budget = 2 * (usual - truth).norm().item() / length + FLOOR[mine.dtype]
    return ("" if error <= budget else f"relative error {error:.2g}, budget {budget:.2g}"), error


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether both are equal; NaN equals NaN."""
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7)) and torch.equal(one.isnan(), other.isnan())


def rows(
    device: torch.device, deadline: float, *, runs: int | None = None, subset: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields a verdict per case; a case that did not run in time counts as not checked.

    On a GPU the kernels of all cases are compiled first, in threads.

    Args:
        device: device of the operators.
        deadline: time.monotonic() after which no case starts.
        runs: runs of each case; default: 20 on a GPU, else 2.
        subset: only one case per kernel and layout.
    """
    torch.manual_seed(0)
    path, runs = active_path(device), runs or (20 if device.type == "cuda" else 2)
    chosen = few(cases(device)) if subset else list(cases(device))
    with poisoned_memory():
        if device.type == "cuda":
            start = time.monotonic()
            kernels = compile_ahead(functools.partial(_run, case, device) for case in chosen)
            row = {"check": f"{kernels} kernels compiled ahead", "verdict": "right", "path": path}
            yield row | {"seconds": time.monotonic() - start}
        for case in chosen:
            if time.monotonic() > deadline:
                yield {"check": case.name, "path": path, "verdict": "skipped", "reason": "out of time"}
                continue
            with counted() as counter:
                row = verdict(case, device, runs)
            if row["verdict"] == "right" and (reason := fallback(device, counter)):
                row |= {"verdict": "wrong", "reason": reason}
            yield row | {"path": "triton" if counter.names else "pytorch", "launches": len(counter.names) // runs}


def _run(case: Case, device: torch.device) -> None:
    case.run(case.dtype, **{name: on_device(tensor, device) for name, tensor in case.inputs.items()})
