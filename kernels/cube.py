# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (kernels extend tuples with `+`: Triton has no unpacking)
"""Device functions shared by the kernels that read token cubes directly from the clip.

A token is a cube of τ frames × p rows × p pixels × C channels. A program divides it into strips: PIXELS neighboring
pixels of a patch row, PIXELS·C values of a prediction. It holds a cube as a tuple of segments, blocks [ROWS, RUN] of
RUN values of each strip; ROWS is the number of strips, rounded up to a power of two. RUN is a power of two that divides
a strip, so that a strip needs no padding. Two memory layouts have different strips:

- CHANNELS_LAST: the p·C values of a patch row are contiguous in memory. A strip is a patch row, and segment s holds its
  values s·RUN to (s+1)·RUN − 1. For a thread that holds a whole run, the channel of each register is known when the
  kernel is compiled, so that per-channel statistics need no comparison.
- planes, and every other layout: a strip holds RUN pixels, at most 16 bytes of a plane; segment c holds their channel c.
  `interleave` brings a cube of planes into the order of a prediction.

The kernels read the clip through its strides, without a copy, in pieces of up to 128 bits where the memory is
contiguous. Offsets between cubes are 64-bit; inside a cube they are 32-bit unless WIDE is set, for cubes that span more
than 2^31 elements.

A uint8 clip stays in integers ("raw units", 255 per unit of [0,1]): its sums are exact in one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import launch
from .launch import jit, tl

NORMALIZE = {None: 0, "channel": 1, "patch": 2}
MAX_RUN = 16
MAX_BYTES = 16
"""Of a plane that a thread reads at a time: 128 bits."""


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
def strip_offsets(
    stride_t,
    stride_h,
    stride_w,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Returns the strips [ROWS,1] of a cube, their frames, and their offsets from the cube's first value."""
    STRIPS: tl.constexpr = WIDTH // PIXELS
    strip = tl.arange(0, ROWS)[:, None]
    frame = strip // (HEIGHT * STRIPS)
    row = strip // STRIPS % HEIGHT
    column = strip % STRIPS * PIXELS
    if WIDE:
        offset = frame.to(tl.int64) * stride_t + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    else:
        offset = frame * stride_t + row * stride_h + column * stride_w
    return strip, frame, offset


@jit
def run_values(segment: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr):
    """Returns the positions [1,RUN] of a segment's values in their strip, in a prediction's order, and their channels.

    For the segments of a cube with CHANNELS_LAST, or of an interleaved one.
    """
    value = segment * RUN + tl.arange(0, RUN)[None, :]
    return value, value % CHANNELS


@jit
def load_cube(
    pointer,
    mask,
    stride_c,
    stride_w,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads a cube's segments from the pointers [ROWS,1] of its strips: int32 for BYTES without AFFINE, else DTYPE.

    AFFINE: None, or (multipliers, shifts); each value becomes x·multiplier[channel] + shift[channel].
    """
    cube = ()
    for segment in tl.static_range(PIXELS * CHANNELS // RUN):
        if CHANNELS_LAST:
            value, _ = run_values(segment, CHANNELS, RUN)
            raw = tl.load(pointer + value, mask=mask, other=0)
        elif WIDE:
            pixel = tl.arange(0, RUN)[None, :].to(tl.int64)
            plane = tl.full([1, 1], segment, tl.int64) * stride_c
            raw = tl.load(pointer + (pixel * stride_w + plane), mask=mask, other=0)
        else:
            pixel = tl.arange(0, RUN)[None, :]
            raw = tl.load(pointer + (pixel * stride_w + segment * stride_c), mask=mask, other=0)
        if AFFINE is not None:
            pixels = raw.to(DTYPE)
            multiplier = by_channel(AFFINE, 0, segment, CHANNELS, RUN, CHANNELS_LAST, DTYPE)
            shift = by_channel(AFFINE, 1, segment, CHANNELS, RUN, CHANNELS_LAST, DTYPE)
            cube = cube + (tl.where(mask, pixels * multiplier + shift, 0.0),)
        elif BYTES:
            cube = cube + (raw.to(tl.int32),)
        else:
            cube = cube + (raw.to(DTYPE),)
    return cube


@jit
def by_channel(
    AFFINE: tl.constexpr,
    which: tl.constexpr,
    segment: tl.constexpr,
    CHANNELS: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the values [1,RUN] of one of two tuples of constants for a segment, by channel."""
    if not CHANNELS_LAST:
        return tl.full([1, RUN], AFFINE[which][segment], DTYPE)
    _, channel = run_values(segment, CHANNELS, RUN)
    values = tl.full([1, RUN], AFFINE[which][0], DTYPE)
    for c in tl.static_range(1, CHANNELS):
        values = tl.where(channel == c, tl.full([1, RUN], AFFINE[which][c], DTYPE), values)
    return values


@jit
def by_group(options, segment: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Returns the values [1,RUN] of a tuple of scalars for a segment, by group: GROUPS is 1, or the channels."""
    group = tl.arange(0, RUN)[None, :] * 0
    if GROUPS > 1:
        if CHANNELS_LAST:
            _, group = run_values(segment, GROUPS, RUN)
        else:
            group += segment
    values = tl.zeros_like(group).to(options[0].dtype) + options[0]
    for g in tl.static_range(1, GROUPS):
        values = tl.where(group == g, options[g], values)
    return values


@jit
def group_sum(cube, group: tl.constexpr, GROUPS: tl.constexpr, RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Returns the sum over the values of one of the cube's groups: GROUPS is 1, or the channels."""
    rows = tl.sum(tl.zeros_like(cube[0]), axis=1)
    for segment in tl.static_range(len(cube)):
        if CHANNELS_LAST and GROUPS > 1:
            _, own = run_values(segment, GROUPS, RUN)
            rows += tl.sum(tl.where(own == group, cube[segment], 0), axis=1)
        elif GROUPS == 1 or segment == group:
            rows += tl.sum(cube[segment], axis=1)
    return tl.sum(rows, axis=0)


@jit
def interleave(cube, RUN: tl.constexpr, ROWS: tl.constexpr):
    """Returns a cube of planes in the order of a prediction: value v of a strip is channel v % C of its pixel v // C.

    Only registers change their names where a thread holds a whole run.
    """
    CHANNELS: tl.constexpr = len(cube)
    pixels = ()  # [ROWS,1], those of plane 0, then those of plane 1, …
    for plane in tl.static_range(CHANNELS):
        pixels = pixels + unpacked(cube[plane], RUN, ROWS)
    segments = ()
    for segment in tl.static_range(CHANNELS):
        values = ()
        for place in tl.static_range(RUN):
            values = values + (pixels[(segment * RUN + place) % CHANNELS * RUN + (segment * RUN + place) // CHANNELS],)
        segments = segments + (packed(values, ROWS),)
    return segments


@jit
def unpacked(block, RUN: tl.constexpr, ROWS: tl.constexpr):
    """Returns the RUN columns [ROWS,1] of a block [ROWS,RUN]."""
    parts = (block,)
    for _ in tl.static_range(4):  # RUN is at most 16
        if len(parts) < RUN:  # part j of k holds the columns j, j + k, j + 2k, …
            even = ()
            odd = ()
            for j in tl.static_range(len(parts)):
                first, second = tl.split(tl.reshape(parts[j], [ROWS, RUN // len(parts) // 2, 2]))
                even = even + (first,)
                odd = odd + (second,)
            parts = even + odd
    return parts


@jit
def packed(columns, ROWS: tl.constexpr):
    """Returns the block [ROWS,RUN] of RUN columns [ROWS,1]."""
    parts = columns
    for _ in tl.static_range(4):
        if len(parts) > 1:
            joined = ()
            for j in tl.static_range(len(parts) // 2):
                both = tl.join(parts[j], parts[j + len(parts) // 2])
                joined = joined + (tl.reshape(both, [ROWS, len(columns) // len(parts) * 2]),)
            parts = joined
    return parts[0]


@jit
def mean_and_inverse(
    cube,
    mask,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
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
        total = group_sum(cube, group, GROUPS, RUN, CHANNELS_LAST)
        if INTEGER:
            wide = total.to(tl.int64)
            # float division is approximate on a GPU; this quotient is exact if all values are equal
            mean = (total // COUNT).to(DTYPE) + (total % COUNT).to(DTYPE) / COUNT
            scatter = group_sum(squares, group, GROUPS, RUN, CHANNELS_LAST).to(tl.int64) * COUNT - wide * wide
            variance = scatter.to(DTYPE) / (COUNT * (COUNT - 1))
        else:
            mean = total / COUNT
            squares = ()
            for segment in tl.static_range(len(cube)):
                centered = tl.where(mask, cube[segment] - mean, 0.0)
                squares = squares + (centered * centered,)
            variance = group_sum(squares, group, GROUPS, RUN, CHANNELS_LAST) / (COUNT - 1)
        if NORMALIZE == 1:
            inverse = 1.0 / (tl.sqrt(variance) + EPS * UNIT)
        else:
            inverse = 1.0 / tl.sqrt(variance + EPS * UNIT * UNIT)
        means = means + (mean,)
        inverses = inverses + (inverse,)
    return means, inverses


Statistics = tuple[tuple[float, ...], tuple[float, ...]] | None
"""Two constants per channel, which a kernel is compiled with."""


def normalizing(video: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Statistics:
    """Returns the means in the clip's units, and the factors for (value − mean); None without mean and std."""
    if mean is None or std is None:
        return None
    one = 255 if video.dtype == torch.uint8 else 1
    return tuple(m * one for m in mean), tuple(1 / (s * one) for s in std)


def restoring(video: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Statistics:
    """Returns multipliers and shifts that map a normalized float clip to [0,1]; None if it needs no mapping."""
    if mean is None or std is None or video.dtype == torch.uint8:
        return None
    return tuple(std), tuple(mean)


def cube_meta(video: torch.Tensor, patch_size: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the compile-time description of a clip's cubes that every kernel takes."""
    tubelet, height, width = patch_size
    channels = video.shape[1]
    _, stride_c, stride_t, stride_h, stride_w = video.stride()
    # one frame more than the cube: differences read the next frame
    span = (channels - 1) * stride_c + tubelet * stride_t + (height - 1) * stride_h + (width - 1) * stride_w
    # the stride of a dimension of size 1 is never used
    channels_last = (channels == 1 or stride_c == 1) and (width == 1 or stride_w == channels)
    pixels = width if channels_last else _run(width, MAX_BYTES // video.itemsize)
    return {
        "CHANNELS": channels,
        "TUBELET": tubelet,
        "HEIGHT": height,
        "WIDTH": width,
        "PIXELS": pixels,
        "ROWS": launch.power_of_two(tubelet * height * width // pixels),
        "RUN": _run(width * channels, MAX_RUN) if channels_last else pixels,
        "CHANNELS_LAST": channels_last,
        "WIDE": span >= 2**31,
        "BYTES": video.dtype == torch.uint8,
        "DTYPE": launch.triton_type(dtype),
    }


def _run(length: int, most: int) -> int:
    """Returns the largest power of two that divides length and is at most `most`, a power of two."""
    return min(length & -length, most)
