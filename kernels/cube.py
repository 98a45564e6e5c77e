# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (kernels extend tuples with `+`: Triton has no unpacking)
"""Device functions shared by the kernels that read token cubes directly from the clip.

A token is a cube of τ frames × p rows × p pixels × C channels. A program reads it as τ·p patch rows of p·C values, cut
into segments: blocks [ROWS, RUN] of RUN neighboring values of each patch row. RUN is a power of two that divides p·C,
so a row needs no padding. For a thread that holds a whole run, the channel of each register is known when the kernel is
compiled, so that per-channel statistics need no comparison. A cube is a tuple of p·C/RUN segments.

The kernels read the clip through its strides, without a copy. Offsets between cubes are 64-bit; inside a cube they are
32-bit unless WIDE is set, for cubes that span more than 2^31 elements. CHANNELS_LAST means that the p·C values of a
patch row are contiguous in memory; they are then read in pieces of up to 128 bits.

A uint8 clip stays in integers ("raw units", 255 per unit of [0,1]): its sums are exact in one pass.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from . import launch
from .launch import jit, tl

NORMALIZE = {None: 0, "channel": 1, "patch": 2}
MAX_RUN = 16


@jit
def store_rounded(pointer, values, mask):
    """Stores floats in the pointer's type, through float32: Triton's interpreter rounds only float32 to bfloat16."""
    kind: tl.constexpr = pointer.dtype.element_ty
    if kind != tl.float64:
        values = values.to(tl.float32)
    tl.store(pointer, values.to(kind), mask=mask)


@jit
def listed_token(index_ptr, place, count, slots, rows, columns):
    """Returns the clip (int64) of a place in the lists of tokens, its token, and whether the token is in the grid.

    `count` is the length of a clip's list. A token that is not in the grid is replaced by token 0.
    """
    clip = (place // count).to(tl.int64)
    token = tl.load(index_ptr + place)
    inside = (token >= 0) & (token < slots * rows * columns)
    return clip, tl.where(inside, token, 0).to(tl.int32), inside


@jit
def cube_place(
    token,
    rows,
    columns,
    stride_t,
    stride_h,
    stride_w,
    TUBELET: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Returns the offset of a token's first value in its clip (int64), and the token's slot."""
    slot = token // (rows * columns)
    row = token // columns % rows
    column = token % columns
    base = slot.to(tl.int64) * TUBELET * stride_t
    base += row.to(tl.int64) * HEIGHT * stride_h + column.to(tl.int64) * WIDTH * stride_w
    return base, slot


@jit
def row_offsets(stride_t, stride_h, HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Returns the patch rows [ROWS,1] of a cube, their frames, and their offsets from the cube's first value."""
    row = tl.arange(0, ROWS)[:, None]
    frame = row // HEIGHT
    if WIDE:
        offset = frame.to(tl.int64) * stride_t + (row % HEIGHT).to(tl.int64) * stride_h
    else:
        offset = frame * stride_t + row % HEIGHT * stride_h
    return row, frame, offset


@jit
def run_values(segment: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr):
    """Returns the positions [1,RUN] of a segment's values in their patch row, and their channels."""
    value = segment * RUN + tl.arange(0, RUN)[None, :]
    return value, value % CHANNELS


@jit
def load_cube(
    pointer,
    mask,
    stride_c,
    stride_w,
    affine_ptr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads a cube's segments from the pointers [ROWS,1] of its patch rows: int32 for BYTES without AFFINE, else DTYPE.

    With AFFINE each value becomes x·multiplier[channel] + shift[channel].
    """
    cube = ()
    for segment in tl.static_range(WIDTH * CHANNELS // RUN):
        value, channel = run_values(segment, CHANNELS, RUN)
        if CHANNELS_LAST:
            raw = tl.load(pointer + value, mask=mask, other=0)
        elif WIDE:
            offset = (value // CHANNELS).to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
            raw = tl.load(pointer + offset, mask=mask, other=0)
        else:
            raw = tl.load(pointer + (value // CHANNELS * stride_w + channel * stride_c), mask=mask, other=0)
        if AFFINE:
            pixels = raw.to(DTYPE)
            multiplier = spread(affine_ptr, channel, CHANNELS)
            shift = spread(affine_ptr + CHANNELS, channel, CHANNELS)
            cube = cube + (tl.where(mask, pixels * multiplier + shift, 0.0),)
        elif BYTES:
            cube = cube + (raw.to(tl.int32),)
        else:
            cube = cube + (raw.to(DTYPE),)
    return cube


@jit
def spread(pointer, channel, CHANNELS: tl.constexpr):
    """Returns the values [1,RUN] of a table in memory, indexed by channel."""
    values = tl.zeros_like(channel).to(pointer.dtype.element_ty) + tl.load(pointer)
    for c in tl.static_range(1, CHANNELS):
        values = tl.where(channel == c, tl.load(pointer + c), values)
    return values


@jit
def select_group(options, group, GROUPS: tl.constexpr):
    """Returns the values [1,RUN] of a tuple, indexed by group."""
    values = tl.zeros_like(group).to(options[0].dtype) + options[0]
    for g in tl.static_range(1, GROUPS):
        values = tl.where(group == g, options[g], values)
    return values


@jit
def group_sum(cube, group: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr):
    """Returns the sum over the values of one of the cube's interleaved groups."""
    rows = tl.sum(tl.zeros_like(cube[0]), axis=1)
    for segment in tl.static_range(len(cube)):
        part = cube[segment]
        if GROUPS > 1:
            _, own = run_values(segment, GROUPS, RUN)
            part = tl.where(own == group, part, 0)
        rows += tl.sum(part, axis=1)
    return tl.sum(rows, axis=0)


@jit
def mean_and_inverse(
    cube,
    mask,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    RUN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    INTEGER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns each group's mean and 1 / standard deviation in the cube's units; a group is a channel or the patch.

    The variance is unbiased. For a uint8 clip it comes from exact integer sums, for a float clip from two passes over
    the registers.
    """
    GROUPS: tl.constexpr = CHANNELS if NORMALIZE == 1 else 1
    COUNT: tl.constexpr = VALUES // GROUPS
    UNIT: tl.constexpr = 255.0 if INTEGER else 1.0
    means = ()
    inverses = ()
    squares = ()
    if INTEGER:
        for segment in tl.static_range(len(cube)):
            # the sum of more than 33 025 squared bytes may exceed 31 bits
            part = cube[segment].to(tl.int64) if COUNT > 33025 else cube[segment]
            squares = squares + (part * part,)
    for group in tl.static_range(GROUPS):
        total = group_sum(cube, group, GROUPS, RUN)
        if INTEGER:
            wide = total.to(tl.int64)
            # float division is approximate on a GPU; this quotient is exact if all values are equal
            mean = (total // COUNT).to(DTYPE) + (total % COUNT).to(DTYPE) / COUNT
            scatter = group_sum(squares, group, GROUPS, RUN).to(tl.int64) * COUNT - wide * wide
            variance = scatter.to(DTYPE) / (COUNT * (COUNT - 1))
        else:
            mean = total / COUNT
            squares = ()
            for segment in tl.static_range(len(cube)):
                centered = tl.where(mask, cube[segment] - mean, 0.0)
                squares = squares + (centered * centered,)
            variance = group_sum(squares, group, GROUPS, RUN) / (COUNT - 1)
        if NORMALIZE == 1:
            inverse = 1.0 / (tl.sqrt(variance) + EPS * UNIT)
        else:
            inverse = 1.0 / tl.sqrt(variance + EPS * UNIT * UNIT)
        means = means + (mean,)
        inverses = inverses + (inverse,)
    return means, inverses


@lru_cache(maxsize=64)
def _table(rows: tuple[tuple[float, ...], ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype, device=device)


def normalizing_table(
    video: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns [2,C]: the means in the clip's units, and the factors for (value − mean); None without mean and std.

    Tables are cached, so that a captured step copies nothing from the host.
    """
    if mean is None or std is None:
        return None
    one = 255 if video.dtype == torch.uint8 else 1
    return _table((tuple(m * one for m in mean), tuple(1 / (s * one) for s in std)), video.device, dtype)


def restoring_table(
    video: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Returns [2,C]: multipliers and shifts that map a normalized float clip to [0,1]; None if it needs no mapping."""
    if mean is None or std is None or video.dtype == torch.uint8:
        return None
    return _table((tuple(std), tuple(mean)), video.device, dtype)


def cube_meta(video: torch.Tensor, patch_size: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the compile-time description of a clip's cubes that every kernel takes."""
    tubelet, height, width = patch_size
    channels = video.shape[1]
    _, stride_c, stride_t, stride_h, stride_w = video.stride()
    # one frame more than the cube: differences read the next frame
    span = (channels - 1) * stride_c + tubelet * stride_t + (height - 1) * stride_h + (width - 1) * stride_w
    length = width * channels
    return {
        "CHANNELS": channels,
        "TUBELET": tubelet,
        "HEIGHT": height,
        "WIDTH": width,
        "ROWS": launch.power_of_two(tubelet * height),
        "RUN": min(length & -length, MAX_RUN),
        # the stride of a dimension of size 1 is never used
        "CHANNELS_LAST": (channels == 1 or stride_c == 1) and (width == 1 or stride_w == channels),
        "WIDE": span >= 2**31,
        "BYTES": video.dtype == torch.uint8,
        "DTYPE": launch.triton_type(dtype),
    }
