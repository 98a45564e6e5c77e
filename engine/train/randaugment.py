"""RandAugment's operations on batches of clips: the fifteen operations of timm's "increasing" set.

Shapes: b clips, C channels, T frames. Each takes clips [b, C, T, H, W] float32 from 0 to 255 and a strength per clip
[b], and returns clips that are not yet rounded and clamped. On integer values, those of 8 bits, the definitions are
Pillow's ImageOps and ImageEnhance, applied to a clip instead of an image. Clips of more than 8 bits have values between
the integers, and every operation but posterize keeps the differences between them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mam2.engine.model.pixels import pixel_statistics

LEVELS = 256
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R 601); other channels have equal weights."""


class Operation(NamedTuple):
    name: str
    apply: Callable[..., Tensor]
    """Takes clips and strengths; with `rounds` also `whole`."""
    strength: Callable[[float], float]
    """Returns the strength for a magnitude from 0 to 1."""
    signed: bool = False
    """Whether the sign of the strength is flipped for half of the clips."""
    rounds: bool = False
    """Whether Pillow rounds between the operation's steps: `whole=False` leaves that out, for more than 8 bits."""


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns float32 values on a device, copied only once, because each copy waits for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def auto_contrast(clips: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to 0 to 255."""
    low, high = clips.amin((2, 3, 4), keepdim=True), clips.amax((2, 3, 4), keepdim=True)
    return torch.where(high > low, (clips - low) * 255 / torch.where(high > low, high - low, 1), clips)


def equalize(clips: Tensor, _: Tensor) -> Tensor:
    """Spreads each channel's levels so that all are about equally frequent; values between two levels stay between."""
    levels = clips.long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], LEVELS, device=clips.device, dtype=torch.int64)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = counts.gather(2, levels.amax(2, keepdim=True))
    width = (levels.shape[2] - last) // (LEVELS - 1)
    below = counts.cumsum(2) - counts
    table = torch.where(
        width > 0, (width // 2 + below) // width.clamp_min(1), torch.arange(LEVELS, device=clips.device)
    )
    table = table.to(clips.dtype)
    here, next_level = table.gather(2, levels), table.gather(2, (levels + 1).clamp_max(LEVELS - 1))
    return (here + (next_level - here) * clips.flatten(2).frac()).view_as(clips)


def invert(clips: Tensor, _: Tensor) -> Tensor:
    return 255 - clips


def posterize(clips: Tensor, bits: Tensor) -> Tensor:
    """Keeps only the highest bits."""
    step = 2 ** (8 - _each(bits))
    return (clips / step).floor() * step


def solarize(clips: Tensor, threshold: Tensor) -> Tensor:
    """Inverts levels from a threshold on."""
    return torch.where(clips < _each(threshold), clips, 255 - clips)


def solarize_add(clips: Tensor, added: Tensor) -> Tensor:
    """Makes the darker half of the levels brighter."""
    return torch.where(clips < 128, clips + _each(added), clips)


def color(clips: Tensor, change: Tensor, *, whole: bool = True) -> Tensor:
    return _away_from(_gray(clips, whole), clips, change)


def contrast(clips: Tensor, change: Tensor, *, whole: bool = True) -> Tensor:
    mean = _gray(clips, whole).mean((1, 2, 3, 4), keepdim=True)
    return _away_from(mean.round() if whole else mean, clips, change)


def brightness(clips: Tensor, change: Tensor) -> Tensor:
    return _away_from(torch.zeros_like(clips), clips, change)


def sharpness(clips: Tensor, change: Tensor) -> Tensor:
    """Moves a clip away from, or towards, its smoothed version; the frame's edge stays unchanged."""
    kernel = torch.ones(3, 3, device=clips.device)
    kernel[1, 1] = 5
    smooth = clips.clone()
    inner = F.conv2d(clips.flatten(0, 2)[:, None], (kernel / kernel.sum())[None, None])
    smooth[..., 1:-1, 1:-1] = inner.view(*clips.shape[:3], *inner.shape[-2:])
    return _away_from(smooth, clips, change)


def rotate(clips: Tensor, degrees: Tensor) -> Tensor:
    """Rotates counterclockwise about the frame's center."""
    height, width = clips.shape[-2:]
    cos, sin = (degrees * math.pi / 180).cos(), (degrees * math.pi / 180).sin()
    x, y = width / 2, height / 2
    return _move(clips, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def shear_x(clips: Tensor, share: Tensor) -> Tensor:
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return _move(clips, (one, share, zero), (zero, one, zero))


def shear_y(clips: Tensor, share: Tensor) -> Tensor:
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return _move(clips, (one, zero, zero), (share, one, zero))


def translate_x(clips: Tensor, share: Tensor) -> Tensor:
    """Translates by a share of the frame's width."""
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return _move(clips, (one, zero, share * clips.shape[-1]), (zero, one, zero))


def translate_y(clips: Tensor, share: Tensor) -> Tensor:
    """Translates by a share of the frame's height."""
    zero, one = torch.zeros_like(share), torch.ones_like(share)
    return _move(clips, (one, zero, zero), (zero, one, share * clips.shape[-2]))


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def _gray(clips: Tensor, whole: bool) -> Tensor:
    channels = clips.shape[1]
    weights = constant(LUMA if channels == 3 else (1 / channels,) * channels, clips.device)[:, None, None, None]
    gray = (clips * weights).sum(1, keepdim=True)
    return (gray.round() if whole else gray).expand_as(clips)


def _away_from(plain: Tensor, clips: Tensor, change: Tensor) -> Tensor:
    """Returns clips whose distance to `plain` is multiplied by 1 + change."""
    return plain + (clips - plain) * (1 + _each(change))


def _move(clips: Tensor, x_row: tuple[Tensor, Tensor, Tensor], y_row: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Reads each output pixel at an affine map of its position in pixels, (row . (x, y, 1)); bilinear.

    Pixels outside are the mean of `pixel_statistics`.
    """
    count, channels, frames, height, width = clips.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=clips.device) + 0.5, torch.arange(width, device=clips.device) + 0.5, indexing="ij"
    )
    from_x, from_y = (
        row[0][:, None, None] * x + row[1][:, None, None] * y + row[2][:, None, None] for row in (x_row, y_row)
    )
    grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], dim=-1)
    fill = 255 * constant(pixel_statistics(channels)[0], clips.device)[:, None, None, None]
    # grid_sample pads with zeros outside
    flat = (clips - fill).reshape(count, channels * frames, height, width)
    return F.grid_sample(flat, grid, align_corners=False).view_as(clips) + fill


OPERATIONS = (
    Operation("auto contrast", auto_contrast, lambda m: m),
    Operation("equalize", equalize, lambda m: m),
    Operation("invert", invert, lambda m: m),
    Operation("rotate", rotate, lambda m: 30 * m, signed=True),
    Operation("posterize", posterize, lambda m: max(4 - int(4 * m), 1)),
    Operation("solarize", solarize, lambda m: 256 - int(256 * m)),
    Operation("solarize add", solarize_add, lambda m: int(110 * m)),
    Operation("color", color, lambda m: 0.9 * m, signed=True, rounds=True),
    Operation("contrast", contrast, lambda m: 0.9 * m, signed=True, rounds=True),
    Operation("brightness", brightness, lambda m: 0.9 * m, signed=True),
    Operation("sharpness", sharpness, lambda m: 0.9 * m, signed=True),
    Operation("shear x", shear_x, lambda m: 0.3 * m, signed=True),
    Operation("shear y", shear_y, lambda m: 0.3 * m, signed=True),
    Operation("translate x", translate_x, lambda m: 0.45 * m, signed=True),
    Operation("translate y", translate_y, lambda m: 0.45 * m, signed=True),
)
