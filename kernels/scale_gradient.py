"""Backward pass of a loss whose forward pass stored its gradient: multiplies it by the upstream gradient.

    out[r, …] = gradient[r, …] · scale[r]

The product is computed in float32 (float64 for float64), so that a mean over 10^8 float16 values does not underflow
before it is multiplied by the factor of a gradient scaler.
"""

import torch

from . import launch, reference
from .cube import store_rounded
from .launch import jit, tl


@jit(do_not_specialize_on_alignment=["blocks"])
def _scale_gradient_kernel(out_ptr, gradient_ptr, scale_ptr, blocks, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) // blocks
    column = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < length
    scale = tl.load(scale_ptr + row)
    gradient = tl.load(gradient_ptr + row * length + column, mask=mask, other=0).to(scale.dtype)
    store_rounded(out_ptr + row * length + column, gradient * scale, mask)


def _launch(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    gradient, scale = gradient.contiguous(), scale.contiguous()
    out = torch.empty_like(gradient)
    length = gradient.numel() // max(scale.numel(), 1)
    block = min(launch.power_of_two(length), 4096)
    blocks = -(-length // block)
    meta = {"BLOCK": block, "num_warps": launch.warps("scale_gradient", block, gradient.device)}
    launch.run_kernel(_scale_gradient_kernel, scale.numel() * blocks, out, gradient, scale, blocks, length, **meta)
    return out


@torch.library.custom_op("mam2::scale_gradient", mutates_args=())
def scale_gradient(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns gradient [R…, …] times scale [R…]: a scalar or one factor per leading row."""
    if launch.active_path(gradient) == "triton":
        return _launch(gradient, scale)
    return reference.scale_gradient(gradient, scale)


@scale_gradient.register_fake
def _(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(gradient.shape)
