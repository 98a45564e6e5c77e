"""Computes cross-entropy losses from a chunk of logits and replaces the logits by their gradient.

    loss[m]        = log Σ exp(logits[m]) − (1−s)·logits[m, target[m]] − s·mean(logits[m])
    gradient[m, v] = (softmax(logits[m])[v] − (1−s)·[v = target[m]] − s/V) · upstream[m]

A program processes one row in two passes: the first computes the maximum, the sum of exponentials (a running sum if a
row is longer than a block) and reads the target's logit; the second writes. Exponentials and sums are float32. The loss
and the gradient of a row with `ignore_index` are 0; those of a row with a target out of range are NaN.

The gradient overwrites the logits without a barrier: each thread overwrites only logits that it read itself. All
threads read the target's logit, but it is part of the sum of exponentials, on which every gradient depends.

M rows, V codes.
"""

import torch

from . import launch, reference
from .launch import jit, tl


@jit
def above(largest):
    """Returns what to subtract before an exponential: the maximum; 0 if it is −inf, where the difference is NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@jit
def exponential(difference):
    """Returns exp(difference). Base 2 flushes results below 1e-38 to 0, which takes three instructions less.

    The maximum's difference is 0 and its exponential 1, without a rounding error: so the logits are not multiplied
    first, although that would fuse with the subtraction.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.exp2(difference * LOG2_E)


@jit(do_not_specialize=["ignore_index"])
def _softmax_gradient_kernel(
    loss_ptr,
    logits_ptr,
    target_ptr,
    upstream_ptr,
    codes,
    ignore_index,
    UPSTREAM_STRIDE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * codes
    target = tl.load(target_ptr + row)
    upstream = 1.0
    if UPSTREAM_STRIDE is not None:  # before the logits, so that the row waits for memory once
        upstream = tl.load(upstream_ptr + row * UPSTREAM_STRIDE)
    counted = target != ignore_index
    exists = (target >= 0) & (target < codes)
    picked = tl.load(logits_ptr + tl.where(exists, target, 0)).to(DTYPE)
    target = tl.where(exists, target, -1).to(tl.int32)
    column = tl.arange(0, BLOCK)
    lowest = float("-inf")

    logits = tl.load(logits_ptr + column, mask=column < codes, other=lowest).to(DTYPE)
    # does not change the maximum, but no thread adds exponentials before it has read the target's logit
    largest = tl.maximum(tl.max(logits, axis=0), picked)
    exponentials = exponential(logits - above(largest))
    sum_exp = tl.sum(exponentials, axis=0)
    total = tl.sum(tl.where(column < codes, logits, 0.0), axis=0)
    if not ONE_BLOCK:
        for start in range(BLOCK, codes, BLOCK):
            mask = start + column < codes
            logits = tl.load(logits_ptr + start + column, mask=mask, other=lowest).to(DTYPE)
            larger = tl.maximum(largest, tl.max(logits, axis=0))
            sum_exp = sum_exp * exponential(largest - above(larger)) + tl.sum(
                exponential(logits - above(larger)), axis=0
            )
            largest = larger
            total += tl.sum(tl.where(mask, logits, 0.0), axis=0)

    loss = largest + tl.log(sum_exp) - (1 - SMOOTHING) * picked
    if SMOOTHING > 0:
        loss -= SMOOTHING * total / codes
    loss = tl.where(exists, loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))

    if GRADIENT:
        upstream = tl.where(counted, tl.where(exists, upstream, float("nan")), 0.0).to(DTYPE)
        scale = upstream / sum_exp
        shift = SMOOTHING * upstream / codes
        at_target = shift + (1 - SMOOTHING) * upstream
        if ONE_BLOCK:
            gradient = exponentials * scale - tl.where(column == target, at_target, shift)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < codes)
        else:
            for start in range(0, codes, BLOCK):
                mask = start + column < codes
                logits = tl.load(logits_ptr + start + column, mask=mask, other=lowest).to(DTYPE)
                gradient = exponential(logits - above(largest)) * scale
                gradient -= tl.where(start + column == target, at_target, shift)
                tl.store(logits_ptr + start + column, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def softmax_gradient_(
    logits: torch.Tensor,
    target: torch.Tensor,
    upstream: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needs_gradient: bool,
    losses: torch.Tensor,
) -> None:
    """Runs `reference.softmax_gradient_` or its kernel, on the path of the device, and writes losses [M], contiguous.

    `upstream` is a scalar or [M].
    """
    if launch.active_path(logits) != "triton":
        losses.copy_(
            reference.softmax_gradient_(logits, target, upstream, ignore_index, label_smoothing, needs_gradient)
        )
        return
    rows, codes = logits.shape
    block = min(launch.power_of_two(codes), 8192)
    launch.run_kernel(
        _softmax_gradient_kernel,
        rows,
        losses,
        logits,
        target.contiguous(),
        upstream,
        codes,
        ignore_index,
        UPSTREAM_STRIDE=None if upstream is None else upstream.dim(),
        SMOOTHING=label_smoothing,
        GRADIENT=needs_gradient,
        ONE_BLOCK=codes <= block,
        BLOCK=block,
        DTYPE=launch.triton_type(losses.dtype),
        num_warps=launch.warps("softmax_gradient", block, logits.device),
    )
