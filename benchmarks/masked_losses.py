"""What the benchmarks of the two masked losses have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.check import Function, Operator
from benchmarks.clips import CLIP_VARIANTS, EPS, Shape, loss_inputs
from mam2.kernels import TubeMask, costs


def masked_loss_operator(
    loss: Callable[..., Tensor], eager: Callable[[Shape, Tensor, Tensor, Tensor], Tensor]
) -> Operator:
    """Returns the benchmark of a masked loss of `mam2.kernels`.

    eager: VideoMAE's way: shape, clip, the masked tokens as numbers or booleans, predictions -> loss. With numbers it
    is the definition.
    """

    def providers(shape: Shape, device: torch.device) -> dict[str, Function]:
        options: dict[str, Any] = {"patch_size": shape.patch, "eps": EPS, **shape.statistics}
        return {
            # as the engine calls it: a TubeMask needs no check for repeated numbers, token numbers do
            "ours": lambda video, masked, pred, **_: loss(pred, video, TubeMask(masked[:, :0], masked), **options),
            "eager": lambda video, booleans, pred, **_: eager(shape, video, booleans, pred),
            "token numbers": lambda video, masked, pred, **_: loss(pred, video, masked, **options),
        }

    return Operator(
        name=loss.__name__,
        inputs=loss_inputs,
        leaves=("pred",),
        definition=lambda shape: lambda video, masked, pred, **_: eager(shape, video, masked, pred),
        providers=providers,
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
