"""Draws which tokens are decoded: VideoMAE v2's running cell, a half (or ¼, ¾) spread evenly over space and time.

    turn(token)  = 2·(row mod 2) + (column mod 2) + slot + 1 + phase of the clip
    left out     = turn mod 4 < int(4·ratio)

The pattern of decoded and left-out tokens in each 2×2 cell rotates by one position per slot. In four slots each
position is left out int(4·ratio) times. With a tube mask, every clip therefore decodes the same number of masked
tokens.

It runs in plain PyTorch on the device; the phase, 0 to 3, comes from the generator of the masks.

B clips, N tokens (T'·H'·W'), Nm masked.
"""

import math
from collections.abc import Sequence

import torch

from .masks import TubeMask, draw_positions, order_by
from .shapes import check_grid

STREAM = 0x52756E6E696E6743
"""Combined with the seed by exclusive or, so that the phases and tubes of one seed are independent."""


def _left_out_of_four(grid: Sequence[int], ratio: float) -> int:
    check_grid(grid)
    _, rows, columns = grid
    if rows % 2 or columns % 2:
        raise ValueError(f"grid: expected even numbers of rows and columns (cells are 2x2), found {rows} x {columns}")
    left_out = int(4 * ratio)
    if not 0 < left_out < 4:
        raise ValueError(f"ratio: expected 0.25, 0.5 or 0.75 (of four tokens, at least one is decoded), found {ratio}")
    return left_out


def _decoded(
    batch: int,
    grid: Sequence[int],
    left_out: int,
    seed: int,
    step: int | torch.Tensor,
    first_sample: int,
    device: torch.device | str | None,
) -> torch.Tensor:
    """Returns which tokens are decoded: bool [B,N]."""
    slots, rows, columns = grid
    phase = draw_positions(batch, 1, 4, 0.25, seed ^ STREAM, step, first_sample, device).masked
    slot, row, column = (torch.arange(size, device=phase.device) for size in (slots, rows, columns))
    turn = slot[:, None, None] + 1 + row[:, None] % 2 * 2 + column % 2
    return (turn.flatten() + phase) % 4 >= left_out


def running_cell_mask(
    batch: int,
    grid: Sequence[int],
    ratio: float = 0.5,
    *,
    seed: int,
    step: int | torch.Tensor = 0,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> TubeMask:
    """Draws the tokens that VideoMAE v2 decodes (`visible`) and the share `ratio` that it leaves out (`masked`).

    Args:
        batch, seed, step, first_sample, device: as in `tube_mask`.
        grid: (T', H', W') tokens of a clip; H' and W' even.
        ratio: 0.25, 0.5 or 0.75; values in between are rounded down.

    Raises:
        ValueError: the grid is odd, or the ratio is less than 0.25 or at least 1.
    """
    left_out = _left_out_of_four(grid, ratio)
    decoded = _decoded(batch, grid, left_out, seed, step, first_sample, device)
    order = order_by(decoded)
    count = order.shape[1] // 4 * (4 - left_out)
    return TubeMask(visible=order[:, :count], masked=order[:, count:])


def running_cell_subset(
    mask: TubeMask,
    grid: Sequence[int],
    ratio: float = 0.5,
    *,
    seed: int,
    step: int | torch.Tensor = 0,
    first_sample: int = 0,
) -> torch.Tensor:
    """Returns the masked tokens that `running_cell_mask` with the same arguments decodes: those that the loss counts.

    Args:
        mask: a tube mask, so that every clip has the same number of such tokens.
        grid: (T', H', W') tokens of a clip; T' a multiple of 4, H' and W' even.

    Returns:
        int64 [B,K], ascending, K = Nm·(1 − ratio). If a clip's mask is not a tube mask and has another number of such
        tokens, every number is −1, for which the losses raise (on a GPU: NaN).

    Raises:
        ValueError: the grid is not the mask's, its slots are not a multiple of 4, or the ratio is invalid.
    """
    left_out = _left_out_of_four(grid, ratio)
    if grid[0] % 4:
        raise ValueError(
            f"grid: expected a multiple of 4 slots (the cell's period), found {grid[0]}; "
            "decode running_cell_mask(...).visible and give the loss a weight instead"
        )
    tokens = mask.visible.shape[1] + mask.masked.shape[1]
    if tokens != math.prod(grid):
        raise ValueError(f"mask: expected {math.prod(grid)} tokens per clip (grid {tuple(grid)}), found {tokens}")
    batch = mask.masked.shape[0]
    decoded = _decoded(batch, grid, left_out, seed, step, first_sample, mask.masked.device).gather(1, mask.masked)
    count = mask.masked.shape[1] // 4 * (4 - left_out)
    subset = mask.masked.gather(1, order_by(decoded)[:, :count])
    return torch.where(decoded.sum(dim=1, keepdim=True) == count, subset, -1)
