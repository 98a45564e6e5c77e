"""What the benchmarks of the two masked losses have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.check import Function, Operator
from benchmarks.clips import CLIP_VARIANTS, EPS, Shape, loss_inputs
from mam2.kernels import costs, launch


def without_pipeline(loss: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Returns the loss as computed by a program per token: by our kernel's other form."""
    with mock.patch.object(launch, "resident_programs", return_value=0):
        return loss(*arguments, **options)


def masked_loss_operator(
    loss: Callable[..., Tensor], eager: Callable[[Shape, Tensor, Tensor, Tensor], Tensor]
) -> Operator:
    """Returns the benchmark of a masked loss of `mam2.kernels`.

    eager: VideoMAE's way: shape, clip, the masked tokens as numbers or booleans, predictions -> loss. With numbers it
    is the definition.
    """

    def providers(shape: Shape, device: torch.device) -> dict[str, Function]:
        options: dict[str, Any] = {"patch_size": shape.patch, "eps": EPS, **shape.statistics}
        found: dict[str, Function] = {
            "ours": lambda video, masked, pred, **_: loss(pred, video, masked, **options),
            "eager": lambda video, booleans, pred, **_: eager(shape, video, booleans, pred),
        }
        if launch.resident_programs(1, 0, device):  # "ours" has a pipeline
            found["a program per token"] = lambda video, masked, pred, **_: without_pipeline(
                loss, pred, video, masked, **options
            )
        return found

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
