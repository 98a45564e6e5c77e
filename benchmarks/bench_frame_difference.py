"""`frame_difference` of the masked tokens, compared with differencing and cutting the whole clip before selecting."""

from __future__ import annotations

import torch

from benchmarks.check import Inputs, Operator
from benchmarks.clips import EPS, Shape, clip, differences, pick, tubes
from mam2.kernels import costs, frame_difference


def inputs(shape: Shape, device: torch.device) -> Inputs:
    mask = tubes(shape, device)
    return {"video": clip(shape, device), "masked": mask.masked, "booleans": mask.as_bool()}


OPERATOR = Operator(
    name="frame_difference",
    inputs=inputs,
    definition=lambda shape: lambda video, masked, **_: pick(differences(video, shape.patch, shape), masked),
    providers=lambda shape, device: {
        "ours": lambda video, masked, **_: frame_difference(video, patch_size=shape.patch, eps=EPS, mask=masked),
        "eager": lambda video, booleans, **_: pick(differences(video, shape.patch, shape), booleans),
    },
    cost=lambda shape: costs.frame_difference(shape.batch, shape.masked, shape.values),
    dtypes=(torch.float32,),
)
