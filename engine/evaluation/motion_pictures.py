"""Motion targets and their predictions as pictures around grey, one for each slot.

RGB differences of a tubelet's first frame to the next, contrast doubled; flow as red to the right and green down;
histograms of gradients by the direction of the strongest edges. B clips, N tokens, T'×H'×W' their grid, Pd values of a
token's target, C = 3.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.model.encoder import CHANNELS
from mam2.engine.model.motion_targets import FLOW_CELLS, HOG_CELLS, ORIENTATIONS, RGB_DIFFERENCES, motion_target
from mam2.kernels import TubeMask, frame_difference

FULL_COLOUR_PIXELS = 8
"""Flow that is drawn in full colour."""


def motion_pictures(video: Tensor, mask: TubeMask, predicted: Tensor, config: PretrainConfig) -> tuple[Tensor, Tensor]:
    """The true motion, and the predicted one in the hidden patches: both [B, T', H, W, C] in 0 to 1.

    Args:
        video: [B, 3, T, H, W].
        predicted: [B, Nm, Pd]. A normalised RGB difference is brought back with its own cube's deviation.
    """
    target = motion_target(video, config.loss, config.patch_size)
    prediction = torch.zeros_like(target)
    prediction.scatter_(1, mask.masked[..., None].expand(-1, -1, target.shape[2]), predicted.float())
    if config.loss.motion_target in RGB_DIFFERENCES:
        raw = frame_difference(
            video, patch_size=config.patch_size, difference=config.loss.motion_target, normalize=None
        )
        moved = prediction * _cube_scale(raw, target, config)
        return motion_picture(_first_difference(raw, config)), motion_picture(_first_difference(moved, config))
    draw = _draw_flow if config.loss.motion_target == "flow" else _draw_hog
    return draw(target, config), draw(prediction, config)


def motion_picture(difference: Tensor) -> Tensor:
    """Differences of pixels as pictures around grey, contrast doubled."""
    return (0.5 + 2 * difference).clamp(0, 1)


def _cube_scale(raw: Tensor, target: Tensor, config: PretrainConfig) -> Tensor:
    """Deviation of each token's cube and channel, from the target in both forms: [B, N, Pd]; 0 where nothing moves."""
    patch = config.model.patch
    split = "b n (t h w c) -> b n (t h w) c"
    raw, target = (rearrange(x, split, h=patch, w=patch, c=CHANNELS) for x in (raw, target))
    ratio = (raw * target).sum(2, keepdim=True) / target.square().sum(2, keepdim=True).clamp_min(1e-12)
    return rearrange(ratio.expand_as(raw), "b n p c -> b n (p c)")


def _first_difference(difference: Tensor, config: PretrainConfig) -> Tensor:
    """The first difference of every tubelet of [B, N, Pd], laid out: [B, T', H, W, C]."""
    frame = difference[..., : config.model.patch**2 * CHANNELS]
    return _laid_out(frame, config, config.model.patch)


def _draw_flow(flow: Tensor, config: PretrainConfig) -> Tensor:
    """[B, N, Pd] -> [B, T', H, W, C]"""
    across, down = flow.unflatten(-1, (FLOW_CELLS**2, 2)).unbind(-1)
    shades = torch.stack([across, down, torch.zeros_like(across)], dim=-1) / (2 * FULL_COLOUR_PIXELS)
    return (0.5 + _laid_out(shades.flatten(-2), config, FLOW_CELLS)).clamp(0, 1)


def _draw_hog(histograms: Tensor, config: PretrainConfig) -> Tensor:
    """[B, N, Pd] -> [B, T', H, W, C]"""
    strength = histograms.unflatten(-1, (HOG_CELLS**2, CHANNELS, ORIENTATIONS)).mean(-2)
    # an orientation and its opposite are the same: twice the angle goes once around
    angle = (torch.arange(ORIENTATIONS, device=histograms.device) + 0.5) * (2 * math.pi / ORIENTATIONS)
    shades = torch.stack([strength @ angle.cos(), strength @ angle.sin(), torch.zeros_like(strength[..., 0])], dim=-1)
    return (0.5 + _laid_out(shades.flatten(-2) / 2, config, HOG_CELLS)).clamp(0, 1)


def _laid_out(values: Tensor, config: PretrainConfig, cells: int) -> Tensor:
    """[B, N, cells·cells·C] -> [B, T', H, W, C], a cell as wide as its share of the patch."""
    slots, rows, columns = config.grid
    layout = "b (t i j) (h w c) -> b t (i h) (j w) c"
    picture = rearrange(values, layout, t=slots, i=rows, j=columns, h=cells, w=cells)
    wide = config.model.patch // cells
    return picture.repeat_interleave(wide, 2).repeat_interleave(wide, 3)
