"""Groups of a clip's tokens, over which a feature is averaged or a learned query attends.

mean          all tokens: the usual probe. It describes the content of a clip, but loses the temporal order.
time          the tokens of one time slot, for each slot: keeps the order.
time-center   `time`, and for each slot the tokens of the central half of rows and columns.
time-space    the tokens of one quarter of the frame in one time slot, for each slot and quarter.

Shapes: B clips, T'×H'×W' the token grid, N tokens in that order, R groups in the order of time, D the encoder's width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["mean", "time", "time-center", "time-space"]
REGIONS = 2
"""Rows and columns of the regions of `time-space`."""


def token_groups(grid: tuple[int, int, int], pool: Pool) -> Tensor:
    """Returns the tokens of each group for a grid (T', H', W'): bool [R, N]; no group is empty."""
    slots, height, width = grid
    whole = torch.ones(1, height, width, dtype=torch.bool)
    if pool == "mean":
        return whole.expand(slots, -1, -1).reshape(1, -1)
    areas = {"time": whole, "time-center": torch.cat([whole, _center(height, width)])}
    if pool == "time-space":
        areas[pool] = _regions(height, width)
    flat = areas[pool].flatten(1)
    return torch.einsum("st,an->satn", torch.eye(slots), flat.float()).bool().reshape(slots * len(flat), -1)


def pool_tokens(tokens: Tensor, grid: tuple[int, int, int], pool: Pool) -> Tensor:
    """Averages every group of tokens: [B, N, D] -> [B, R, D], float32.

    Raises ValueError if the tokens do not match the grid.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"tokens: expected [B, N, D] of a grid of {grid}, found {tuple(tokens.shape)}")
    if pool == "mean":
        return tokens.float().mean(1, keepdim=True)
    groups = token_groups(grid, pool).to(tokens.device, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return torch.einsum("rn,bnd->brd", groups, tokens.float()) / groups.sum(1)[:, None]


def _center(height: int, width: int) -> Tensor:
    """Returns bool [1, H', W']: the central half of rows and columns; all of them if there are fewer than three."""
    center = torch.zeros(1, height, width, dtype=torch.bool)
    top, left = (height + 1) // 4, (width + 1) // 4
    center[:, top : height - top, left : width - left] = True
    return center


def _regions(height: int, width: int) -> Tensor:
    """Returns bool [regions, H', W']; with an odd number, the middle row or column belongs to both sides."""
    rows, columns = _parts(height), _parts(width)
    return torch.einsum("rh,cw->rchw", rows, columns).bool().flatten(0, 1)


def _parts(count: int) -> Tensor:
    """Returns float [parts, count], 1 if a row or column belongs to a part."""
    parts = torch.zeros(min(REGIONS, count), count)
    for place, part in enumerate(parts):
        part[place * count // len(parts) : -(-(place + 1) * count // len(parts))] = 1
    return parts
