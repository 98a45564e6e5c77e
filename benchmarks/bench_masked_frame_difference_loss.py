"""`masked_frame_difference_loss`, compared with VideoMAE's way: difference the whole clip, then a boolean mask."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.check import Operator
from benchmarks.clips import CLIP_VARIANTS, EPS, Shape, cubes, differences, loss_inputs, pick
from mam2.kernels import costs, masked_frame_difference_loss


def difference_loss(shape: Shape, video: Tensor, index: Tensor, pred: Tensor) -> Tensor:
    target = pick(differences(video, shape.patch, shape), index)
    last = torch.zeros(1, 3, *video.shape[2:], dtype=target.dtype, device=video.device)
    last[:, :, -1] = 1
    exists = 1 - pick(cubes(last, shape.patch).expand(shape.batch, -1, -1, -1), index)
    return ((pred.to(target.dtype) - target).square() * exists).sum() / exists.sum()


OPERATOR = Operator(
    name="masked_frame_difference_loss",
    inputs=loss_inputs,
    leaves=("pred",),
    definition=lambda shape: lambda video, masked, pred, **_: difference_loss(shape, video, masked, pred),
    providers=lambda shape, device: {
        "ours": lambda video, masked, pred, **_: masked_frame_difference_loss(
            pred, video, masked, patch_size=shape.patch, eps=EPS, **shape.statistics
        ),
        "eager": lambda video, booleans, pred, **_: difference_loss(shape, video, booleans, pred),
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
