"""Backward pass of a loss whose forward pass stored its gradient: multiplies it by the upstream gradient.

    out[r, …] = gradient[r, …] · scale[r]

The product is computed in float32 (float64 for float64), so that a mean over 10^8 float16 values does not underflow
before it is multiplied by the factor of a gradient scaler. In place, rows with a factor of 1 are neither read nor
written, so that `loss.backward()`, whose upstream gradient is 1, costs one launch.
"""

import torch

from . import launch, reference
from .cube import store_rounded
from .launch import jit, tl

PROGRAMS_PER_PROCESSOR = 16
"""Programs of an in-place launch per multiprocessor: enough to fill it, few enough to end at once at a factor of 1."""


@jit(do_not_specialize_on_alignment=["blocks", "total"])
def _scale_gradient_kernel(
    out_ptr,
    gradient_ptr,
    scale_ptr,
    total,
    blocks,
    length,
    BY_ROW: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    stop, end = total, length
    if not BY_ROW:
        scale = tl.load(scale_ptr)
        if IN_PLACE:
            stop = tl.where(scale == 1, 0, total)
    for place in range(tl.program_id(0), stop, tl.num_programs(0)):
        row = (place // blocks).to(tl.int64)
        block = (place % blocks).to(tl.int64) if WIDE else place % blocks
        column = block * BLOCK + tl.arange(0, BLOCK)
        if BY_ROW:
            scale = tl.load(scale_ptr + row)
            if IN_PLACE:
                end = tl.where(scale == 1, 0, length)
        mask = column < end
        gradient = tl.load(gradient_ptr + row * length + column, mask=mask, other=0).to(scale.dtype)
        store_rounded(out_ptr + row * length + column, gradient * scale, mask)


def _launch(gradient: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    gradient, scale = gradient.contiguous(), scale.contiguous()
    by_row, in_place = scale.dim() > 0, out is gradient
    length = gradient.numel() // max(scale.numel(), 1)
    block = min(launch.power_of_two(length), 4096)
    blocks = -(-length // block)
    total = scale.numel() * blocks
    programs = min(total, launch.processors(out.device) * PROGRAMS_PER_PROCESSOR) if in_place else total
    launch.run_kernel(
        _scale_gradient_kernel,
        programs,
        out,
        gradient,
        scale,
        total,
        blocks,
        length,
        BY_ROW=by_row,
        IN_PLACE=in_place,
        WIDE=length >= 2**31,
        BLOCK=block,
        num_warps=launch.warps("scale_gradient", block, gradient.device),
    )


@torch.library.custom_op("mam2::scale_gradient", mutates_args=())
def scale_gradient(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns gradient [R…, …] times scale [R…]: a scalar or one factor per leading row."""
    if launch.active_path(gradient) == "triton":
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        _launch(gradient, scale, out)
        return out
    return reference.scale_gradient(gradient, scale)


@scale_gradient.register_fake
def _(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(gradient.shape)


@torch.library.custom_op("mam2::scale_gradient_", mutates_args=("gradient",))
def scale_gradient_(gradient: torch.Tensor, scale: torch.Tensor) -> None:
    """Multiplies the contiguous gradient [R…, …] in place by scale [R…]; leaves rows with a factor of 1 alone."""
    if launch.active_path(gradient) == "triton":
        _launch(gradient, scale, gradient)
    elif not bool((scale == 1).all()):
        reference.scale_gradient(gradient, scale, out=gradient)


@scale_gradient_.register_fake
def _(gradient: torch.Tensor, scale: torch.Tensor) -> None:
    return None


def scaled(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the saved gradient times scale; overwrites it unless the graph is kept for another backward pass."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return scale_gradient(gradient, scale)
    if not launch.is_plain_cpu(gradient, scale):
        scale_gradient_(gradient, scale)
    elif not bool((scale == 1).all()):
        reference.scale_gradient(gradient, scale, out=gradient)
    return gradient


def multiplied(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns gradient times scale in plain PyTorch, in the type of gradient."""
    wide = torch.promote_types(gradient.dtype, scale.dtype)
    factors = scale.reshape(*scale.shape, *[1] * (gradient.dim() - scale.dim()))
    return (gradient.to(wide) * factors.to(wide)).to(gradient.dtype)
