"""`masked_pixel_loss`, compared with VideoMAE's: standardize every cube, select the masked ones, mean squared error."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.clips import Shape, cubes, deviation, pick, pixels
from benchmarks.masked_losses import masked_loss_operator
from mam2.kernels import masked_pixel_loss


def pixel_loss(shape: Shape, video: Tensor, index: Tensor, pred: Tensor) -> Tensor:
    tokens = cubes(pixels(video, shape), shape.patch)
    target = pick((tokens - tokens.mean(2, keepdim=True)) / deviation(tokens), index)
    return F.mse_loss(pred.to(target.dtype), target)


OPERATOR = masked_loss_operator(masked_pixel_loss, pixel_loss)
