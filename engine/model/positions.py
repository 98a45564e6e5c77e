"""Adapts an encoder to a clip size that differs from its training: resamples or recomputes its fixed positions.

T'×H'×W' the token grid, N its tokens, D width. The stride of the frames has no effect: positions do not depend on time
in seconds.

The table is indexed by the flattened token, so that in a grid of another height or width the same index is another
place: token 14 is the first of the second row of 14×14, but still in the first row of 16×16. `recompute` computes the
table for the new grid, as VideoMAE and Hugging Face do; the encoder must then be fine-tuned. `resample` interpolates
the trained table (trilinear, with aligned outer edges): every place of the clip keeps approximately its trained
position, and the encoder can be used without fine-tuning.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from mam2.engine.model.blocks import sincos_positions

if TYPE_CHECKING:
    from mam2.engine.model.encoder import Encoder

Positions = Literal["resample", "recompute"]


def resample_positions(table: Tensor, grid: tuple[int, int, int], onto: tuple[int, int, int]) -> Tensor:
    """Interpolates a table [N, D] of `grid` at the tokens of the grid `onto`: [N', D]."""
    volume = table.unflatten(0, grid).permute(3, 0, 1, 2)[None]
    return F.interpolate(volume, size=onto, mode="trilinear", align_corners=False)[0].flatten(1).T.contiguous()


def position_table(grid: tuple[int, int, int], trained: tuple[int, int, int], width: int) -> Tensor:
    """Positions [N, D] of the tokens of `grid`: the sin-cos table of the grid `trained`, resampled if they differ."""
    table = sincos_positions(math.prod(trained), width)
    return table if grid == trained else resample_positions(table, trained, grid)


def set_clip_size(encoder: Encoder, frames: int, size: int, positions: Positions = "resample") -> None:
    """Makes an encoder accept clips [B, C, frames, size, size].

    The weights stay unchanged; so do the positions if the encoder already has this size.

    Args:
        encoder: changed in place.
        frames: frames of a clip, a multiple of the tubelet.
        size: height and width of a clip in pixels, a multiple of the patch.
        positions: `resample` or `recompute`, see above.

    Raises:
        ValueError: frames or size cannot be divided into whole tokens.
    """
    tubelet, *patch = encoder.patch_size
    if frames < 1 or frames % tubelet:
        raise ValueError(f"frames: expected a multiple of the tubelet, {tubelet}, found {frames}")
    if size < 1 or any(size % side for side in patch):
        raise ValueError(f"size: expected a multiple of the patch, {patch[0]}, found {size}")
    grid = (frames // tubelet, size // patch[0], size // patch[1])
    if grid == encoder.grid:
        return
    if positions == "recompute":
        encoder.trained_grid = grid
    # From the table that was trained, not from one that was resampled before: each time loses detail.
    encoder.positions = position_table(grid, encoder.trained_grid, encoder.width).to(encoder.positions)
    encoder.grid = grid
