"""`masked_pixel_loss`, compared with VideoMAE's: standardize every cube, select the masked ones, mean squared error."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.check import Operator
from benchmarks.clips import CLIP_VARIANTS, EPS, Shape, cubes, deviation, loss_inputs, pick, pixels
from mam2.kernels import costs, masked_pixel_loss


def pixel_loss(shape: Shape, video: Tensor, index: Tensor, pred: Tensor) -> Tensor:
    tokens = cubes(pixels(video, shape), shape.patch)
    target = pick((tokens - tokens.mean(2, keepdim=True)) / deviation(tokens), index)
    return F.mse_loss(pred.to(target.dtype), target)


OPERATOR = Operator(
    name="masked_pixel_loss",
    inputs=loss_inputs,
    leaves=("pred",),
    definition=lambda shape: lambda video, masked, pred, **_: pixel_loss(shape, video, masked, pred),
    providers=lambda shape, device: {
        "ours": lambda video, masked, pred, **_: masked_pixel_loss(
            pred, video, masked, patch_size=shape.patch, eps=EPS, **shape.statistics
        ),
        "eager": lambda video, booleans, pred, **_: pixel_loss(shape, video, booleans, pred),
    },
    cost=lambda shape: costs.masked_loss(
        shape.batch,
        shape.masked,
        shape.values,
        clip_bytes=shape.clip_dtype.itemsize,
        pred_bytes=shape.dtype.itemsize,
    ),
    backward_cost=lambda shape: costs.scale_gradient(
        shape.batch * shape.masked, shape.values, item_bytes=shape.dtype.itemsize
    ),
    variants=CLIP_VARIANTS,
)
