# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (kernels extend tuples with `+`: Triton has no unpacking)
"""Device functions shared by the kernels that read token cubes directly from the clip.

A token is a cube of τ frames × p rows × p pixels × C channels. A program divides it into strips: PIXELS neighboring
pixels of a patch row, PIXELS·C values of a prediction; ROWS is the number of strips, rounded up to a power of two. RUN
is a power of two that divides PIXELS. A cube is a tuple of C·PIXELS/RUN blocks [ROWS, RUN], in one of two orders:

- planes: the pixels of channel 0 of each strip, then those of channel 1, … The kernels compute with planes, so that a
  channel's statistics are sums over whole blocks.
- runs: the values of each strip in the order of a prediction, (w,c).

`interleave` and `separate` turn one into the other. They cost no instruction: a thread holds whole strips, and only its
registers change their names.

The kernels read the clip through its strides, without a copy, in pieces of up to 128 bits where the memory is
contiguous. CHANNELS_LAST means that the p·C values of a patch row are: they are then read as runs, else as planes.
Offsets between cubes are 64-bit; inside a cube they are 32-bit unless WIDE is set, for cubes that span more than 2^31
elements.

A uint8 clip stays in integers ("raw units", 255 per unit of [0,1]): its sums are exact in one pass.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import launch
from .launch import jit, tl

NORMALIZE = {None: 0, "channel": 1, "patch": 2}
MAX_BYTES = 16
"""What a thread loads or stores at a time: a run of the kernel's predictions or results, or else of the clip."""


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
def run_values(strip, run: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, RUN: tl.constexpr):
    """Returns the positions [ROWS,RUN] of a run's values in their token, in the order of a prediction."""
    return strip * (PIXELS * CHANNELS) + run * RUN + tl.arange(0, RUN)[None, :]


@jit
def load_cube(
    pointer,
    mask,
    stride_c,
    stride_w,
    AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads a cube's planes from the pointers [ROWS,1] of its strips: int32 for BYTES without AFFINE, else DTYPE.

    AFFINE: None, or (multipliers, shifts); each value becomes x·multiplier[channel] + shift[channel].
    """
    KIND: tl.constexpr = tl.int32 if BYTES and AFFINE is None else DTYPE
    OF_PLANE: tl.constexpr = PIXELS // RUN
    cube = ()
    for block in tl.static_range(CHANNELS * OF_PLANE):
        place = tl.arange(0, RUN)[None, :]
        if CHANNELS_LAST:
            offset = block * RUN + place
        elif WIDE:
            offset = (block % OF_PLANE * RUN + place).to(tl.int64) * stride_w
            offset += tl.full([1, 1], block // OF_PLANE, tl.int64) * stride_c
        else:
            offset = (block % OF_PLANE * RUN + place) * stride_w + block // OF_PLANE * stride_c
        cube = cube + (tl.load(pointer + offset, mask=mask, other=0).to(KIND),)
    if CHANNELS_LAST:
        cube = separate(cube, CHANNELS, PIXELS, ROWS, RUN)
    if AFFINE is not None:
        restored = ()
        for block in tl.static_range(CHANNELS * OF_PLANE):
            pixels = cube[block] * AFFINE[0][block // OF_PLANE] + AFFINE[1][block // OF_PLANE]
            restored = restored + (tl.where(mask, pixels, 0.0),)
        cube = restored
    return cube


@jit
def group_sum(planes, group: tl.constexpr, GROUPS: tl.constexpr):
    """Returns the sum over the values of one of the planes' groups: GROUPS is 1, or the channels."""
    FIRST: tl.constexpr = group * len(planes) // GROUPS
    rows = tl.sum(planes[FIRST], axis=1)
    for block in tl.static_range(FIRST + 1, FIRST + len(planes) // GROUPS):
        rows += tl.sum(planes[block], axis=1)
    return tl.sum(rows, axis=0)


@jit
def interleave(planes, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr):
    """Returns the runs of a cube: value v of a strip is channel v % C of its pixel v // C."""
    values = columns(planes, ROWS, RUN)
    runs = ()
    for run in tl.static_range(len(planes)):
        own = ()
        for v in tl.static_range(run * RUN, (run + 1) * RUN):
            own = own + (values[v % CHANNELS * PIXELS + v // CHANNELS],)
        runs = runs + (block_of(own, ROWS),)
    return runs


@jit
def separate(runs, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr):
    """Returns the planes of a cube, the inverse of `interleave`."""
    values = columns(runs, ROWS, RUN)
    planes = ()
    for block in tl.static_range(len(runs)):
        own = ()
        for place in tl.static_range(block * RUN, (block + 1) * RUN):
            own = own + (values[place % PIXELS * CHANNELS + place // PIXELS],)
        planes = planes + (block_of(own, ROWS),)
    return planes


@jit
def columns(cube, ROWS: tl.constexpr, RUN: tl.constexpr):
    """Returns the columns [ROWS,1] of a cube's blocks, those of block 0 first."""
    found = ()
    for block in tl.static_range(len(cube)):
        parts = (cube[block],)
        for _ in tl.static_range(4):  # RUN is at most 16
            if len(parts) < RUN:  # part j of k holds the columns j, j + k, j + 2k, …
                even = ()
                odd = ()
                for j in tl.static_range(len(parts)):
                    first, second = tl.split(tl.reshape(parts[j], [ROWS, RUN // len(parts) // 2, 2]))
                    even = even + (first,)
                    odd = odd + (second,)
                parts = even + odd
        found = found + parts
    return found


@jit
def block_of(parts, ROWS: tl.constexpr):
    """Returns the block [ROWS,RUN] of RUN columns [ROWS,1]: the inverse of `columns`."""
    RUN: tl.constexpr = len(parts)
    for _ in tl.static_range(4):
        if len(parts) > 1:
            pairs = ()
            for j in tl.static_range(len(parts) // 2):
                both = tl.join(parts[j], parts[j + len(parts) // 2])
                pairs = pairs + (tl.reshape(both, [ROWS, RUN // len(parts) * 2]),)
            parts = pairs
    return parts[0]


@jit
def mean_and_inverse(
    cube,
    mask,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
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
        total = group_sum(cube, group, GROUPS)
        if INTEGER:
            wide = total.to(tl.int64)
            # float division is approximate on a GPU; this quotient is exact if all values are equal
            mean = (total // COUNT).to(DTYPE) + (total % COUNT).to(DTYPE) / COUNT
            scatter = group_sum(squares, group, GROUPS).to(tl.int64) * COUNT - wide * wide
            variance = scatter.to(DTYPE) / (COUNT * (COUNT - 1))
        else:
            mean = total / COUNT
            squares = ()
            for segment in tl.static_range(len(cube)):
                centered = tl.where(mask, cube[segment] - mean, 0.0)
                squares = squares + (centered * centered,)
            variance = group_sum(squares, group, GROUPS) / (COUNT - 1)
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


def cube_meta(
    video: torch.Tensor, patch_size: Sequence[int], dtype: torch.dtype, other: torch.dtype | None = None
) -> dict[str, Any]:
    """Returns the compile-time description of a clip's cubes that every kernel takes.

    `dtype` is the type of the arithmetic, `other` that of a kernel's predictions or results of the clip's size.
    """
    tubelet, height, width = patch_size
    channels = video.shape[1]
    _, stride_c, stride_t, stride_h, stride_w = video.stride()
    # one frame more than the cube: differences read the next frame
    span = (channels - 1) * stride_c + tubelet * stride_t + (height - 1) * stride_h + (width - 1) * stride_w
    run = min(width & -width, MAX_BYTES // (video.dtype if other is None else other).itemsize)
    parts = [count for count in range(1, width // run + 1) if width // run % count == 0]
    rows = {run * count: launch.power_of_two(tubelet * height * width // (run * count)) for count in parts}
    pixels = min(rows, key=lambda pixels: (rows[pixels] * pixels, pixels))  # the least padding, then the shortest strip
    return {
        "CHANNELS": channels,
        "TUBELET": tubelet,
        "HEIGHT": height,
        "WIDTH": width,
        "PIXELS": pixels,
        "ROWS": rows[pixels],
        "RUN": run,
        # the stride of a dimension of size 1 is never used
        "CHANNELS_LAST": (channels == 1 or stride_c == 1) and (width == 1 or stride_w == channels),
        "WIDE": span >= 2**31,
        "BYTES": video.dtype == torch.uint8,
        "DTYPE": launch.triton_type(dtype),
    }
