"""`masked_frame_difference_loss`, compared with VideoMAE's way: difference the whole clip, then a boolean mask."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.clips import Shape, cubes, differences, pick
from benchmarks.masked_losses import masked_loss_operator
from mam2.kernels import masked_frame_difference_loss


def difference_loss(shape: Shape, video: Tensor, index: Tensor, pred: Tensor) -> Tensor:
    target = pick(differences(video, shape.patch, shape), index)
    last = torch.zeros(1, 3, *video.shape[2:], dtype=target.dtype, device=video.device)
    last[:, :, -1] = 1
    exists = 1 - pick(cubes(last, shape.patch).expand(shape.batch, -1, -1, -1), index)
    return ((pred.to(target.dtype) - target).square() * exists).sum() / exists.sum()


OPERATOR = masked_loss_operator(masked_frame_difference_loss, difference_loss)
