"""A small set of synthetic clips with true masks: textured blobs that move, rotate, grow and cover each other.

Objects and background have the same kind of texture, so that a mean color is not enough for a match.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_FRAMES = 24
OBJECTS = 2
TEXELS = 24
"""Rows and columns of random colors from which a texture is interpolated."""
LOBES = 3
"""Number of waves in a blob's outline."""


class MaskClip(NamedTuple):
    frames: Tensor
    """uint8 [CLIP_FRAMES, size, size, 3]."""
    masks: Tensor
    """int64 [CLIP_FRAMES, size, size]: 0 for the background, 1 to OBJECTS; a higher number covers a lower one."""


def render_mask_clip(number: int, size: int, seed: int = 0) -> MaskClip:
    """Renders clip `number` of a seed at a size in pixels; a part of every object stays visible."""
    generator = torch.Generator().manual_seed(1000 * seed + number)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    progress = torch.linspace(-0.5, 0.5, CLIP_FRAMES)
    places = (torch.arange(size) + 0.5) / size * 2 - 1  # positions of the pixels' centers, -1 to 1
    y, x = torch.meshgrid(places, places, indexing="ij")
    drift = uniform(-0.3, 0.3, 2)
    here = torch.stack([x, y], -1) - progress[:, None, None, None] * drift
    frames = _texture(here * 0.8, generator)
    masks = torch.zeros(CLIP_FRAMES, size, size, dtype=torch.int64)
    for place in range(OBJECTS):
        angle = uniform(0, 6.28, 1)
        way = torch.cat([angle.cos(), angle.sin()]) * uniform(0.5, 1.0, 1)
        middle = uniform(-0.35, 0.35, 2)
        radius = uniform(0.3, 0.42, 1) * uniform(0.75, 1.33, 1) ** progress
        turn = uniform(-1.5, 1.5, 1) * progress
        offset = torch.stack([x, y], -1) - (middle + progress[:, None] * way)[:, None, None]
        cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
        u, v = cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]
        own = torch.stack([u, v], -1) / radius[:, None, None, None]
        waves, phases = uniform(-0.15, 0.15, LOBES), uniform(0, 6.28, LOBES)
        theta = torch.atan2(own[..., 1], own[..., 0])[..., None]
        outline = 1 + (waves * (torch.arange(2, 2 + LOBES) * theta + phases).cos()).sum(-1)
        inside = own.norm(dim=-1) < outline
        frames = torch.where(inside[..., None], _texture(own * 0.6, generator), frames)
        masks[inside] = place + 1
    return MaskClip((frames * 255).round().byte(), masks)


def _texture(places: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a random texture at positions [T, H, W, 2] (-1 to 1, mirrored beyond): [T, H, W, 3] in 0 to 1."""
    tint = torch.rand(3, 1, 1, generator=generator)
    colors = 0.5 * torch.rand(3, TEXELS, TEXELS, generator=generator) + 0.5 * tint
    spread = colors.expand(len(places), -1, -1, -1)
    read = F.grid_sample(spread, places, mode="bilinear", padding_mode="reflection", align_corners=False)
    return read.movedim(1, -1).clamp(0, 1)
