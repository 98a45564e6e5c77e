"""`gather_tubes`, compared with VideoMAE's way: normalize and cut the whole clip, then select the visible tenth."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.check import Inputs, Operator
from benchmarks.clips import MEAN, STD, Shape, clip, cubes, pick, pixels, tubes
from mam2.kernels import costs, gather_tubes


def inputs(shape: Shape, device: torch.device) -> Inputs:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1, 1) for values in (MEAN, STD))
    mask = tubes(shape, device)
    given = {"video": clip(shape, device), "visible": mask.visible, "booleans": ~mask.as_bool()}
    return {**given, "mean": mean, "std": std}


def normalize_and_pick(shape: Shape, video: Tensor, index: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    out = pick(cubes((pixels(video) - mean) / std, shape.patch), index)
    return out if out.dtype == torch.float64 else out.to(shape.dtype)


OPERATOR = Operator(
    name="gather_tubes",
    inputs=inputs,
    definition=lambda shape: (
        lambda video, visible, mean, std, **_: normalize_and_pick(shape, video, visible, mean, std)
    ),
    providers=lambda shape, device: {
        "ours": lambda video, visible, **_: gather_tubes(
            video, visible, patch_size=shape.patch, mean=MEAN, std=STD, dtype=shape.dtype
        ),
        "eager": lambda video, booleans, mean, std, **_: normalize_and_pick(shape, video, booleans, mean, std),
    },
    cost=lambda shape: costs.gather_tubes(
        shape.batch, shape.tokens - shape.masked, shape.values, out_bytes=shape.dtype.itemsize
    ),
)
