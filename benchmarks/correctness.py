"""Every operator's kernels against the same operator in float64: on a GPU, or on the CPU in Triton's interpreter.

A case is right if, for each of its outputs,

    ‖kernel − exact‖ ≤ 2 · ‖plain − exact‖ + floor · ‖exact‖

where `exact` is the PyTorch path in float64 and `plain` is PyTorch in the case's own type, both on the CPU. Integers
must be equal, and every further run must give the same bits. A structural zero (a gradient of an ignored row, of a
weight of 0, of a frame without a target) must be exactly 0: it is 0 for other values of the floats too. A difference
that happens to be 0, such as 102/255 − 0.4, need not be: the GPU rounds a product and a sum once. Memory that an
operator allocates holds NaN beforehand, so that a value that nobody writes shows. Where Triton should run, a case that
launches no Triton kernel is wrong.
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
"""Relative error that an output may have where plain PyTorch has none: float32 sums in another order."""
if os.environ.get("TRITON_INTERPRET") == "1":
    FLOOR[BRAIN] = 2**-7  # the interpreter cuts bfloat16 off instead of rounding it


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory asked for without a value holds NaN (integers: a huge number), so that a value nobody writes shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*arguments: Any, **options: Any) -> Tensor:
            out = allocate(*arguments, **options)
            return out.fill_(float("nan") if out.dtype.is_floating_point else 2**40) if out.numel() else out

        return allocate_poisoned

    new_empty = patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty))
    with new_empty, patch.object(torch, "empty_like", poisoned(torch.empty_like)):
        yield


def in_double(tensor: Tensor) -> Tensor:
    """Bytes as pixels in [0,1]; integers stay."""
    if tensor.dtype == BYTES:
        return tensor.double() / 255
    return tensor.double() if tensor.dtype.is_floating_point else tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """With its strides and the memory around it, which `.to` alone would leave behind."""
    flat = tensor.new_empty(0).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return flat.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def otherwise(tensor: Tensor) -> Tensor:
    """Other values near these, zeros apart; integers stay."""
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
            reason = "another run gave other bits"
        if reason:
            return row | {"error": error, "reason": f"output {place}: {reason}"}
    return row | {"verdict": "right"}


def judge(mine: Tensor, other: Tensor, truth: Tensor, other_truth: Tensor) -> tuple[str, float]:
    """What is wrong with a result ("" if nothing), and its relative error.

    other: plain PyTorch in the case's type; truth: float64; other_truth: float64 for other values of the floats.
    """
    if mine.shape != truth.shape or mine.dtype != other.dtype:
        return f"{mine.dtype} {list(mine.shape)}, expected {other.dtype} {list(truth.shape)}", float("inf")
    if not mine.dtype.is_floating_point:
        return ("", 0.0) if torch.equal(mine, truth) else ("other numbers than the definition's", float("inf"))
    if not (mine[(truth == 0) & (other_truth == 0)] == 0).all():
        return "not 0 where the definition is", float("inf")
    if not torch.equal(mine.isnan(), truth.isnan()):
        return "NaN elsewhere than in the definition", float("inf")
    numbers, usual, truth = (result.double().nan_to_num(0) for result in (mine, other, truth))
    length = truth.norm().item() or 1
    error = (numbers - truth).norm().item() / length
    budget = 2 * (usual - truth).norm().item() / length + FLOOR[mine.dtype]
    return ("" if error <= budget else f"relative error {error:.2g}, budget {budget:.2g}"), error


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7)) and torch.equal(one.isnan(), other.isnan())


def rows(
    device: torch.device, deadline: float, *, runs: int | None = None, subset: bool = False
) -> Iterator[dict[str, Any]]:
    """A verdict for each case; one left out for want of time counts as not checked.

    On a GPU the kernels of all cases are compiled first, in threads.

    Args:
        device: where the operators run.
        deadline: time.monotonic() after which no case is started.
        runs: of each case; default: 20 on a GPU, else 2.
        subset: one case for each kernel and layout.
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
