"""`linear_masked_loss`, compared with a linear layer followed by VideoMAE's loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_masked_pixel_loss import pixel_loss
from benchmarks.check import Function, Inputs, Operator
from benchmarks.clips import EPS, Shape, clip, tubes
from mam2.kernels import costs, linear_masked_loss, masked_pixel_loss


def inputs(shape: Shape, device: torch.device) -> Inputs:
    """Returns a clip, its mask as token numbers and booleans, features of the masked tokens, and a decoder's head."""
    mask = tubes(shape, device)
    sizes = {"hidden": (shape.batch, shape.masked, shape.width), "weight": (shape.values, shape.width)}
    leaves = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    leaves["weight"] /= shape.width**0.5
    leaves["bias"] = torch.randn(shape.values, device=device)
    given = {"video": clip(shape, device), "masked": mask.masked, "booleans": mask.as_bool()}
    return given | {name: leaf.to(shape.dtype).requires_grad_() for name, leaf in leaves.items()}


def in_two_steps(shape: Shape) -> Function:
    """Our masked loss after a linear layer, whose predictions stay in memory."""

    def run(video: Tensor, masked: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, **_: Tensor) -> Tensor:
        pred = F.linear(hidden, weight, bias)
        return masked_pixel_loss(pred, video, masked, patch_size=shape.patch, eps=EPS, **shape.statistics)

    return run


def backward_cost(shape: Shape) -> costs.Cost:
    """Cost of scaling both gradients by the upstream gradient; the weight's gradient is summed in float32."""
    hidden = costs.scale_gradient(shape.batch * shape.masked, shape.width, item_bytes=shape.dtype.itemsize)
    weight = costs.scale_gradient(shape.values, shape.width, item_bytes=costs.SINGLE_BYTES)
    return costs.Cost(hidden.bytes_moved + weight.bytes_moved, hidden.flops + weight.flops)


OPERATOR = Operator(
    name="linear_masked_loss",
    inputs=inputs,
    leaves=("hidden", "weight", "bias"),
    definition=lambda shape: (
        lambda video, masked, hidden, weight, bias, **_: pixel_loss(
            shape, video, masked, F.linear(hidden, weight, bias)
        )
    ),
    providers=lambda shape, device: {
        "ours": lambda video, masked, hidden, weight, bias, **_: linear_masked_loss(
            hidden, weight, video, masked, bias, patch_size=shape.patch, eps=EPS, **shape.statistics
        ),
        "two steps": in_two_steps(shape),
        "eager": lambda video, booleans, hidden, weight, bias, **_: pixel_loss(
            shape, video, booleans, F.linear(hidden, weight, bias)
        ),
    },
    cost=lambda shape: costs.linear_masked_loss(
        shape.batch,
        shape.masked,
        shape.values,
        shape.width,
        clip_bytes=shape.clip_dtype.itemsize,
        item_bytes=shape.dtype.itemsize,
    ),
    backward_cost=backward_cost,
)
