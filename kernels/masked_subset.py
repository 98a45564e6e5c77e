"""Draws some of the masked tokens of every clip, the same number in each: those that a decoder predicts.

    key(token)   = Philox word of (seed, step, sample, token), as in `masks.py`
    turn(token)  = (place(token) − slot − step − sample) mod 4
    rank(token)  = key, or with by_cell (turn, key)
    subset       = the `count` masked tokens with the smallest ranks, ascending; of equal ranks the smaller token

place is the number of a token in its cell of 2×2 patches, clockwise from the upper left one, so that the turns of
neighboring slots choose neighboring patches: half of the tokens are then two of each cell, in each slot and over any
four slots in a row.

Reads and writes every token number once, on the device and without a host synchronization. The draws are equal on a CPU
and a GPU. The engine uses this operator; the package does not export it.

B clips, N tokens (T'·H'·W'), Nm masked, K drawn.
"""

import math
from collections.abc import Sequence

import torch

from . import host_masks, launch, reference_masks
from .launch import jit, tl
from .masks import are_smallest, random_keys, step_on
from .shapes import check_grid


# no specialization on argument values, as for the masks
@jit(do_not_specialize=["seed", "first_sample", "masked", "count", "rows", "columns"])
def _masked_subset_kernel(
    subset_ptr,
    masked_ptr,
    step_ptr,
    seed: tl.int64,
    first_sample: tl.int64,
    masked: tl.int32,
    count: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    BY_CELL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK)
    mask = entry < masked
    sample = first_sample + clip
    step = tl.load(step_ptr)
    token = tl.load(masked_ptr + clip * masked + entry, mask=mask, other=0)
    number = token.to(tl.int32)
    key = random_keys(number, sample, step, seed)
    if BY_CELL:
        slot, row, column = number // (rows * columns), number // columns % rows, number % columns
        place = tl.where(row % 2 == 0, column % 2, 3 - column % 2)
        key += ((place - slot - step - sample) & 3) << 32
    # rank and entry in one number: all distinct, so that the `count` smallest are well defined
    drawn = are_smallest(tl.where(mask, key * 8388608 + entry, 0x7FFFFFFFFFFFFFFF), entry, count)
    drawn_before = tl.cumsum(drawn.to(tl.int32), axis=0) - drawn.to(tl.int32)
    tl.store(subset_ptr + clip * count + drawn_before, token, mask=mask & drawn)


def _launch(
    masked: torch.Tensor, step: torch.Tensor, grid: Sequence[int], count: int, by_cell: bool, seed: int, sample: int
) -> torch.Tensor:
    batch, tokens = masked.shape
    _, rows, columns = grid
    subset = masked.new_empty(batch, count)
    block = launch.power_of_two(tokens)
    # the warps of the masks' kernel, which sorts the same numbers
    meta = {"BY_CELL": by_cell, "BLOCK": block, "num_warps": launch.warps("draw_mask", block, masked.device)}
    arguments = (subset, masked.contiguous(), step, seed, sample, tokens, count, rows, columns)
    launch.run_kernel(_masked_subset_kernel, batch, *arguments, **meta)
    return subset


@torch.library.custom_op("mam2::masked_subset", mutates_args=())
def _masked_subset(
    masked: torch.Tensor, step: torch.Tensor, grid: Sequence[int], count: int, by_cell: bool, seed: int, sample: int
) -> torch.Tensor:
    draw = host_masks.draw_subset if masked.device.type == "cpu" else reference_masks.masked_subset
    if launch.active_path(masked) == "triton":
        draw = _launch
    return draw(masked, step, grid, count, by_cell, seed, sample)


@_masked_subset.register_fake
def _(
    masked: torch.Tensor, step: torch.Tensor, grid: Sequence[int], count: int, by_cell: bool, seed: int, sample: int
) -> torch.Tensor:
    return masked.new_empty(masked.shape[0], count)


def masked_subset(
    masked: torch.Tensor,
    grid: Sequence[int],
    count: int,
    *,
    by_cell: bool,
    seed: int,
    step: int | torch.Tensor = 0,
    first_sample: int = 0,
) -> torch.Tensor:
    """Draws `count` of the masked tokens [B,Nm] of every clip -> int64 [B,count] on their device, ascending.

    Args:
        masked: int64 token numbers, ascending, each 0 to N − 1.
        grid: (T', H', W') tokens of a clip.
        count: number of tokens to draw, 1 to Nm.
        by_cell: draw evenly over the cells of 2×2 patches and over time; False: each token independently of its place.
        seed, step, first_sample: as in `tube_mask`.

    Raises:
        ValueError: a shape, type or number is invalid.
    """
    check_grid(grid)
    if masked.dim() != 2 or masked.dtype != torch.int64 or masked.shape[1] > math.prod(grid):
        raise ValueError(
            f"masked: expected int64 [B,Nm] of at most {math.prod(grid)} tokens, "
            f"found {masked.dtype} {tuple(masked.shape)}"
        )
    if not 0 < count <= masked.shape[1]:
        raise ValueError(f"count: expected 1 to {masked.shape[1]} of the masked tokens, found {count}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, found {seed}")
    step = step_on(step, masked.device)
    draw = host_masks.draw_subset if launch.is_plain_cpu(masked, step) else _masked_subset
    return draw(masked, step, list(grid), count, by_cell, seed, first_sample)
