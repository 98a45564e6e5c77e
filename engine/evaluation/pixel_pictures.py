"""Converts standardized predicted pixels to pictures.

B clips, T'×H'×W' the token grid, N tokens, Nm masked, P values per token, τ×s×s its pixels, C channels.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.pixels import unit_pixels
from mam2.kernels import TubeMask

EPS = 1e-6
"""eps of the pixel target's standard deviation, as in `masked_pixel_loss`."""


def token_cubes(clip: Tensor, config: PretrainConfig) -> Tensor:
    """Returns the pixels of each token in 0 to 1: clip [B, T, H, W, C] -> float [B, N, τ, s·s, C]."""
    tubelet, side, _ = config.patch_size
    return rearrange(unit_pixels(clip), "b (t p) (h q) (w r) c -> b (t h w) p (q r) c", p=tubelet, q=side, r=side)


def completed_cubes(cubes: Tensor, mask: TubeMask, predicted: Tensor, config: PretrainConfig) -> Tensor:
    """Cubes [B, N, τ, s·s, C] with the hidden ones as predicted [B, Nm, P].

    A prediction is standardised: each hidden cube lends its own mean and deviation, so color and contrast of a patch
    are given, not predicted.
    """
    mean, deviation = _statistics(cubes, config.loss.pixel_normalize)
    shape = {"p": config.model.tubelet, "c": cubes.shape[-1]}
    predicted = rearrange(predicted.float(), "b n (p q c) -> b n p q c", **shape)
    if config.model.objective == "joint":
        predicted[:, :, 1:] += predicted[:, :, :1]
    completed = cubes.clone()
    index = mask.masked[:, :, None, None, None].expand_as(predicted)
    completed.scatter_(1, index, predicted)
    hidden = mask.as_bool()[:, :, None, None, None]
    return torch.where(hidden, completed * deviation + mean, cubes)


def laid_out(part: Tensor, config: PretrainConfig) -> Tensor:
    """Arranges one frame of each token [B, N, s·s, C] as pictures [B, T', H, W, C]."""
    slots, rows, columns = config.grid
    side = config.model.patch
    layout = "b (t h w) (q r) c -> b t (h q) (w r) c"
    return rearrange(part, layout, t=slots, h=rows, w=columns, q=side, r=side)


def _statistics(cubes: Tensor, normalize: str) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each cube [B, N, τ, s·s, C], as used in the pixel target."""
    if normalize == "none":
        return cubes.new_zeros(()), cubes.new_ones(())
    over = (2, 3) if normalize == "channel" else (2, 3, 4)
    mean, variance = cubes.mean(over, keepdim=True), cubes.var(over, keepdim=True)
    return mean, variance.sqrt() + EPS if normalize == "channel" else (variance + EPS).sqrt()
