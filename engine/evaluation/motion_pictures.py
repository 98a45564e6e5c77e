"""Draws motion targets and their predictions as pictures around gray, one per slot.

Pixel differences are those from a tubelet's first frame to the next, with doubled contrast. Flow to the right is red
and downward green. Histograms of gradients are drawn by the direction of the strongest edges. B clips, N tokens,
T'×H'×W' their grid, Pd values of a token's target, C channels.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.motion_targets import FLOW_CELLS, HOG_CELLS, ORIENTATIONS, PIXEL_DIFFERENCES, motion_target
from mam2.kernels import TubeMask, frame_difference

FULL_COLOR_PIXELS = 8
"""Flow in pixels that is drawn in full color."""


def motion_pictures(video: Tensor, mask: TubeMask, predicted: Tensor, config: PretrainConfig) -> tuple[Tensor, Tensor]:
    """Draws the true motion, and the predicted motion of the masked patches: both [B, T', H, W, C] in 0 to 1.

    Args:
        video: [B, C, T, H, W].
        predicted: [B, Nm, Pd]. A normalized pixel difference is multiplied by its cube's standard deviation.
    """
    target = motion_target(video, config.loss, config.patch_size)
    prediction = torch.zeros_like(target)
    prediction.scatter_(1, mask.masked[..., None].expand(-1, -1, target.shape[2]), predicted.float())
    if config.loss.motion_target in PIXEL_DIFFERENCES:
        raw = frame_difference(
            video, patch_size=config.patch_size, difference=config.loss.motion_target, normalize=None
        )
        moved = prediction * _cube_scale(raw, target, config)
        return motion_picture(_first_difference(raw, config)), motion_picture(_first_difference(moved, config))
    draw = DRAWINGS[config.loss.motion_target]
    return draw(target, config), draw(prediction, config)


def motion_picture(difference: Tensor) -> Tensor:
    """Draws pixel differences as pictures around gray, with doubled contrast."""
    return (0.5 + 2 * difference).clamp(0, 1)


def _cube_scale(raw: Tensor, target: Tensor, config: PretrainConfig) -> Tensor:
    """Returns the standard deviation of each token's cube and channel, from raw and normalized target: [B, N, Pd]; 0
    without motion."""
    patch = config.model.patch
    split = "b n (t h w c) -> b n (t h w) c"
    raw, target = (rearrange(x, split, h=patch, w=patch, c=config.data.channels) for x in (raw, target))
    ratio = (raw * target).sum(2, keepdim=True) / target.square().sum(2, keepdim=True).clamp_min(1e-12)
    return rearrange(ratio.expand_as(raw), "b n p c -> b n (p c)")


def _first_difference(difference: Tensor, config: PretrainConfig) -> Tensor:
    """Arranges the first difference of every tubelet of [B, N, Pd] as pictures [B, T', H, W, C]."""
    frame = difference[..., : config.model.patch**2 * config.data.channels]
    return _laid_out(frame, config, config.model.patch)


def _draw_flow(flow: Tensor, config: PretrainConfig) -> Tensor:
    """[B, N, Pd] -> [B, T', H, W, C]"""
    across, down = flow.unflatten(-1, (FLOW_CELLS**2, 2)).unbind(-1)
    shades = torch.stack([across, down, torch.zeros_like(across)], dim=-1) / (2 * FULL_COLOR_PIXELS)
    return (0.5 + _laid_out(shades.flatten(-2), config, FLOW_CELLS)).clamp(0, 1)


def _draw_hog(histograms: Tensor, config: PretrainConfig) -> Tensor:
    """[B, N, Pd] -> [B, T', H, W, C]"""
    strength = histograms.unflatten(-1, (HOG_CELLS**2, config.data.channels, ORIENTATIONS)).mean(-2)
    # opposite orientations are equal: twice the angle covers the full circle
    angle = (torch.arange(ORIENTATIONS, device=histograms.device) + 0.5) * (2 * math.pi / ORIENTATIONS)
    shades = torch.stack([strength @ angle.cos(), strength @ angle.sin(), torch.zeros_like(strength[..., 0])], dim=-1)
    return (0.5 + _laid_out(shades.flatten(-2) / 2, config, HOG_CELLS)).clamp(0, 1)


def _laid_out(values: Tensor, config: PretrainConfig, cells: int) -> Tensor:
    """Arranges [B, N, cells·cells·C] as pictures [B, T', H, W, C]; a cell is as wide as its share of the patch."""
    slots, rows, columns = config.grid
    layout = "b (t i j) (h w c) -> b t (i h) (j w) c"
    picture = rearrange(values, layout, t=slots, i=rows, j=columns, h=cells, w=cells)
    wide = config.model.patch // cells
    return picture.repeat_interleave(wide, 2).repeat_interleave(wide, 3)


DRAWINGS = {"flow": _draw_flow, "hog": _draw_hog}
"""Functions that draw the targets that are no pixel difference, by the names of `LossConfig.motion_target`."""
