"""Device functions shared by the kernels that read token cubes straight from the clip.

A token is the cube of τ frames × p × p pixels × C channels, flattened in the order (t,h,w,c) and padded to BLOCK, a
power of two. The clip is read through its strides: nothing is copied first. Offsets between clips are 64-bit; inside a
cube they are 32-bit unless WIDE says that a cube spans more than 2^31 elements.

CHANNELS_LAST promises stride 1 from channel to channel and C from column to column: a row of a patch is then one run
of p·C elements, which the compiler can read in 128-bit pieces.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from . import launch
from .launch import jit, tl

KINDS = {"pixel": 0, "adjacent": 1, "intra": 2}
NORMALIZE = {None: 0, "channel": 1, "patch": 2}
PIXEL, ADJACENT, INTRA = (tl.constexpr(kind) if tl else kind for kind in KINDS.values())
CHANNEL, PATCH = (tl.constexpr(kind) if tl else kind for kind in (1, 2))


@jit
def cube_base(
    token, rows, columns, stride_t, stride_h, stride_w, TUBELET: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """Offset of a token's first value in its clip (int64), and its slot."""
    slot = token // (rows * columns)
    row = token // columns % rows
    column = token % columns
    base = (
        slot.to(tl.int64) * TUBELET * stride_t
        + row.to(tl.int64) * HEIGHT * stride_h
        + column.to(tl.int64) * WIDTH * stride_w
    )
    return base, slot


@jit
def cube_offsets(
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Value numbers 0 to BLOCK−1, their frame and channel, and their offsets from the token's first value."""
    value = tl.arange(0, BLOCK)
    channel = value % CHANNELS
    frame = value // (HEIGHT * WIDTH * CHANNELS)
    row = value // (WIDTH * CHANNELS) % HEIGHT
    if WIDE:
        offset = frame.to(tl.int64) * stride_t + row.to(tl.int64) * stride_h
        offset += (value // CHANNELS % WIDTH).to(tl.int64) * stride_w + channel.to(tl.int64) * stride_c
    elif CHANNELS_LAST:
        offset = frame * stride_t + row * stride_h + value % (WIDTH * CHANNELS)
    else:
        offset = frame * stride_t + row * stride_h + value // CHANNELS % WIDTH * stride_w + channel * stride_c
    return value, frame, channel, offset


@jit
def load_pixels(
    pointer,
    mask,
    channel,
    affine_ptr,
    CHANNELS: tl.constexpr,
    AFFINE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Loads values as DTYPE: x·multiplier[c] + shift[c] with AFFINE, else x/255 for BYTES, else x."""
    pixels = tl.load(pointer, mask=mask, other=0).to(DTYPE)
    if AFFINE:
        multiplier = tl.zeros_like(pixels)
        shift = tl.zeros_like(pixels)
        for c in tl.static_range(CHANNELS):
            multiplier = tl.where(channel == c, tl.load(affine_ptr + c), multiplier)
            shift = tl.where(channel == c, tl.load(affine_ptr + CHANNELS + c), shift)
        pixels = pixels * multiplier + shift
    elif BYTES:
        pixels = pixels * (1.0 / 255.0)
    return pixels


@jit
def standardize(pixels, mask, channel, eps, CHANNELS: tl.constexpr, VALUES: tl.constexpr, NORMALIZE: tl.constexpr):
    """The cube minus its mean, and one over its deviation, value by value; the variance is unbiased."""
    if NORMALIZE == CHANNEL:
        COUNT: tl.constexpr = VALUES // CHANNELS
        mean = tl.zeros_like(pixels)
        for c in tl.static_range(CHANNELS):
            own = mask & (channel == c)
            mean = tl.where(own, tl.sum(tl.where(own, pixels, 0.0), axis=0) / COUNT, mean)
        centered = tl.where(mask, pixels - mean, 0.0)
        inverse = tl.zeros_like(pixels)
        for c in tl.static_range(CHANNELS):
            own = mask & (channel == c)
            variance = tl.sum(tl.where(own, centered * centered, 0.0), axis=0) / (COUNT - 1)
            inverse = tl.where(own, 1.0 / (tl.sqrt(variance) + eps), inverse)
    else:
        centered = tl.where(mask, pixels - tl.sum(tl.where(mask, pixels, 0.0), axis=0) / VALUES, 0.0)
        variance = tl.sum(centered * centered, axis=0) / (VALUES - 1)
        inverse = tl.zeros_like(pixels) + 1.0 / tl.sqrt(variance + eps)
    return centered, inverse


@jit
def cube_target(
    pointer,
    inside,
    value,
    frame,
    channel,
    slot,
    slots,
    stride_t,
    affine_ptr,
    eps,
    CHANNELS: tl.constexpr,
    TUBELET: tl.constexpr,
    VALUES: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    AFFINE: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Target values of one token, which of them exist, and which of them have a place in a prediction.

    `inside` is False for a token number out of range: then nothing is read. A difference that would need a frame after
    the clip's end has a place but does not exist.
    """
    mask = inside & (value < VALUES)
    pixels = load_pixels(pointer, mask, channel, affine_ptr, CHANNELS, AFFINE, BYTES, DTYPE)
    if KIND == PIXEL:
        goal = pixels
        if NORMALIZE:
            centered, inverse = standardize(pixels, mask, channel, eps, CHANNELS, VALUES, NORMALIZE)
            goal = centered * inverse
        return goal, mask, mask
    place = mask
    exists = mask & ((frame < TUBELET - 1) | (slot < slots - 1))
    if KIND == INTRA:
        place = mask & (frame < TUBELET - 1)
        exists = place
    following = load_pixels(pointer + stride_t, exists, channel, affine_ptr, CHANNELS, AFFINE, BYTES, DTYPE)
    goal = tl.where(exists, following - pixels, 0.0)
    if NORMALIZE:
        _, inverse = standardize(pixels, mask, channel, eps, CHANNELS, VALUES, NORMALIZE)
        goal = goal * inverse
    return goal, exists, place


@lru_cache(maxsize=64)
def _table(rows: tuple[tuple[float, ...], ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype, device=device)


def normalizing_table(
    video: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """[2,C] multipliers and shifts that turn the clip's numbers into (x − mean)/std; None without mean and std.

    Tables are kept, so that a captured step copies nothing from the host.
    """
    if mean is None or std is None:
        return None
    one = 255 if video.dtype == torch.uint8 else 1
    shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return _table((tuple(1 / (s * one) for s in std), shift), video.device, dtype)


def restoring_table(
    video: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """[2,C] multipliers and shifts that turn a normalised float clip into [0,1]; None where nothing is to be undone."""
    if mean is None or std is None or video.dtype == torch.uint8:
        return None
    return _table((tuple(std), tuple(mean)), video.device, dtype)


def cube_meta(video: torch.Tensor, patch_size: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time description of a clip's cubes that every kernel takes."""
    tubelet, height, width = patch_size
    channels = video.shape[1]
    values = tubelet * height * width * channels
    _, stride_c, stride_t, stride_h, stride_w = video.stride()
    # one tubelet more than the cube: differences read the following frame
    span = (channels - 1) * stride_c + tubelet * stride_t + (height - 1) * stride_h + (width - 1) * stride_w
    return {
        "CHANNELS": channels,
        "TUBELET": tubelet,
        "HEIGHT": height,
        "WIDTH": width,
        "VALUES": values,
        "BLOCK": launch.power_of_two(values),
        "CHANNELS_LAST": stride_c == 1 and stride_w == channels,
        "WIDE": span >= 2**31,
        "BYTES": video.dtype == torch.uint8,
        "DTYPE": launch.triton_type(dtype),
    }
